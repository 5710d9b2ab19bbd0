"""Building a shard takes less memory than three times its vectors, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.index.parts import write_part

pytestmark = pytest.mark.slow

NUM_ITEMS, DIM = 300_000, 128

# Pages of mapped files are the kernel's to take back: what the process itself holds is watched.
BUILDER = """
import re, sys, threading
from pathlib import Path
from twotower.index.parts import Part
from twotower.generations.shards import train_shards, write_shard

folder, factory = Path(sys.argv[1]), sys.argv[2]

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

parts = [Part.open(folder / f"part{n}") for n in range(3)]
trained = train_shards(parts, factory, 20_000, 0, str(folder / "trained"), 1)
before, peak, done = held(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, held())

thread = threading.Thread(target=watch, daemon=True)
thread.start()
items, out = [str(folder / "items.parquet")], str(folder / "shard")
rows = write_shard(parts, 0, factory, items, [], {}, "f", out, 1, trained)
done.set()
thread.join()
print(rows, peak - before)
"""


@pytest.mark.parametrize("factory", ["Flat", "IVF64,Flat", "IVF64,SQ8"])
def test_a_shard_is_built_in_less_than_three_times_its_vectors(factory: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, rows in enumerate(np.array_split(np.arange(NUM_ITEMS), 3)):
        vectors = rng.standard_normal((len(rows), DIM), dtype=np.float32)
        write_part(tmp_path, rows, np.zeros(len(rows), np.int32), vectors, 1, f"part{number}")
    table = pa.table({"item_row": np.arange(NUM_ITEMS), "item_id": [f"i{n}" for n in range(NUM_ITEMS)]})
    pq.write_table(table, tmp_path / "items.parquet")
    done = subprocess.run(
        [sys.executable, "-c", BUILDER, str(tmp_path), factory], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows, peak = map(int, done.stdout.split()[-2:])
    assert rows == NUM_ITEMS
    size = 4 * DIM * NUM_ITEMS
    # It holds the vectors at least: a watcher that sees nothing would pass otherwise.
    assert size < peak < 3 * size, peak / size
