"""What each loss of ``train.loss.kind`` does, against loops in float64 and by its effects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.parity.loss_kinds import LOG_Q, compare_kind, make_whole, settings_of
from tests.parity.loss_oracle import INPUTS, make_case
from twotower.config import parse_config
from twotower.errors import ConfigError
from twotower.model.losses import Known, blocks, choose_loss, in_batch_softmax

# Queries, candidates, dim, own negatives, padding, known keys.
SHAPES = [(7, 12, 5, 0, 0, 0), (11, 30, 6, 3, 2, 5), (23, 40, 8, 2, 3, 7)]
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("bsl", {"positive_temperature": 1.0, "negative_power": 1.22}),
    ("bsl", {"positive_temperature": 1.7, "negative_power": 1.0}),
    ("bce", {"calibration": 0.75, "offset": -2.0}),
    ("bce", {"calibration": 0.0}),
    ("bce", {"calibration": 1.0, "offset": 0.5}),
    ("slatk", {"k": 4, "width": 0.2}),
    ("slatk", {"k": 17, "width": 1.0}),
]


@pytest.fixture(params=[(1000, 1000), (3, 5)], ids=["one block", "blocks of 3"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(blocks, "_FEWEST_ROWS", request.param[0])


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "values"), KINDS)
def test_equals_a_loop_in_value_and_gradient(kind: str, values: dict, shape: tuple) -> None:
    case = make_case(sum(shape), *shape)
    assert compare_kind(kind, case, **values) > 1e-3
    assert compare_kind(kind, case | {"mask_accidental_hits": False, "known": None}, **values) > 1e-3


@pytest.mark.parametrize(("kind", "values"), KINDS)
def test_by_numerical_differences(kind: str, values: dict) -> None:
    case = make_case(5, 6, 11, 4, 2, 1, 3)
    case |= {n: x.double() for n, x in case.items() if torch.is_tensor(x) and x.is_floating_point()}
    loss, users = choose_loss(settings_of(kind, **values)), torch.tensor([0, 1, 0, 2, 2, -1])
    inputs = [case[name].requires_grad_() for name in INPUTS]
    if kind == "slatk":
        # The weight is a constant of the step; far enough from the sigmoid's slope it does not move.
        loss = choose_loss(settings_of(kind, k=values["k"], width=1e9))

    def of(*given: torch.Tensor) -> torch.Tensor:
        there = case | dict(zip(INPUTS, given, strict=True))
        return loss(**there, whole=lambda: make_whole(there, users))

    assert torch.autograd.gradcheck(of, inputs)


class Largest(TorchDispatchMode):
    """Keeps the most numbers that any floating-point result had."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if torch.is_tensor(x) and x.is_floating_point():
                self.found = max(self.found, x.numel())
        return out


@pytest.mark.parametrize("kind", ["softmax", "bsl", "bce", "slatk"])
def test_no_matrix_of_queries_and_candidates(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(blocks, "_FEWEST_ROWS", 8)
    case = make_case(3, 90, 400, 5, 2, 3, 4)
    users = torch.arange(90) % 40
    with Largest() as largest:
        inputs = {name: case[name].clone().requires_grad_() for name in INPUTS}
        loss = choose_loss(settings_of(kind))
        loss(**case | inputs, whole=lambda: make_whole(case, users)).backward()
    assert 8 * 400 <= largest.found < 2 * 8 * 400


def small(**changes: Any) -> dict[str, Any]:
    """Three queries of one user, five candidates, nothing left out."""
    g = torch.Generator().manual_seed(2)
    return {
        "queries_QD": F.normalize(torch.randn(3, 4, generator=g), dim=1),
        "candidates_CD": F.normalize(torch.randn(5, 4, generator=g), dim=1),
        "positive_Q": torch.arange(3),
        "temperature": torch.tensor(0.2),
        "log_q_C": torch.randn(5, generator=g),
        "candidate_ids_C": torch.arange(5),
        "weight_Q": torch.full((3,), 1 / 3),
        "mask_accidental_hits": True,
        "known": None,
        "own_QHD": None,
        "own_log_q_QH": None,
    } | changes


def value_and_gradients(
    kind: str, case: dict[str, Any], users: list[int] | None = None, num_items: int = 50, **values: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss and its gradients to queries and candidates."""
    loss = choose_loss(settings_of(kind, **values))
    inputs = {name: case[name].clone().requires_grad_() for name in ("queries_QD", "candidates_CD")}
    of = torch.tensor(users or list(range(len(case["weight_Q"]))))
    found = loss(**case | inputs, whole=lambda: make_whole(case, of, num_items))
    found.backward()
    return found.detach(), *(x.grad for x in inputs.values() if x.grad is not None)


def test_bilateral_with_one_positive_each_knows_no_positive_temperature() -> None:
    plain, warm = (value_and_gradients("bsl", small(), positive_temperature=r) for r in (1.0, 3.0))
    torch.testing.assert_close(plain, warm)
    several = value_and_gradients("bsl", small(), [4, 4, 4], positive_temperature=3.0)
    assert abs(several[0] - warm[0]) > 1e-3


def test_bilateral_lets_a_users_unlikely_positive_go() -> None:
    """Of a user's positives those with high scores get the gradient, the more the lower their temperature."""
    case = small()
    case["candidates_CD"][2] = -case["queries_QD"][2]
    case["candidates_CD"][:2] = case["queries_QD"][:2]
    case["weight_Q"] = torch.tensor([1.0, 1.0, 1.0])
    # With its candidates alone as positives, and so far down, that no other query minds it as a negative.
    case["known"] = Known(torch.tensor([0, 5, 10, 15]), torch.arange(5).repeat(3), torch.arange(5))
    pulls = {}
    for users in ([0, 1, 2], [7, 7, 7]):
        _, _, candidates = value_and_gradients("bsl", case, users, positive_temperature=1.0)
        pulls[tuple(users)] = candidates.norm(dim=1)[:3]
    assert pulls[0, 1, 2].tolist() == pytest.approx([5.0] * 3)
    together = pulls[7, 7, 7]
    assert together[2] < 1e-3
    assert together.sum().item() == pytest.approx(15.0, rel=1e-5)
    warm = value_and_gradients("bsl", case, [7, 7, 7], positive_temperature=5.0)[2].norm(dim=1)[:3]
    assert together[2] < warm[2] < warm[1]


@pytest.mark.parametrize("power", [1.0, 1.22])
def test_a_power_above_one_pushes_negatives_harder_than_it_pulls_the_positive(power: float) -> None:
    """Along the query, all of the push is p / t and the pull 1 / t."""
    case = small(weight_Q=torch.tensor([1.0, 0.0, 0.0]))
    candidates = value_and_gradients("bsl", case, negative_power=power)[2]
    along = candidates @ case["queries_QD"][0]
    assert along[0].item() == pytest.approx(-5.0, rel=1e-4)
    assert along[1:].sum().item() == pytest.approx(5.0 * power, rel=1e-4)


@pytest.mark.parametrize("kind", ["bsl", "bce"])
def test_a_query_without_negatives_pulls_its_positive_alone(kind: str) -> None:
    case = small(weight_Q=torch.tensor([1.0, 0, 0]))
    case["known"] = Known(torch.tensor([0, 5, 5, 5]), torch.arange(5), torch.arange(5))
    value, queries, candidates = value_and_gradients(kind, case)
    assert value.isfinite()
    assert queries.isfinite().all()
    assert queries[0].norm() > 0
    assert (candidates[1:] == 0).all()


def test_binary_with_uniform_negatives_is_that_of_its_source() -> None:
    """Four of 49 items drawn uniformly: beta x softplus(-positive) + softplus(negative)."""
    rate, t = 4 / 49, 0.75
    case = small(log_q_C=torch.full((5,), LOG_Q * torch.tensor(rate).log().item()))
    value = value_and_gradients("bce", case, calibration=t)[0]
    z = case["queries_QD"] @ case["candidates_CD"].T / 0.2
    beta = rate * (t * (1 - 1 / rate) + 1 / rate)
    wanted = F.softplus(z).sum() - F.softplus(z.diagonal()).sum() + beta * F.softplus(-z.diagonal()).sum()
    assert value.item() == pytest.approx(wanted.item() / 3, rel=1e-5)


def test_binary_calibrated_on_a_sample_is_that_of_the_whole_catalogue() -> None:
    """t = 1: what a uniform sample gives is on average the share of it that the sample is."""
    g = torch.Generator().manual_seed(1)
    items = F.normalize(torch.randn(50, 4, generator=g), dim=1)
    case = small()
    query, positive = case["queries_QD"][:1], case["candidates_CD"][:1]
    z = query @ items.T / 0.2
    whole = F.softplus(z).sum() + F.softplus(-query @ positive.T / 0.2)[0, 0]
    rate = 10 / 50
    found = []
    for _ in range(2000):
        drawn = torch.randint(0, 50, (10,), generator=g)
        one = small(
            queries_QD=query,
            candidates_CD=torch.cat([positive, items[drawn]]),
            positive_Q=torch.tensor([0]),
            log_q_C=torch.full((11,), LOG_Q * torch.tensor(rate).log().item()),
            candidate_ids_C=torch.arange(11),
            weight_Q=torch.ones(1),
        )
        found.append(value_and_gradients("bce", one, num_items=51, calibration=1.0)[0])
    assert torch.stack(found).mean().item() == pytest.approx(rate * whole.item(), rel=0.03)


def test_top_k_of_endless_width_is_half_the_softmax() -> None:
    case = small()
    value, queries, _ = value_and_gradients("slatk", case, k=2, width=1e9)
    case["queries_QD"].requires_grad_()
    plain = in_batch_softmax(**case)
    plain.backward()
    assert case["queries_QD"].grad is not None
    torch.testing.assert_close(value, plain.detach() / 2)
    torch.testing.assert_close(queries, case["queries_QD"].grad / 2)


def test_top_k_weighs_by_the_distance_to_the_kth_best() -> None:
    case = small()
    softmax = torch.stack(
        [in_batch_softmax(**case | {"weight_Q": F.one_hot(torch.tensor(q), 3).float()}) for q in range(3)]
    )
    scores = case["queries_QD"] @ case["candidates_CD"].T
    for k in (1, 2, 5):
        margin = scores.diagonal() - scores.sort(dim=1, descending=True).values[:, k - 1]
        wanted = (torch.sigmoid(margin / 0.3) * softmax).mean()
        torch.testing.assert_close(value_and_gradients("slatk", case, k=k, width=0.3)[0], wanted)
    # Fewer candidates than k: every one of them is among the k best.
    torch.testing.assert_close(value_and_gradients("slatk", case, k=6, width=0.3)[0], softmax.mean())


@pytest.mark.parametrize("kind", ["bsl", "bce", "slatk"])
def test_padding_takes_part_in_nothing(kind: str) -> None:
    case = small(candidate_ids_C=torch.tensor([0, 1, -1, 3, -1]), weight_Q=torch.tensor([0.6, 0.4, 0.0]))
    case["log_q_C"][[2, 4]] = torch.nan
    case["candidates_CD"][[2, 4]] = 1e5
    value, queries, candidates = value_and_gradients(kind, case, [5, 5, -1])
    assert (candidates[[2, 4]] == 0).all()
    assert (queries[2] == 0).all()
    keep = torch.tensor([0, 1, 3])
    short = case | {name: case[name][keep] for name in ("candidates_CD", "log_q_C", "candidate_ids_C")}
    short |= {name: case[name][:2] for name in ("queries_QD", "positive_Q", "weight_Q")}
    wanted = value_and_gradients(kind, short, [5, 5])
    torch.testing.assert_close((value, queries[:2], candidates[keep]), wanted)


@pytest.mark.parametrize(
    ("train", "model", "message"),
    [
        ({"loss": {"kind": "bce", "symmetric": True}}, {}, "symmetric: true is a softmax .* kind is bce"),
        (
            {"loss": {"kind": "bsl", "learn_temperature": True}},
            {},
            "kind: bsl falls without end .* learn_temperature: false",
        ),
        (
            {"loss": {"kind": "bsl", "learn_temperature": False}},
            {"normalize": False},
            "bsl .* needs unit vectors; use model.normalize: true",
        ),
        (
            {"loss": {"kind": "slatk", "slatk": {"k": 30}}, "global_batch_size": 30, "num_workers": 1},
            {},
            r"slatk.k \(30\) must be below the 30 candidates",
        ),
        (
            {"loss": {"kind": "bce"}, "global_batch_size": 1, "num_workers": 1},
            {},
            "kind: bce needs negatives, and global_batch_size is 1",
        ),
        ({"loss": {"kind": "bpr"}}, {}, "softmax"),
    ],
)
def test_a_loss_that_does_not_fit_is_refused_in_one_line(
    train: dict, model: dict, message: str, small_config: Any
) -> None:
    values = small_config.to_json()
    values["train"] |= train
    values["model"] |= model
    with pytest.raises(ConfigError, match=message) as error:
        parse_config(values)
    assert len([line for line in str(error.value).splitlines() if line.strip()]) <= 2
