"""A benchmark names the instruction set it ran on, and runs on a lesser one when asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import isa

ROOT = Path(__file__).parents[2]
BENCHMARK = """
from benchmarks import isa, measure

def main():
    quick = measure.start("Nothing.", 1)
    measure.finish("nothing", {"figure": 1.0}, [["a"]], quick)

if __name__ == "__main__":
    main()
"""


def isa_of(script: Path, *arguments: str) -> str:
    command = [sys.executable, str(script), "--quick", *arguments]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=True
    )
    named: str = json.loads(done.stdout.splitlines()[-1])["isa"]
    return named


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="needs AVX2")
def test_every_library_keeps_to_the_set_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = tmp_path / "nothing.py"
    script.write_text(BENCHMARK)
    assert isa_of(script, "--isa", "avx2") == "AVX2"
    assert isa_of(script) == isa.named(isa.in_use())


def test_libraries_on_different_sets_are_named_each() -> None:
    assert isa.named({"torch": "AVX2", "faiss": "AVX2"}) == "AVX2"
    assert isa.named({"torch": "AVX2", "faiss": "AVX512"}) == "torch AVX2, faiss AVX512"
