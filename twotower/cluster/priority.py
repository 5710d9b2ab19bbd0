"""Batch work takes the CPU that serving leaves.

By ``deploy/ray.env`` all processes of Ray begin with the priority of its servers, so that one which starts
does not take the cores from a replica that answers. What works through data gives way here. That can not be
taken back without privileges: a process in which a task gave way keeps that for later tasks of the same job.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

NICENESS = 15
"""What Ray gives its workers where nothing else is set."""


def give_way() -> None:
    """Give this thread, and those that it starts from now on, a priority below that of serving."""
    me = threading.get_native_id()
    # Of a thread on Linux, and it may always be lowered.
    os.setpriority(os.PRIO_PROCESS, me, max(NICENESS, os.getpriority(os.PRIO_PROCESS, me)))


def giving_way(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that calls this one after giving way."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        give_way()
        return function(*args, **kwargs)

    return call
