"""Sequence encoders: equal to loops, to each history by itself, and blind to what a query does not know."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.datasets import files_config, write_csv
from tests.sequences import (
    ATTENTION,
    TRANSFORMER,
    attention_pooling,
    gap_class,
    transformer,
    with_history,
)
from tests.shop import make_config, write_files
from tests.streams import uneven_dataset
from twotower.config import parse_config
from twotower.data.dataset import Dataset
from twotower.data.histories import NEVER, Order
from twotower.data.prepare import prepare
from twotower.data.windows import Stretches
from twotower.errors import ConfigError, TrainingError
from twotower.model.batch import Sequences, part_of
from twotower.model.dropout import row_keys
from twotower.model.encoders import AttentionPooling, Transformer, make_encoder
from twotower.model.sequences import gap_classes, make_sequences
from twotower.model.towers import TwoTower
from twotower.schema import HistoryFeature, TransformerSpec
from twotower.training.examples import Examples, TowerInputs
from twotower.training.preflight import problems

LENGTH, WIDTH, ITEMS = 9, 12, 40
KINDS = {"attention": ATTENTION, "transformer": TRANSFORMER}


def encoder_of(kind: str, seed: int = 2, time_gaps: bool = False) -> AttentionPooling | Transformer:
    torch.manual_seed(seed)
    sizes = TransformerSpec(blocks=2, heads=3, feed_forward=2, dropout=0.4, time_gaps=time_gaps)
    spec = HistoryFeature(name="h", dim=WIDTH, max_length=LENGTH, pooling=kind, transformer=sizes)
    module = make_encoder(spec, 0.3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def random_stretches(count: int, seed: int = 4, longest: int = LENGTH) -> Stretches:
    """Return stretches, each read at several places, some queries reading nothing."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count)
    of_query = np.concatenate([np.arange(count), rng.integers(-1, count, 3 * count)])
    known = np.where(of_query < 0, 0, rng.integers(1, lengths[of_query] + 1))
    known[:count] = lengths
    order = np.argsort(np.where(of_query < 0, rng.integers(0, count, len(of_query)), of_query), kind="stable")
    items = rng.integers(0, ITEMS, lengths.sum())
    times = np.where(
        rng.random(len(items)) < 0.1, NEVER, 10 ** rng.uniform(5, 17, len(items)).astype(np.int64)
    )
    return Stretches(items, lengths, of_query[order], known[order], times, np.arange(count) * 77)


def table() -> torch.Tensor:
    return torch.randn(ITEMS + 1, WIDTH, generator=torch.Generator().manual_seed(9))


def encode(module: torch.nn.Module, sequences: Sequences) -> torch.Tensor:
    bag = sequences.items
    return module(table()[bag.ids[:, 0].clamp(min=0)] * bag.weights, sequences)


@pytest.mark.parametrize("kind", [*KINDS, "transformer with gaps"])
@pytest.mark.parametrize("count", [1, 2, 60])
def test_an_encoder_equals_loops_over_each_known_history(kind: str, count: int) -> None:
    gaps = kind == "transformer with gaps"
    module = encoder_of(kind.removesuffix(" with gaps"), time_gaps=gaps)
    stretches = random_stretches(count)
    sequences = make_sequences(stretches, LENGTH, None, gaps)
    assert stretches.times is not None
    assert sequences.alone == (count < 60)
    found = encode(module.eval(), sequences).detach().double().numpy()
    weights = {name: p.detach().double().numpy() for name, p in module.state_dict().items()}
    begins = np.cumsum(stretches.lengths) - stretches.lengths
    rows = table().double().numpy()
    read_nothing = 0
    for query, (stretch, known) in enumerate(zip(stretches.of_query, stretches.known, strict=True)):
        begin = begins[max(stretch, 0)]
        items = rows[stretches.item_rows[begin : begin + known] + 1]
        read_nothing += not len(items)
        if kind == "attention":
            expected = attention_pooling(weights, items)
        else:
            times = [None if t == NEVER else int(t) for t in stretches.times[begin : begin + known]]
            expected = transformer(weights, items, 3, times if gaps else None)
        np.testing.assert_allclose(found[query], expected, rtol=2e-4, atol=2e-5)
    assert count < 60 or (read_nothing > 2 and np.median(found.std(axis=0)) > 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_query_does_not_know_changes_nothing_and_gets_no_gradient(kind: str) -> None:
    module, stretches = encoder_of(kind).eval(), random_stretches(30)
    sequences = make_sequences(stretches, LENGTH, None)
    bag = sequences.items
    items = (table()[bag.ids[:, 0].clamp(min=0)] * bag.weights).requires_grad_()
    begins = np.cumsum(stretches.lengths) - stretches.lengths
    queries = np.flatnonzero((stretches.known > 1) & (stretches.known < 5))
    for query in queries[:20]:
        (gradient,) = torch.autograd.grad(module(items, sequences)[query].square().sum(), items)
        touched = np.flatnonzero(gradient.abs().sum(1).numpy())
        begin, known = begins[stretches.of_query[query]], stretches.known[query]
        read = (bag.ids[touched, 0] - 1).tolist()
        assert len(read) == known, "a query looks at something else than what it knows"
        assert read == stretches.item_rows[begin : begin + known].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("each", [1, 7, 1_000])
def test_parts_of_the_queries_read_the_same_with_the_same_masks(kind: str, each: int) -> None:
    module, stretches = encoder_of(kind).train(), random_stretches(50)
    assert stretches.names is not None
    sequences = make_sequences(stretches, LENGTH, None)
    keyed = sequences.keyed(row_keys(1, 2, torch.from_numpy(stretches.names), 3))
    whole = encode(module, keyed)
    count = len(stretches.known)
    slices = [slice(at, min(at + each, count)) for at in range(0, count, each)]
    parts = [encode(module, part_of({"h": keyed}, rows)["h"]) for rows in slices]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
    # Stretches in another grid, as on another rank, have the same masks too.
    alone = np.flatnonzero(stretches.of_query == 17)
    begin = (np.cumsum(stretches.lengths) - stretches.lengths)[17]
    own = Stretches(
        stretches.item_rows[begin : begin + stretches.lengths[17]],
        stretches.lengths[17:18],
        np.zeros(len(alone), np.int64),
        stretches.known[alone],
        None,
        stretches.names[17:18],
    )
    single = make_sequences(own, LENGTH, None).keyed(row_keys(1, 2, torch.from_numpy(own.names), 3))
    torch.testing.assert_close(encode(module, single), whole[alone], rtol=1e-4, atol=1e-5)


def test_dropout_is_a_function_of_seed_step_and_stretch() -> None:
    module, stretches = encoder_of("transformer").train(), random_stretches(40)
    sequences = make_sequences(stretches, LENGTH, None)
    without = encode(module, sequences)
    names = torch.from_numpy(stretches.names)

    def dropped(seed: int, step: int, names: torch.Tensor) -> torch.Tensor:
        return encode(module, sequences.keyed(row_keys(seed, step, names, 3)))

    first = dropped(1, 2, names)
    knows = torch.from_numpy(stretches.known > 0)
    assert not (first - without)[knows].abs().amax(1).eq(0).any()
    assert torch.equal(first[~knows], without[~knows])
    assert torch.equal(first, dropped(1, 2, names))
    for other in (dropped(2, 2, names), dropped(1, 3, names), dropped(1, 2, names + 1)):
        assert not (first - other)[knows].abs().amax(1).eq(0).any()
    assert torch.equal(encode(module.eval(), sequences.keyed(names)), encode(module, sequences))
    mean = torch.stack([dropped(5, step, names) for step in range(300)]).mean(0)
    assert (mean - without)[knows].abs().mean() < 0.35 * (first - without)[knows].abs().mean()


def test_every_item_of_a_stretch_has_a_mask_of_its_own() -> None:
    module, stretches = encoder_of("transformer").train(), random_stretches(40)
    sequences = make_sequences(stretches, LENGTH, None)
    found: list[torch.Tensor] = []
    module.dropout.register_forward_hook(lambda _, __, out: found.append(out == 0))
    encode(module, sequences.keyed(row_keys(1, 2, torch.from_numpy(stretches.names), 3)))
    items = found[0][sequences.stretch.flatten() >= 0]
    assert len(items) == len(stretches.item_rows)
    assert len(items.unique(dim=0)) > 0.9 * len(items)  # of 4,096 masks some come twice
    assert items.float().mean().item() == pytest.approx(0.4, abs=0.03)


@pytest.fixture(scope="module", params=["times", "rows", "random"])
def prepared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Dataset, TowerInputs]:
    """Users of up to 500 interactions at 60 times, of all kinds and with items outside the catalogue."""
    root = tmp_path_factory.mktemp("sequences")
    _, dataset = uneven_dataset(root, history=TRANSFORMER)
    if request.param == "random":
        old = dataset.interactions
        split = np.random.default_rng(3).choice(3, len(old), p=[0.6, 0.2, 0.2]).astype(np.int8)
        dataset.interactions = dataclasses.replace(old, split=split)
    inputs = TowerInputs(dataset)
    if request.param == "rows":
        inputs.order = "rows"
    return dataset, inputs


def test_one_pass_over_windows_equals_each_prefix_by_itself(prepared: tuple[Dataset, TowerInputs]) -> None:
    dataset, inputs = prepared
    examples = Examples.of(dataset, inputs, "train")
    schema = dataset.schema
    model = TwoTower(schema, make_config(Path("x")).model, 0.1, seed=5).eval()
    for parameter in model.towers.query.encoders.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for values in model.tables.values():
        torch.nn.init.normal_(values)
    batch = np.random.default_rng(0).permutation(len(examples))
    together = examples.queries(batch)
    sequences = together["history"]
    assert isinstance(sequences, Sequences)
    assert not sequences.alone
    positions = examples._examples[batch]
    users = examples._user_of[positions].astype(np.int64)
    places = positions - examples.histories.offsets[users]
    longest = examples.histories.offsets[-1]
    order: Order = inputs.order
    rows, weights = examples.histories.of_examples(users, places, int(longest), order)
    known = (rows >= 0).sum(1)
    # A long user's example knows what its window holds of the prefix: the latest four to six of six.
    length = schema.sequence_length
    assert length == 6
    read = np.where(known <= length, known, known - 3 * -(-(known - length) // 3))
    assert (read[known > length] >= 4).all()
    assert len(set(read[known > length].tolist())) == 3
    assert len(sequences.items.ids) < 0.6 * read.sum(), "a pass over windows is no cheaper than prefixes"
    rows = np.where(np.arange(rows.shape[1]) < read[:, None], rows, -1)[:, : max(length, 8)]
    # Which of equal times a row came from does not matter: these are the times by how far back they are.
    ends = known + examples.histories.offsets[users]
    back = np.maximum(ends[:, None] - 1 - np.arange(rows.shape[1]), 0)
    times = np.where(rows >= 0, examples.histories.times[back], NEVER)
    single = inputs.queries(examples.user_rows(batch), rows, weights[:, : rows.shape[1]], times)
    mine, alone = model.inputs("query", together), model.inputs("query", single)
    difference = (mine - alone)[:, 5:19].norm() / alone[:, 5:19].norm()
    assert difference < 1e-5
    assert (mine - alone)[:, 5:19].abs().max() < 1e-4
    # Everything else of the query, such as the profile of its latest eight, is its own.
    full = examples.histories.of_examples(users, places, 8, order)
    rest = inputs.queries(examples.user_rows(batch), *full, np.full(full[0].shape, NEVER))
    others = torch.cat([mine[:, :5], mine[:, 19:]], dim=1)
    plain = model.inputs("query", rest)
    assert torch.equal(others, torch.cat([plain[:, :5], plain[:, 19:]], dim=1))


def test_without_times_each_example_has_a_sequence_of_its_own(tmp_path: Path) -> None:
    _, dataset = uneven_dataset(tmp_path, history=ATTENTION)
    inputs = TowerInputs(dataset)
    inputs.order = "none"
    examples = Examples.of(dataset, inputs, "train")
    batch = np.arange(0, len(examples), 7)
    sequences = examples.queries(batch)["history"]
    assert isinstance(sequences, Sequences)
    assert sequences.names is None
    own = examples.item_rows(batch)
    for query, place in enumerate(sequences.read.tolist()):
        if place >= 0:
            stretch = sequences.stretch.flatten()[place]
            items = sequences.items.ids[sequences.stretch.flatten() == stretch, 0] - 1
            assert own[query] not in items.tolist()


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ({"pooling": "transformer", "transformer": {"heads": 3}}, "dim 14, which its 3 attention heads"),
        ({"pooling": "transformer", "transformer": {"blocks": 0}}, "blocks"),
        ({"pooling": "transformer", "transformer": {"dropout": 1.0}}, "dropout"),
        ({"pooling": "transformers"}, "transformer"),
    ],
)
def test_what_can_not_be_is_refused(history: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        with_history(make_config(tmp_path), **history)


def test_two_sequences_have_one_length(tmp_path: Path) -> None:
    values = make_config(tmp_path).to_json()
    values["features"]["query"][1]["pooling"] = "attention"
    second = {"name": "other", "type": "history", "dim": 8, "share": False, "pooling": "transformer"}
    values["features"]["query"].append(second)
    with pytest.raises(ConfigError, match="max_length 6 and 50; give all such the same"):
        parse_config(values)
    values["features"]["query"][-1]["max_length"] = 6
    write_files(tmp_path / "files")
    dataset = prepare(parse_config(values))
    model = TwoTower(dataset.schema, parse_config(values).model, 0.1, seed=5)
    examples = Examples.of(dataset, TowerInputs(dataset), "train")
    batch = examples.queries(np.arange(20))
    assert model.encode_queries(batch).isfinite().all()
    assert {name for name, v in batch.items() if isinstance(v, Sequences)} == {"history", "other"}


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, 1), (0.99, 1), (1, 2), (2, 2), (3, 3), (6, 3), (7, 4), (2.0**40, 33), (-5, 1)],
)
def test_gaps_have_classes_by_powers_of_two(seconds: float, expected: int) -> None:
    times = np.array([5, 5 + round(seconds * 1e6), NEVER, 7])
    assert gap_classes(times, np.arange(4)).tolist() == [0, expected, 0, 0]
    assert gap_classes(times, np.array([0, 0, 0, 0])).tolist() == [0, 0, 0, 0]
    assert gap_class(times.tolist(), 1) == expected


def test_gaps_without_times_are_refused(tmp_path: Path) -> None:
    rows = [[user, item] for user in range(12) for item in range(user, user + 6)]
    config = files_config(
        tmp_path,
        write_csv(tmp_path / "log.csv", ["who", "what"], rows),
        data__source__columns={"user": "who", "item": "what"},
        split__kind="random",
        features__query=[{"name": "history", "type": "history", **TRANSFORMER}],
    )
    with pytest.raises(TrainingError, match=r"time_gaps, and dataset .* has no times; set it to"):
        TowerInputs(prepare(config))
    found = [str(problem) for problem in problems(config, prepare(config), "train")]
    assert any("transformer.time_gaps" in problem for problem in found)


@pytest.mark.parametrize(
    "other", [{"blocks": 3}, {"heads": 2}, {"feed_forward": 3}, {"dropout": 0.1}, {"time_gaps": True}]
)
def test_every_size_of_the_transformer_matters(other: dict[str, Any]) -> None:
    stretches = random_stretches(20)
    keys = row_keys(1, 2, torch.from_numpy(stretches.names), 3)

    def outcome(sizes: TransformerSpec) -> torch.Tensor:
        spec = HistoryFeature(
            name="h", dim=WIDTH, max_length=LENGTH, pooling="transformer", transformer=sizes
        )
        torch.manual_seed(4)
        sequences = make_sequences(stretches, LENGTH, None, sizes.time_gaps)
        return encode(make_encoder(spec, 0.3).train(), sequences.keyed(keys))

    plain = TransformerSpec(blocks=2, heads=3, feed_forward=2, dropout=0.4)
    assert torch.equal(outcome(plain), outcome(plain))
    assert not torch.allclose(outcome(plain), outcome(plain.model_copy(update=other)))


@pytest.mark.parametrize("decay", [1.0, 0.6])
def test_attention_pooling_begins_as_recency(decay: float) -> None:
    stretches = random_stretches(20)
    spec = HistoryFeature(name="h", dim=WIDTH, max_length=LENGTH, pooling="attention", decay=decay)
    found = encode(make_encoder(spec, 0.3), make_sequences(stretches, LENGTH, None))
    begins = np.cumsum(stretches.lengths) - stretches.lengths
    for query, (stretch, known) in enumerate(zip(stretches.of_query, stretches.known, strict=True)):
        items = stretches.item_rows[begins[stretch] : begins[stretch] + known]
        weights = torch.tensor([decay**back for back in range(known)][::-1])
        expected = torch.zeros(WIDTH)
        if known:
            expected = (weights[:, None] * table()[items + 1]).sum(0) / weights.sum()
        torch.testing.assert_close(found[query], expected, rtol=1e-4, atol=1e-5)
