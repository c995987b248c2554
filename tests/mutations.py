"""Every planted fault, and what finds it: python -m tests.mutations."""

import sys

from tests.faults.runs import main

if __name__ == "__main__":
    sys.exit(main())
