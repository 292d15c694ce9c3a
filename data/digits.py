"""Write the digit scans that the package carries as WebDataset shards: see `lightning_tdisent.data.digits.write`.

python data/digits.py [FOLDER]
"""

import argparse
from pathlib import Path

from lightning_tdisent.data.digits import write

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "digits")
    write(parser.parse_args().folder)
