"""`python -m lightning_tdisent`."""

import os
import sys

from lightning_tdisent.cli import main

if __name__ == "__main__":
    code = main()
    if sys.argv[1:2] == ["evaluate"] and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # gloo's threads abort about one shutdown of the interpreter in ten, after everything has been written
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
