"""Files that an earlier build wrote and every later one must read; `python -m tests.artifacts.make` writes them.

A file is never written again: what it holds is the promise. A new kind of content gets a new file.
"""

from pathlib import Path

DIRECTORY = Path(__file__).parent
