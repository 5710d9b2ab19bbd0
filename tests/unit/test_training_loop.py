"""The training loop of one process: it learns, resumes, repeats itself and refuses what can not work."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.streams import with_weights
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.data.knowledge import Rules, known
from twotower.data.prepare import prepare
from twotower.errors import ConfigError, TrainingError
from twotower.model.batch import Bag, FeatureBatch, forget
from twotower.model.checkpoint import weights_of
from twotower.schema import KINDS, SPLITS
from twotower.training.checks import check_sizes
from twotower.training.collectives import World
from twotower.training.examples import Examples, TowerInputs
from twotower.training.loop import StepReport, Trainer
from twotower.training.validation import validation_queries


def with_train(config: Config, **train: object) -> Config:
    values = copy.deepcopy(config.to_json())
    values["train"] |= train
    return parse_config(values)


def test_resuming_after_an_epoch_equals_not_stopping(small_config: Config, small_dataset: Dataset) -> None:
    whole = Trainer(small_config, small_dataset, World(), "train")
    for _ in range(2):
        whole.run_epoch()
    first = Trainer(small_config, small_dataset, World(), "train")
    first.run_epoch()
    second = Trainer(small_config, small_dataset, World(), "train")
    second.load_state_dict(first.state_dict(), weights_of(first.model), first.best_weights)
    second.run_epoch()
    for name, tensor in weights_of(whole.model).items():
        assert torch.equal(tensor, weights_of(second.model)[name]), name
    assert [r.loss for r in whole.history] == [r.loss for r in second.history]
    assert whole.history[1].loss < whole.history[0].loss


FULL = {
    "global_batch_size": 200,
    "epochs": 3,
    "loss": {"symmetric": True},
    "negatives": {
        "uniform": 11,
        "popular": 5,
        "memory": 120,
        "memory_start": 3,
        "mined": {"per_query": 2, "skip": 3, "window": 20, "every_steps": 7},
    },
}


def test_resuming_inside_an_epoch_equals_not_stopping(
    small_config: Config, small_dataset: Dataset, tmp_path: Path
) -> None:
    """With the memory of candidates, mined lists and the epoch's sums in the checkpoint, bit for bit."""
    config = with_train(small_config, **FULL)
    dataset = with_weights(small_dataset, [0.0, 0.3, 1.0, 9.0])
    whole = Trainer(config, dataset, World(), "train")
    saved = tmp_path / "state.pt"

    def save(report: StepReport) -> None:
        if report.step == whole.source.steps_per_epoch + 11:
            torch.save((whole.state_dict(), weights_of(whole.model), whole.best_weights), saved)

    for _ in range(3):
        whole.run_epoch(save)
    second = Trainer(config, dataset, World(), "train")
    second.load_state_dict(*torch.load(saved, weights_only=True))
    assert (second.epoch, second.step) == (1, whole.source.steps_per_epoch + 11)
    assert second.assemble.mined is not None
    first_steps: list[StepReport] = []
    while second.epoch < 3:
        second.run_epoch(first_steps.append)
    assert first_steps[0].done == 12 * 200
    for name, tensor in weights_of(whole.model).items():
        assert torch.equal(tensor, weights_of(second.model)[name]), name
    assert [(r.loss, r.validation_recall) for r in whole.history] == [
        (r.loss, r.validation_recall) for r in second.history
    ]


def test_a_changed_model_can_not_be_resumed(small_config: Config, small_dataset: Dataset) -> None:
    trainer = Trainer(small_config, small_dataset, World(), "train")
    values = copy.deepcopy(small_config.to_json())
    values["model"]["query_tower"]["hidden"] = [41]
    other = Trainer(parse_config(values), small_dataset, World(), "train")
    with pytest.raises(TrainingError, match=r"layers\.0\.bias has shape \(40,\) there and \(41,\)"):
        other.load_state_dict(trainer.state_dict(), weights_of(trainer.model), {})


def test_a_loss_that_is_not_finite_stops_before_the_update(
    small_config: Config, small_dataset: Dataset
) -> None:
    trainer = Trainer(small_config, small_dataset, World(), "train")
    reports: list[StepReport] = []

    def damage(report: StepReport) -> None:
        reports.append(report)
        if report.step == 3:
            with torch.no_grad():
                trainer.model.towers.query.output.bias.fill_(torch.nan)

    with pytest.raises(TrainingError) as error:
        trainer.run_epoch(damage)
    assert len(reports) == 3
    text = str(error.value)
    share = next(trainer.source.shares(0, 3))
    user = int(share.user_rows[0, 0])
    item = small_dataset.item_ids.id(int(share.item_rows[0, 0]))
    assert "step 4 of epoch 1 has loss nan" in text
    assert f"256 pairs (user row, item) begins with ({user}, {item})" in text
    assert "learning rate 0.00" in text


def test_asked_to_stop_the_step_report_says_so(small_config: Config, small_dataset: Dataset) -> None:
    trainer = Trainer(small_config, small_dataset, World(), "train")
    reports: list[StepReport] = []
    trainer.run_epoch(reports.append, lambda: len(reports) == 4)
    assert [r.step for r in reports if r.stopping] == [5]


def test_early_stopping_waits_for_its_patience(small_config: Config, small_dataset: Dataset) -> None:
    config = with_train(small_config, early_stopping={"patience": 2, "min_delta": 1.0})
    trainer = Trainer(config, small_dataset, World(), "train")
    finished = []
    for _ in range(3):
        trainer.run_epoch()
        finished.append(trainer.finished)
    # No gain reaches 1.0, so the first epoch stays the best one.
    assert finished == [False, False, True]
    assert trainer.best_epoch == 1


def test_gradient_clipping_bounds_the_whole_gradient(small_config: Config, small_dataset: Dataset) -> None:
    """Rows of tables count in the norm; plain gradient descent shows what was applied."""
    trainer = Trainer(small_config, small_dataset, World(), "train")
    gradients = trainer.compute.gradients(trainer.assemble(next(trainer.source.shares(0)), 0))
    norm = trainer.optimizers.gradient_norm(gradients)
    parts = [p.grad.flatten() for p in trainer.compute.parameters if p.grad is not None]
    parts += [rows.flatten() for _, rows in gradients.tables.values()]
    assert norm == pytest.approx(torch.cat(parts).norm().item(), rel=1e-5)
    clipped = Trainer(
        with_train(small_config, optimizer={"max_grad_norm": norm / 4}), small_dataset, World(), "train"
    )
    same = clipped.compute.gradients(clipped.assemble(next(clipped.source.shares(0)), 0))
    clipped.optimizers.update(same, clipped.optimizers.gradient_norm(same), 1.0)
    for mine, whole in zip(clipped.compute.parameters, trainer.compute.parameters, strict=True):
        torch.testing.assert_close(mine.grad, whole.grad / 4)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"negatives": {"explicit": 2}}, r"explicit is 2, and dataset .* no negative interaction"),
        (
            {"negatives": {"mined": {"per_query": 1, "skip": 10, "window": 300}}},
            r"\(10 \+ 300\), and the catalogue has 210 items; use a window of at most 200",
        ),
    ],
)
def test_negatives_that_can_not_be_had_are_refused(
    train: dict, message: str, small_config: Config, small_dataset: Dataset
) -> None:
    with pytest.raises(TrainingError, match=message):
        Trainer(with_train(small_config, **train), small_dataset, World(), "train")


@pytest.mark.parametrize("change", [{"precision": "bfloat16"}, {"tower_chunk_size": 37}])
def test_other_ways_to_compute_learn_the_same(
    change: dict, small_config: Config, small_dataset: Dataset
) -> None:
    plain = Trainer(small_config, small_dataset, World(), "train")
    other = Trainer(with_train(small_config, **change), small_dataset, World(), "train")
    one, two = plain.run_epoch(), other.run_epoch()
    assert two.loss == pytest.approx(one.loss, rel=5e-3)
    assert not torch.equal(plain.model.tables["id_of_item"], other.model.tables["id_of_item"])


def test_the_seed_decides_the_weights(small_config: Config, small_dataset: Dataset) -> None:
    def train(seed: int) -> dict[str, torch.Tensor]:
        values = small_config.to_json() | {"seed": seed}
        trainer = Trainer(parse_config(values), small_dataset, World(), "train")
        trainer.run_epoch()
        return weights_of(trainer.model)

    one, again, other = train(3), train(3), train(4)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not torch.equal(one["tables.id_of_item"], other["tables.id_of_item"])


def test_a_batch_above_the_data_is_refused(small_config: Config, small_dataset: Dataset) -> None:
    config = with_train(small_config, global_batch_size=1_000_000)
    with pytest.raises(TrainingError, match=r"global_batch_size \(1000000\) is above the \d+ training"):
        Trainer(config, small_dataset, World(), "train")


@pytest.mark.parametrize(
    ("num_examples", "workers", "says"),
    [
        (100, 3, "use at most 99$"),
        (2, 3, "use at most 2 and as few train.num_workers$"),
        (0, 3, "there is nothing to train on: look at data and split$"),
    ],
)
def test_the_advice_for_a_batch_above_the_data_can_be_followed(
    small_config: Config, small_dataset: Dataset, num_examples: int, workers: int, says: str
) -> None:
    config = with_train(small_config, num_workers=workers, global_batch_size=300)
    with pytest.raises(TrainingError, match=rf"is above the {num_examples} training interactions; {says}"):
        check_sizes(config, small_dataset, num_examples)


def test_the_learned_temperature_stays_above_its_floor(small_config: Config, small_dataset: Dataset) -> None:
    loss = {"temperature": 0.07, "min_temperature": 0.0699}
    config = with_train(small_config, loss=loss, optimizer={"learning_rate": 0.05})
    trainer = Trainer(config, small_dataset, World(), "train")
    trainer.run_epoch()
    assert trainer.model.log_temperature.exp().item() >= 0.0699 - 1e-7
    fixed = Trainer(
        with_train(small_config, loss=loss | {"learn_temperature": False}), small_dataset, World(), "train"
    )
    fixed.run_epoch()
    assert fixed.model.log_temperature.exp().item() == pytest.approx(0.07, rel=1e-6)


def test_the_temperature_has_a_learning_rate_of_its_own(small_config: Config, small_dataset: Dataset) -> None:
    moved, towers = {}, {}
    for rate in (None, 1e-3, 1e-5, 1e-2):
        loss = {"temperature": 0.1, "learn_temperature": True, "temperature_learning_rate": rate}
        config = with_train(small_config, loss=loss, optimizer={"learning_rate": 1e-3})
        trainer = Trainer(config, small_dataset, World(), "train")
        gradients = trainer.compute.gradients(trainer.assemble(next(trainer.source.shares(0)), 0))
        trainer.optimizers.update(gradients, 1.0, 0.5)
        moved[rate] = abs(trainer.model.log_temperature.item() - np.log(0.1))
        towers[rate] = trainer.model.towers.query.output.weight.detach().clone()
    # Adam's first step is the learning rate, here half of its peak.
    assert moved[1e-5] == pytest.approx(5e-6, rel=0.05)
    assert moved[1e-2] == pytest.approx(5e-3, rel=1e-3)
    assert moved[None] == moved[1e-3] == pytest.approx(5e-4, rel=1e-2)
    assert all(torch.equal(weight, towers[None]) for weight in towers.values())


def test_a_temperature_with_a_schedule_ends_where_it_says(
    small_config: Config, small_dataset: Dataset
) -> None:
    loss = {"temperature": 0.2, "learn_temperature": False, "final_temperature": 0.05}
    trainer = Trainer(with_train(small_config, loss=loss, epochs=2), small_dataset, World(), "train")
    found: list[float] = []
    for _ in range(2):
        trainer.run_epoch(lambda report: found.append(report.temperature))
    steps = 2 * trainer.source.steps_per_epoch
    assert found == pytest.approx([0.2 * (1 / 4) ** ((n + 1) / steps) for n in range(steps)], rel=1e-5)


def test_resuming_with_all_guards_equals_not_stopping(
    small_config: Config, small_dataset: Dataset, tmp_path: Path
) -> None:
    loss = {
        "kind": "bsl",
        "learn_temperature": False,
        "final_temperature": 0.05,
        "recency_half_life_days": 30.0,
        "activity_power": 0.5,
    }
    config = with_train(small_config, loss=loss, optimizer={"table_weight_decay": 0.1}, epochs=2)
    whole = Trainer(config, small_dataset, World(), "train")
    saved = tmp_path / "state.pt"

    def save(report: StepReport) -> None:
        if report.step == 5:
            torch.save((whole.state_dict(), weights_of(whole.model), whole.best_weights), saved)

    for _ in range(2):
        whole.run_epoch(save)
    second = Trainer(config, small_dataset, World(), "train")
    second.load_state_dict(*torch.load(saved, weights_only=True))
    while second.epoch < 2:
        second.run_epoch()
    for name, tensor in weights_of(whole.model).items():
        assert torch.equal(tensor, weights_of(second.model)[name]), name


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            {"learn_temperature": True, "final_temperature": 0.1},
            "final_temperature .* is a schedule, and the temperature is learned",
        ),
        (
            {"learn_temperature": False, "temperature_learning_rate": 0.1},
            "temperature_learning_rate .* has no effect",
        ),
    ],
)
def test_a_temperature_is_learned_or_has_a_schedule(loss: dict, message: str, small_config: Config) -> None:
    with pytest.raises(ConfigError, match=message):
        with_train(small_config, loss=loss)


def test_no_example_sees_itself_or_what_came_later(small_dataset: Dataset) -> None:
    examples = Examples.of(small_dataset, TowerInputs(small_dataset), "train")
    everything = small_dataset.interactions
    some = np.arange(0, len(examples), 37)
    batch = examples.queries(some)
    bag = batch["history"]
    assert isinstance(bag, Bag)
    targets = examples.item_rows(some)
    seen_any = 0
    for row, example in enumerate(some):
        position = examples._examples[example]
        user, time = examples._user_of[position], examples.histories.times[position]
        part = slice(everything.user_offsets[user], everything.user_offsets[user + 1])
        allowed = everything.item_row[part][
            (everything.time[part] < time)
            & (everything.split[part] == SPLITS["train"])
            & (everything.kind[part] == KINDS["positive"])
        ]
        history = bag.ids[row][bag.ids[row] >= 0].numpy() - 1
        assert set(history) <= set(allowed.tolist())
        assert len(history) == min(len(allowed), 13)
        assert targets[row] not in history or targets[row] in allowed
        seen_any += len(history)
    assert seen_any > 100


def test_validation_masks_train_and_never_reads_test(small_dataset: Dataset) -> None:
    rules = Rules.of(small_dataset, "exclude")
    log = small_dataset.interactions
    users = validation_queries(lambda: [log], TowerInputs(small_dataset), rules, 50, seed=1).queries
    assert len(users.user_rows) == 50
    everything = small_dataset.interactions
    for q, user in enumerate(users.user_rows):
        part = slice(everything.user_offsets[user], everything.user_offsets[user + 1])
        splits, items = everything.split[part], everything.item_row[part]
        relevant = users.relevant_rows[users.relevant_offsets[q] : users.relevant_offsets[q + 1]]
        masked = users.masked_rows[users.masked_offsets[q] : users.masked_offsets[q + 1]]
        assert set(relevant) == set(items[splits == SPLITS["validation"]].tolist())
        assert set(masked) == set(items[splits == SPLITS["train"]].tolist())


def test_validation_asks_with_each_user_s_own_features(small_dataset: Dataset) -> None:
    """Users who are drawn, or have nothing to validate with, leave gaps in the numbers of the others."""
    inputs, rules, log = (
        TowerInputs(small_dataset),
        Rules.of(small_dataset, "exclude"),
        small_dataset.interactions,
    )
    drawn = validation_queries(lambda: [log], inputs, rules, 50, seed=1)
    users = drawn.queries.user_rows
    assert (users != np.arange(50)).any()
    everybody = Examples(inputs, log.select(known(log, "validation", rules)))
    asked, wanted = drawn.known.latest_queries(np.arange(50)), everybody.latest_queries(users)
    assert set(asked) == {"user_id", "history", "genre_profile"}
    for name, value in wanted.items():
        for one, other in zip(tensors_of(asked[name]), tensors_of(value), strict=True):
            assert torch.equal(one, other), name
    assert len(set(tensors_of(asked["user_id"])[0].flatten().tolist())) == 50


def tensors_of(value: object) -> list[torch.Tensor]:
    return [value.ids, value.weights] if isinstance(value, Bag) else [value]


def test_known_positives_are_those_of_the_fitted_split(small_dataset: Dataset) -> None:
    examples = Examples.of(small_dataset, TowerInputs(small_dataset), "train")
    some = np.concatenate([np.arange(0, 900, 90), [-1]])
    train = small_dataset.interactions.select(small_dataset.interactions.split == SPLITS["train"])
    pairs = set(zip(train.user_row.tolist(), train.item_row.tolist(), strict=True))
    among = np.array([3, 5, 3, -1, 200, 17, 41, 60])
    for asked in (among, among, None):  # nothing is left over from the call before
        offsets, rows = examples.known_positives(some, asked)
        wanted = set(range(small_dataset.num_items)) if asked is None else set(asked.tolist())
        for q, user in enumerate(examples.user_rows(some)):
            expected = sorted(item for who, item in pairs if who == user and item in wanted)
            assert sorted(rows[offsets[q] : offsets[q + 1]].tolist()) == expected
        assert offsets[-1] == offsets[-2] == len(rows) > 5  # padding has none


@pytest.mark.parametrize("unchosen", ["negative", "new"])
def test_drawn_negatives_bury_what_nobody_chose_and_nothing_that_comes_later(
    unchosen: str, small_values: Callable[..., dict], tmp_path: Path
) -> None:
    values = small_values(tmp_path)
    values["data"]["source"] |= {"num_items": 400, "num_interactions": 1_500}
    config = parse_config(values)
    dataset = prepare(config)
    negatives = {"uniform": 200, "unchosen": unchosen}
    trainer = Trainer(with_train(config, negatives=negatives), dataset, World(), "train")
    for _ in range(3):
        trainer.run_epoch()
    examples = Examples.of(dataset, trainer.inputs, "train")
    never = examples.item_counts() == 0
    assert never.sum() > 3
    queries = trainer.model.encode_queries(examples.latest_queries(np.arange(50))).numpy()

    def score(batch: FeatureBatch) -> float:
        return float((queries @ trainer.model.encode_items(batch).numpy().T).mean())

    in_catalogue = trainer.inputs.items(np.flatnonzero(never))
    later = {**in_catalogue, "item_id": forget(in_catalogue["item_id"], torch.ones(never.sum()) > 0)}
    chosen = score(trainer.inputs.items(np.flatnonzero(~never)))
    assert score(later) > chosen - 0.1
    if unchosen == "negative":
        assert score(in_catalogue) < score(later) - 0.05
    else:
        assert score(in_catalogue) == pytest.approx(score(later))


@pytest.mark.parametrize("unchosen", ["negative", "new"])
def test_a_query_s_own_negative_that_nobody_chose_teaches_the_unknown_id_nothing(
    unchosen: str, small_values: Callable[..., dict], tmp_path: Path
) -> None:
    values = small_values(tmp_path)
    values["data"]["source"] |= {"num_items": 400, "num_interactions": 1_500}
    values["features"]["item"][0]["unknown_rate"] = 1e-9
    config = parse_config(values)
    negatives = {"mined": {"per_query": 1}, "unchosen": unchosen}
    trainer = Trainer(with_train(config, negatives=negatives), prepare(config), World(), "train")
    never = np.flatnonzero(trainer.source.item_counts() == 0)
    trainer.assemble.mined = np.full((trainer.source.rows_per_epoch, 1), never[-1], np.int32)
    share = next(trainer.source.shares(0))
    batch = trainer.assemble(share, 0)
    ids = batch.items.features["item_id"].ids[batch.num_shared :, 0]
    assert ids.tolist() == ([never[0] + 1] * len(share.rows) if unchosen == "negative" else [])


@pytest.mark.parametrize(("rate", "with_features"), [(0.05, True), (0.0, True), (0.05, False)])
def test_an_item_that_no_example_has_is_encoded_by_its_features(
    rate: float, with_features: bool, small_values: Callable[..., dict], tmp_path: Path
) -> None:
    values = small_values(tmp_path)
    values["data"]["source"] |= {"num_items": 400, "num_interactions": 1_500}
    values["features"]["item"][0]["unknown_rate"] = rate
    if not with_features:
        # Their vectors would all be the same.
        del values["features"]["item"][1:]
        values["features"]["query"] = [f for f in values["features"]["query"] if f["type"] != "profile"]
    config = parse_config(values)
    dataset = prepare(config)
    trainer = Trainer(config, dataset, World(), "train")
    counts = trainer.source.item_counts()
    assert 0 < (counts == 0).sum() < 300
    trainer.run_epoch()

    def vectors(forgotten: bool) -> torch.Tensor:
        batch = trainer.inputs.items(np.arange(len(counts)))
        if forgotten:
            batch["item_id"] = forget(batch["item_id"], torch.ones(len(counts), dtype=torch.bool))
        return trainer.model.encode_items(batch)

    same = torch.isclose(vectors(False), vectors(True)).all(1).numpy()
    np.testing.assert_array_equal(same, (counts == 0) & (rate > 0) & with_features)
