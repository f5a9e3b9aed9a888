"""``python -m patchsae_utils``: see :mod:`patchsae_utils.cli`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
