"""A pause between two pieces of the work on a generation that is about to answer.

It is loaded beside the one that answers, in the same process: requests that came meanwhile go first.
"""

from __future__ import annotations

import time

_PAUSE_S = 0.005


def pause() -> None:
    """Leave the CPU and Python's interpreter to others, for longer than most answers take."""
    time.sleep(_PAUSE_S)
