"""`python -m tomjerry_utils` is the command `tomjerry`."""

import sys

from tomjerry_utils.cli import main

if __name__ == "__main__":
    sys.exit(main())
