"""The Triton kernels against a dense matrix: under Triton's interpreter, and on a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.parity.loss_oracle import assert_equals_dense, make_case

# Queries, candidates, dim, own negatives, padding, known keys: parts of a tile, one and several tiles.
SHAPES = [(37, 50, 64, 0, 3, 4), (70, 131, 96, 3, 5, 6), (129, 65, 128, 2, 1, 0)]


def check_kernels(device: str, half_dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        assert_equals_dense(make_case(seed, *shape), device)
    case = make_case(7, *SHAPES[1])
    half = {name: case[name].to(half_dtype) for name in ("queries_QD", "candidates_CD", "own_QHD")}
    assert_equals_dense(case | half, device, relative=2e-2)


def check_interpreted() -> None:
    """Run the kernels on the CPU, with super-blocks of 64 queries."""
    from twotower.model import loss_kernels, losses

    loss_kernels._BITS_BYTES = 64
    calls = []

    def count(*args, **kwargs):
        calls.append(kwargs)
        return loss_kernels.loss_by_kernels(*args, **kwargs)

    losses._implementation = lambda queries_QD, dtype: count
    check_kernels("cpu", torch.float16)  # the interpreter multiplies no bfloat16
    assert len(calls) == 2 * (len(SHAPES) + 1)
    print("the kernels equal the dense matrix")


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", "from tests.parity.test_loss_kernels import *; check_interpreted()"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},  # read when triton is imported
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "the kernels equal the dense matrix"


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    check_kernels("cuda", torch.bfloat16)
