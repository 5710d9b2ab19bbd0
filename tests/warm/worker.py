"""What Ray starts instead of its own ``default_worker.py``."""

import os
import sys

from asking import ask

ask(os.environ["TWOTOWER_TEST_FORKS"], sys.argv[1:])
