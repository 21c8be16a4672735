"""python -m biasdpo: see `biasdpo.cli`."""

import sys

from biasdpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
