"""Passage retrieval in two stages: dual encoder, exact search, cross-encoder. Which module imports which:
tests/test_layout.py.

Importing it changes one thing: a missing package ends the program with one line instead of a traceback.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (older versions read this file, too)
    sys.stderr.write("ERROR " + sys.executable + ": an older python (expected 3.10 or later)\n")
    sys.exit(2)

from torch_src.runtime.libraries import report_missing_package

if sys.excepthook is sys.__excepthook__:
    sys.excepthook = report_missing_package
