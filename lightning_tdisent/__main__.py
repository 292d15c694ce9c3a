"""python -m lightning_tdisent."""

import sys

from lightning_tdisent.cli import main

if __name__ == "__main__":
    sys.exit(main())
