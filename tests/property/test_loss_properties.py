"""The blocked softmax equals a dense matrix for any shape, mask and block size, in value and gradients."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.parity.loss_kinds import compare_kind
from tests.parity.loss_oracle import INPUTS, compare_with_dense, make_case
from twotower.model import loss_masks
from twotower.model.losses import Known, blocks, in_batch_softmax

cases = st.builds(
    make_case,
    seed=st.integers(0, 10_000),
    num_queries=st.integers(2, 19),
    num_candidates=st.integers(5, 40),
    dim=st.integers(2, 20),
    num_own=st.integers(0, 4),
    padding=st.integers(0, 3),
    known=st.integers(0, 8),
)


@given(cases, st.booleans(), st.booleans(), st.integers(1, 30), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_equals_a_dense_matrix(case: dict, mask: bool, with_known: bool, rows: int, pairs: int) -> None:
    case |= {"mask_accidental_hits": mask} | ({} if with_known else {"known": None})
    if not case["own_QHD"].numel():
        case |= {"own_QHD": None, "own_log_q_QH": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_BLOCK_BYTES", 0)
        patch.setattr(blocks, "_FEWEST_ROWS", rows)
        patch.setattr(loss_masks, "_PAIRS_AT_ONCE", pairs)
        smallest = compare_with_dense(case)
    assume(smallest > 1e-3)  # hypothesis complains when most cases compare nothing


kinds = st.one_of(
    st.builds(
        lambda r, p: ("bsl", {"positive_temperature": r, "negative_power": p}),
        st.floats(0.3, 3),
        st.floats(0.5, 2),
    ),
    st.builds(
        lambda t, offset: ("bce", {"calibration": t, "offset": offset}), st.floats(0, 1), st.floats(-4, 2)
    ),
    st.builds(lambda k, w: ("slatk", {"k": k, "width": w}), st.integers(1, 50), st.floats(0.1, 3)),
)


@given(cases, kinds, st.booleans(), st.booleans(), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_other_losses_equal_loops(
    case: dict, kind: tuple[str, dict], mask: bool, with_known: bool, rows: int
) -> None:
    case |= {"mask_accidental_hits": mask} | ({} if with_known else {"known": None})
    if not case["own_QHD"].numel():
        case |= {"own_QHD": None, "own_log_q_QH": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_BLOCK_BYTES", 0)
        patch.setattr(blocks, "_FEWEST_ROWS", rows)
        # In float64: the two sides of a gradient may nearly cancel.
        case = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in case.items()}
        smallest = compare_kind(kind[0], case, 1e-8, **kind[1])
    assume(smallest > 1e-3)


@given(cases, st.integers(1, 20), st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_block_sizes_change_nothing(case: dict, rows: int, pairs: int) -> None:
    results = []
    for block_rows, pairs_at_once in ((1000, 1000), (rows, pairs)):
        inputs = {name: case[name].clone().requires_grad_() for name in INPUTS}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "_BLOCK_BYTES", 0)
            patch.setattr(blocks, "_FEWEST_ROWS", block_rows)
            patch.setattr(loss_masks, "_PAIRS_AT_ONCE", pairs_at_once)
            loss = in_batch_softmax(**case | inputs)
            loss.backward()
        results.append([loss.detach(), *(x.grad for x in inputs.values() if x.numel())])
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= 1e-6 * max(1.0, float(one.norm()))


@given(st.integers(0, 1000), st.integers(2, 12), st.integers(5, 20))
@settings(max_examples=30, deadline=None)
def test_items_that_find_their_queries(seed: int, num_pairs: int, dim: int) -> None:
    # The two sides swapped: an item finds its query among the batch's queries. Other queries of the same
    # item are accidental hits, and users known to have the item are left out.
    g = torch.Generator().manual_seed(seed)
    users = torch.randint(0, 6, (num_pairs,), generator=g)
    items = torch.randint(0, 5, (num_pairs,), generator=g)
    has_item = torch.rand(5, 6, generator=g) < 0.3
    keys = [has_item[item].nonzero()[:, 0] for item in items.tolist()]
    offsets = torch.tensor([0, *(len(k) for k in keys)]).cumsum(0)
    case = make_case(seed, num_pairs, num_pairs, dim, 0, 0, 0) | {
        "positive_Q": torch.arange(num_pairs),
        "candidate_ids_C": items,
        "known": Known(offsets, torch.cat(keys), users),
        "own_QHD": None,
        "own_log_q_QH": None,
    }
    assume(compare_with_dense(case) > 1e-3)


@given(cases, st.permutations(range(5)))
@settings(max_examples=20, deadline=None)
def test_the_order_of_candidates_does_not_matter(case: dict, head: list[int]) -> None:
    order = torch.arange(len(case["candidates_CD"]))
    order[:5] = torch.tensor(head)
    known = case["known"]
    moved = {name: case[name][order] for name in ("candidates_CD", "log_q_C", "candidate_ids_C")} | {
        "positive_Q": order.argsort()[case["positive_Q"]],
        "known": Known(known.offsets, known.keys, known.candidate_keys[order]),
    }
    torch.testing.assert_close(
        in_batch_softmax(**case | moved), in_batch_softmax(**case), rtol=2e-6, atol=1e-6
    )
