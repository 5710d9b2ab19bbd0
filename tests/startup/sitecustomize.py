"""What every Python that tests start does before anything else: it makes its imports cheap.

Most of a short-lived process of Ray is imports. Python's collector looks through all that they made again
and again, a fifth of their time, and finds nothing. And where a worker has variables of its own, Ray first
imports itself in a process that does nothing but set them and become the worker.

``tests/conftest.py`` puts this folder on PYTHONPATH.
"""

import gc
import os
import sys

gc.set_threshold(100_000, 20, 100)


def _become_worker() -> None:
    """Do what Ray's ``setup_worker.py`` does where only variables of the environment are to be set."""
    import argparse
    import json

    parser = argparse.ArgumentParser()
    parser.add_argument("--serialized-runtime-env-context", default="{}")
    parser.add_argument("--language")
    at = next(i for i, word in enumerate(sys.orig_argv) if word.endswith("/setup_worker.py"))
    known, command = parser.parse_known_args(sys.orig_argv[at + 1 :])
    context = json.loads(known.serialized_runtime_env_context)
    variables = context.pop("env_vars", None) or {}
    python = context.pop("py_executable", None) or sys.executable
    # Anything else, and values that name other variables, are Ray's own to do.
    if known.language != "PYTHON" or any(context.values()) or any("$" in v for v in variables.values()):
        return
    os.execve(python, [python, *command], {**os.environ, **variables})


if any(word.endswith("/ray/_private/workers/setup_worker.py") for word in sys.orig_argv):
    _become_worker()
