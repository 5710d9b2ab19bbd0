"""What Ray starts instead of its own ``setup_worker.py``, where a worker has an environment of its own."""

import argparse
import json
import os

from asking import ask

parser = argparse.ArgumentParser()
parser.add_argument("--serialized-runtime-env-context", default="{}")
parser.add_argument("--language")
known, (_, *arguments) = parser.parse_known_args()
context = json.loads(known.serialized_runtime_env_context)
assert not context.get("command_prefix"), "no test asks for another program"
os.environ.update(context.get("env_vars", {}))
ask(os.environ["TWOTOWER_TEST_FORKS"], arguments)
