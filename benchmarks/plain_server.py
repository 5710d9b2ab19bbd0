"""The service's own routes under plain uvicorn, without Ray: what ``benchmarks.serve`` compares with.

python -m benchmarks.plain_server GENERATION_DIR PORT THREADS WORKERS MAX_K
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from twotower.client import Client

_ROOT = Path(__file__).parents[1]
_READY_TIMEOUT_S = 120.0


@contextlib.contextmanager
def plain_server(generation: Path, port: int, threads: int, workers: int, max_k: int) -> Iterator[str]:
    """Serve a generation in a process of its own while the block runs; yields its address when it is ready.

    Args:
        generation: directory of the generation.
        port: to listen on.
        threads: CPU threads of the query tower and of a search.
        workers: requests worked on at the same time.
        max_k: largest k of a request.
    """
    numbers = [str(number) for number in (port, threads, workers, max_k)]
    command = [sys.executable, "-m", "benchmarks.plain_server", str(generation), *numbers]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, cwd=_ROOT, env=environment) as process, Client(url) as client:
        try:
            wait_until_ready(client, lambda: process.poll() is None)
            yield url
        finally:
            process.terminate()


def wait_until_ready(client: Client, alive: Callable[[], bool] = lambda: True) -> None:
    """Wait until a service answers queries, while its process lives."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while not client.ready():
        if not alive() or time.monotonic() > deadline:
            raise SystemExit(f"{client.url} did not become ready")
        time.sleep(0.1)


def main() -> None:
    """Serve until SIGTERM."""
    import uvicorn

    from serve.api import make_api
    from serve.fused import FusedService
    from twotower.retrieval.retriever import Retriever

    generation, port, threads, workers, max_k = sys.argv[1], *map(int, sys.argv[2:])
    retriever = Retriever.open(generation, threads=threads)
    retriever.warm_up()
    service = FusedService(retriever, max_k, workers, {"active": {}, "missing": {}}, threads)
    uvicorn.run(
        # Request ids are Ray's under Ray.
        make_api(service, request_ids=False),
        host="127.0.0.1",
        port=port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
