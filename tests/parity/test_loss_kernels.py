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
    from twotower.model import loss_kernels
    from twotower.model.losses import softmax

    loss_kernels._BITS_BYTES = 64
    calls = []

    def count(*args, **kwargs):
        calls.append(kwargs)
        return loss_kernels.loss_by_kernels(*args, **kwargs)

    softmax._implementation = lambda queries_QD, dtype: count
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


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from twotower.model import loss_kernels

def compiled(kernel, types, constants):
    runtime = iter(types)
    signature = {n: "constexpr" if n in constants else next(runtime) for n in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

pairs = ["*i32", "*i64", "*i64", "i32", "i32"]
assert "atom" in compiled(loss_kernels._set_bits, pairs, {"CLEAR": True, "BLOCK": 1024})
for vectors, tile in (("*bf16", 64), ("*fp32", 32)):
    sizes = {"D": 96, "D_PADDED": 128, "TILE": tile, "PRECISION": "tf32x3"}
    matrix = [vectors, vectors, "*fp32", "*fp32", "*i32", "*fp32"]
    ends = ["i32"] * 3
    for ptx in (
        compiled(loss_kernels._over_candidates, [*matrix, "*fp32", *ends], sizes | {"WITH_MEAN": True}),
        compiled(loss_kernels._over_queries, [*matrix, "*i64", "*fp32", "*fp32", *ends], sizes),
    ):
        assert "mma" in ptx  # tensor cores
print("compiled")
"""


def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "compiled"


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    check_kernels("cuda", torch.bfloat16)
