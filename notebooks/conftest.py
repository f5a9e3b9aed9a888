"""Settings of the notebooks' kernels when nbval runs them."""

import os

# nbval reads a cell's messages only when the cell has ended, and a kernel keeps about two thousand for it: a progress bar that is redrawn
# ten times a second for some minutes fills that up, the message that the cell has ended is lost, and nbval reports
# "Timeout of 5 seconds exceeded waiting for output".
os.environ.setdefault("TQDM_MININTERVAL", "5")
