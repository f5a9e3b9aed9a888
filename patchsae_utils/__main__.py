"""``python -m patchsae_utils``: see :mod:`patchsae_utils.cli`."""

import os
import sys

# Before torch is loaded: beside a busy program, threads that spin cost five to ten times.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from .cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
