"""`python -m jaxfp8`: see `jaxfp8._cli`."""

import importlib.util
import sys

if missing := [m for m in ("click", "rich") if importlib.util.find_spec(m) is None]:
    sys.exit(f"python -m jaxfp8 needs {' and '.join(missing)}: pip install 'jaxfp8[cli]'")

from ._cli import main

main(prog_name="python -m jaxfp8")
