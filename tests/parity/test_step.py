"""A whole step against plain autograd on dense tables and a dense matrix of logits, in value and gradient."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity.workers import assert_close, step_results
from tests.streams import with_weights
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.training.assembly import Batch
from twotower.training.collectives import World
from twotower.training.loop import Trainer

LOG_Q = 0.8


def known_items(trainer: Trainer, batch: Batch) -> list[set[int]]:
    everything = trainer.source.examples
    offsets, rows = everything.known_positives(batch.share.rows)
    return [set(rows[offsets[q] : offsets[q + 1]].tolist()) for q in range(len(offsets) - 1)]


def oracle(trainer: Trainer, batch: Batch, memory: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The loss as written in the documentation, one query at a time, in float64."""
    config, model = trainer.config, trainer.model
    negatives = config.train.negatives
    b, drawn = len(batch.share.rows), negatives.uniform + negatives.popular
    queries = model.towers.query(model.inputs("query", batch.queries.features), batch.queries.keys).double()
    items = model.towers.item(model.inputs("item", batch.items.features), batch.items.keys).double()
    temperature = model.log_temperature.double().exp()
    rows = batch.share.item_rows[0]
    users = batch.share.user_rows[0]
    known = known_items(trainer, batch)
    counts = trainer.source.item_counts()
    drawn_share = np.maximum(counts, 1) / np.maximum(counts, 1).sum()
    examples_share = counts / counts.sum()
    shared = np.concatenate([rows, trainer.assemble._drawn(batch_step(trainer))[0], memory[1].numpy()])
    candidates = torch.cat([items[: b + drawn], memory[0].double()])
    filled = int((memory[1] >= 0).sum())
    valid = rows >= 0
    expected = (valid.sum() - 1 + filled) * examples_share + negatives.popular * drawn_share
    expected += negatives.uniform / len(counts)
    weight = trainer.source.examples.weights(batch.share.rows).astype(float)
    assert len(set(weight[valid])) > 2
    mined = trainer.assemble.mined
    assert mined is not None
    own = np.where(valid[:, None], mined[np.maximum(batch.share.rows, 0)], -1)
    place = iter(range(b + drawn, len(items)))
    own_vectors = {(q, h): items[next(place)] for q, h in zip(*np.nonzero(own >= 0), strict=True)}
    total = torch.zeros((), dtype=torch.float64)
    per_user = {}
    for q in np.flatnonzero(valid):
        logits, counts_as = [], []
        for c, item in enumerate(shared):
            same = item == rows[q] and c != q
            if item < 0 or same or (c != q and (item in known[q] or item in own[q])):
                continue
            score = queries[q] @ candidates[c] / temperature
            if c == q:
                positive = score
                if config.train.loss.kind != "softmax":
                    continue
                positive = positive - LOG_Q * np.log(expected[item])
            logits.append(score)
            counts_as.append(-LOG_Q * np.log(expected[item]))
        for (at, _h), vector in own_vectors.items():
            if at == q:
                logits.append(queries[q] @ vector / temperature)
                counts_as.append(np.log(negatives.own_weight))
        z, shift = torch.stack(logits), torch.tensor(counts_as, dtype=torch.float64)
        if config.train.loss.kind == "bce":
            # Expected negatives of a step over the other items of the catalogue.
            rate = (valid.sum() - 1 + filled + drawn) / (len(counts) - 1)
            beta = rate * (0.6 * (1 - 1 / rate) + 1 / rate)
            count = (shift + LOG_Q * np.log(rate)).exp()
            loss = -beta * torch.sigmoid(positive).log() - (count * torch.sigmoid(-z).log()).sum()
            total = total + weight[q] * loss
            continue
        if config.train.loss.kind == "bsl":
            per_user.setdefault(int(users[q]), []).append((weight[q], positive / 0.7))
            total = total + weight[q] * 1.3 * torch.logsumexp(z + shift, 0)
            continue
        total = total + weight[q] * (torch.logsumexp(z + shift, 0) - positive)
        # The item looks for its query; other queries of its owners are none of its negatives.
        back = []
        for other in np.flatnonzero(valid):
            if other != q and (rows[other] == rows[q] or rows[q] in known[other]):
                continue
            user_share = LOG_Q * np.log(trainer.source.examples.user_counts(batch.share.rows)[other])
            back.append(items[q] @ queries[other] / temperature - user_share)
            if other == q:
                mine = back[-1]
        total = total + weight[q] * (torch.logsumexp(torch.stack(back), 0) - mine)
    assert len({int(u) for u in users[valid]}) < valid.sum(), "no user twice: nothing of his was left out"
    for mine in per_user.values():
        share = sum(w for w, _ in mine)
        total = total - 0.7 * share * torch.log(sum(w * x.exp() for w, x in mine) / share)
    return total / (2 if config.train.loss.symmetric else 1) / weight.sum()


def batch_step(trainer: Trainer) -> int:
    return trainer.source.steps_per_epoch - 1


LOSSES: dict[str, dict[str, Any]] = {
    "softmax": {"symmetric": True},
    "bsl": {"learn_temperature": False, "bsl": {"positive_temperature": 0.7, "negative_power": 1.3}},
    "bce": {"bce": {"calibration": 0.6}},
}


@pytest.mark.parametrize(("kind", "chunk"), [("softmax", None), ("softmax", 19), ("bsl", 19), ("bce", None)])
def test_a_step_equals_the_oracle(
    kind: str, chunk: int | None, small_config: Config, small_dataset: Dataset
) -> None:
    torch.set_num_threads(1)
    values = copy.deepcopy(small_config.to_json())
    values["model"]["query_tower"]["dropout"] = 0.2
    values["train"] |= {
        "global_batch_size": 61,
        "tower_chunk_size": chunk,
        "loss": {"kind": kind, "log_q": LOG_Q, "temperature": 0.2, **LOSSES[kind]},
        "negatives": {
            "uniform": 8,
            "popular": 5,
            "memory": 80,
            "memory_start": 1,
            "own_weight": 7.0,
            "mined": {"per_query": 2, "skip": 2, "window": 20},
        },
    }
    trainer = Trainer(parse_config(values), with_weights(small_dataset, [0.25, 1, 3, 7, 0]), World(), "train")
    rest = trainer.source.rows_per_epoch % 61
    assert 3 < rest < 61
    step_results(trainer, [0], update=False)  # fills the memory, and gives mined lists
    memory = trainer._memory.vectors.clone(), trainer._memory.item_rows.clone()
    assert (memory[1] < 0).sum() > 0
    step = batch_step(trainer)
    batch = trainer.assemble(next(trainer.source.shares(0, step)), step)
    gradients = trainer.compute.gradients(batch)
    found = {"loss": torch.tensor(gradients.loss)}
    found |= {n: p.grad.clone() for n, p in trainer.model.towers.named_parameters() if p.grad is not None}
    found["temperature"] = trainer.model.log_temperature.grad.clone()
    for name, (ids, rows) in gradients.tables.items():
        found[name] = torch.zeros_like(trainer.model.tables[name])
        found[name][ids] = rows
    trainer.model.zero_grad()
    loss = oracle(trainer, batch, memory)
    loss.backward()
    expected = {"loss": loss.detach()}
    expected |= {n: p.grad for n, p in trainer.model.towers.named_parameters() if p.grad is not None}
    expected["temperature"] = trainer.model.log_temperature.grad
    expected |= {n: p.grad for n, p in trainer.model.tables.items()}
    assert_close(found, expected)
