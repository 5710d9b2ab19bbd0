"""One toy of everything that can be added (docs/extending.md), registered as the built-in ones are."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import Field

import twotower as tt
from jobs.reference import config_reference
from serve.fused import FusedService
from serve.schemas import parse_retrieve
from tests.conftest import ROOT
from twotower.config import LimitsConfig
from twotower.config.data import SOURCES, Source, SourceSection
from twotower.config.evaluation import BASELINES
from twotower.config.index_kinds import INDEX_KINDS, IndexKind
from twotower.config.losses import LOSSES, LossSection
from twotower.config.splits import SPLIT_KINDS, SplitKind
from twotower.data.chunks import Chunk, SideTable
from twotower.errors import ConfigError, NotAllowedError
from twotower.evaluation.baselines import PopularityRanker
from twotower.evaluation.metrics import METRICS
from twotower.features import FEATURES, ColumnFeature, feature_type
from twotower.features.base import Fit, is_number
from twotower.features.numbers import as_number_column, finite_numbers
from twotower.jsonfiles import check_shape
from twotower.retrieval.query import Query
from twotower.retrieval.request import InvalidQueryError, parse, query_of, request_model
from twotower.retrieval.wire import Http
from twotower.schema import SPLITS, FittedFeature, IdFeature

NUM_USERS, NUM_ITEMS, EACH = 24, 20, 10


class QuantileFeature(ColumnFeature):
    """A number as one of several ranges that hold equally many rows, embedded."""

    profiled: ClassVar[bool] = True
    store_rank: ClassVar[int] = 3

    type: Literal["quantile"] = "quantile"
    dim: Annotated[int, Field(ge=1)] = 4
    """Width of the embedding."""
    ranges: Annotated[int, Field(ge=2)] = 4
    """Number of ranges."""

    def width(self, items: Mapping[str, Any]) -> int:
        return self.dim

    def table_rows(self, side: Any, learned: Any, counts: Any) -> int:
        return self.ranges + 1

    def profile_width(self, learned: Any) -> int:
        return self.ranges + 1

    @classmethod
    def store(cls, side: Any, name: str, column: Any, specs: Any) -> Any:
        return as_number_column(f"features.{side} column {name!r}", column)

    def fit(self, side: Any, column: Any, given: Any) -> Fit:
        edges = np.linspace(0, 1, self.ranges + 1)[1:-1]
        return {"more": {"edges": np.quantile(finite_numbers(column.drop_null()), edges).tolist()}}

    def encode(self, learned: Any, column: Any) -> Any:
        values = finite_numbers(column)
        rows = np.searchsorted(learned.more["edges"], values, side="right") + 1
        return np.where(np.isfinite(values), rows, -1).astype(np.int32)[:, None]

    def parse(self, learned: Any, value: Any) -> Any:
        if not is_number(value):
            raise ValueError("no number")
        return float(value)

    @property
    def allowed(self) -> str:
        return "a number, or null"


class HingeSection(LossSection):
    """The mean of what negatives are above the positive less a margin."""

    implementation: ClassVar[Any] = staticmethod(lambda settings: hinge)


calls: list[str] = []


def hinge(
    queries_QD: torch.Tensor,
    candidates_CD: torch.Tensor,
    positive_Q: torch.Tensor,
    temperature: torch.Tensor,
    log_q_C: torch.Tensor,
    candidate_ids_C: torch.Tensor,
    weight_Q: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    calls.append("hinge")
    scores_QC = queries_QD @ candidates_CD.T / temperature
    positive_Q1 = scores_QC.gather(1, positive_Q[:, None])
    other_QC = (candidate_ids_C >= 0) & (candidate_ids_C != candidate_ids_C[positive_Q][:, None])
    above_QC = (1 + scores_QC - positive_Q1).clamp(min=0) * other_QC
    return (above_QC.sum(1) / other_QC.sum(1).clamp(min=1) * weight_Q).sum()


def every_fifth(rows: Any, config: Any, seed: int) -> Any:
    """Of five interactions of a user the fourth validates and the fifth is test."""
    user = rows.columns["user_row"]
    place = np.arange(len(user)) - np.searchsorted(user, user)
    split = np.full(len(user), SPLITS["train"], np.int8)
    split[place % 5 == 3], split[place % 5 == 4] = SPLITS["validation"], SPLITS["test"]
    return split


class PairsSource(SourceSection):
    """Users who take the items of their half."""

    implementation: ClassVar[Any] = staticmethod(lambda source, cache, mirror: Pairs(source))

    kind: Literal["pairs"]
    each: Annotated[int, Field(ge=1)]
    """Interactions of each user."""


class Pairs:
    """The source of ``PairsSource``."""

    has_times, time_unit, value_range, notice = True, "s", None, None

    def __init__(self, source: PairsSource) -> None:
        self.source, self.num_rows = source, NUM_USERS * source.each

    def signature(self) -> dict[str, Any]:
        return {"pairs": 1}

    def facts(self) -> dict[str, Any]:
        return {"kind": "pairs"}

    def item_table(self, bad: Any) -> SideTable:
        numbers = np.arange(NUM_ITEMS)
        price = pa.array([None if n == 7 else float(n) for n in numbers])
        ids = [f"i{n}" for n in numbers]
        return SideTable("pairs", pa.table({"item_id": ids, "title": ids, "price": price}))

    def user_table(self, bad: Any) -> SideTable:
        ids = [f"u{n}" for n in range(NUM_USERS)]
        return SideTable("pairs", pa.table({"user_id": ids, "age": np.arange(NUM_USERS) + 20}))

    def chunks(self, bad: Any) -> Iterator[Chunk]:
        rng, half = np.random.default_rng(3), NUM_ITEMS // 2
        items = [
            u % 2 * half + i for u in range(NUM_USERS) for i in rng.permutation(half)[: self.source.each]
        ]
        count = len(items)
        users = np.repeat(np.arange(NUM_USERS), self.source.each)
        yield Chunk(
            file="pairs",
            rows=np.arange(1, count + 1),
            user=pa.array([f"u{n}" for n in users]),
            item=pa.array([f"i{n}" for n in items]),
            time=pa.array(np.arange(count)),
        )


class Unpopular:
    """The least popular item first."""

    def against(self, matrix: Any, config: Any) -> str | None:
        return None

    def fit(self, folder: Path, given: Any) -> dict[str, float | int | str]:
        return {"positives": int(given.matrix.nnz)}

    def ranker(self, folder: Path, known: Any, order: Any) -> Any:
        return PopularityRanker(np.ascontiguousarray(order[::-1]))


def f1(hits: Any) -> Any:
    """The harmonic mean of precision and recall."""
    return 2 * hits.found[:, hits.at] / (hits.cuts + hits.total[:, None])


@pytest.fixture(scope="module")
def toys() -> Iterator[None]:
    # Whoever has read manifests before reads those of what comes later too.
    check_shape({"kind": "generated"}, Source, "a manifest", "")
    feature_type(QuantileFeature)
    LOSSES.add("hinge", HingeSection)
    SPLIT_KINDS.add("every_fifth", SplitKind(every_fifth, "The fifth of five interactions is test."))
    SOURCES.add("pairs", PairsSource)
    INDEX_KINDS.add("half", IndexKind(lambda n, d: "SQfp16", lambda d: 2 * d))
    BASELINES.add("unpopular", Unpopular())
    METRICS.add("f1", f1)
    yield
    for registry in (FEATURES, LOSSES, SPLIT_KINDS, SOURCES, INDEX_KINDS, BASELINES, METRICS):
        registry.remove(registry.names[-1])


def test_an_entry_that_the_configuration_can_not_be_built_with_is_not_kept() -> None:
    class Shapeless(SourceSection):
        pass

    before = SOURCES.names
    with pytest.raises(Exception, match="kind"):
        SOURCES.add("shapeless", Shapeless)
    assert SOURCES.names == before
    assert tt.configure({"data.source.kind": "generated"}).data.source.kind == "generated"


def settings(root: Path, **values: Any) -> dict[str, Any]:
    history = {"name": "history", "type": "history", "dim": 8}
    query = [
        history,
        {"name": "prices", "type": "profile", "of": "price"},
        {"name": "age", "type": "quantile", "dim": 3, "ranges": 5},
    ]
    return {
        "name": "toys",
        "storage.root": str(root),
        "data.source": {"kind": "pairs", "each": EACH},
        "split.kind": "every_fifth",
        "features.query": query,
        "features.item": [{"name": "item_id", "type": "id", "dim": 8}, {"name": "price", "type": "quantile"}],
        "model.embedding_dim": 8,
        "train.loss.kind": "hinge",
        "train.epochs": 2,
        "train.fit": "train",
        "train.global_batch_size": 24,
        "train.num_workers": 1,
        "index.kind": "half",
        "index.num_shards": 1,
        "evaluation.ks": [5],
        "evaluation.baselines": ["unpopular"],
        "evaluation.latency_requests": 5,
        "evaluation.examples": 0,
        **values,
    }


@pytest.fixture(scope="module")
def way(toys: None, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Prepare, train, build, evaluate and open, all with toys; do not change it."""
    config = tt.configure(settings(tmp_path_factory.mktemp("toys")))
    data = tt.prepare(config)
    checkpoints = tt.train(config, data)
    generation = tt.build(config, data, checkpoints)
    report = tt.evaluate(config, data, checkpoints, generation)
    return SimpleNamespace(config=config, data=data, generation=generation, report=report)


def test_a_source_and_a_split_make_the_dataset(way: SimpleNamespace) -> None:
    counts = way.data.counts
    assert counts["interactions"] == NUM_USERS * EACH
    assert counts["splits"] == {"train": NUM_USERS * 6, "validation": NUM_USERS * 2, "test": NUM_USERS * 2}
    assert way.data.num_catalogue_items == NUM_ITEMS
    # The split does not use the seed, so another one trains on the same dataset.
    again = tt.prepare(tt.configure({"seed": 99}, base=way.config))
    assert again.path == way.data.path


def test_a_split_says_what_it_needs(toys: None, tmp_path: Path) -> None:
    SPLIT_KINDS.add("late", SplitKind(every_fifth, "Late ones.", needs_times=True))
    try:
        source = {"kind": "files", "interactions": "x.csv"}
        with pytest.raises(ConfigError, match="late needs times.*use random or given or every_fifth"):
            tt.configure(settings(tmp_path, **{"data.source": source, "split.kind": "late"}))
    finally:
        SPLIT_KINDS.remove("late")


def test_a_feature_is_learned_stored_and_read(way: SimpleNamespace) -> None:
    price = next(f for f in way.data.schema.item if f.spec.name == "price")
    assert price.more["edges"] == np.quantile(np.delete(np.arange(20.0), 7), [0.25, 0.5, 0.75]).tolist()
    assert type(way.data.schema).from_json(way.data.schema.to_json()) == way.data.schema
    retriever = tt.Retriever.open(way.generation)
    columns = retriever.generation.user_columns["age"]
    assert np.bincount(columns[:, 0]).tolist() == [0, 5, 5, 4, 5, 5]
    assert retriever.generation.profiles["prices"].shape == (NUM_ITEMS, 5)


def test_a_feature_is_read_from_a_request_over_http(way: SimpleNamespace) -> None:
    service = FusedService(tt.Retriever.open(way.generation), 100, 1, {})
    try:

        def ask(**values: Any) -> dict[str, Any]:
            query = parse_retrieve(json.dumps({"k": 3, **values}).encode(), 100, LimitsConfig())
            return json.loads(asyncio.run(service.retrieve(query)))

        young, old = (ask(features={"age": age}) for age in (21, 42))
        assert young["strategy"] == "features"
        assert young["items"] != old["items"]
        assert ask(features={"age": 22})["items"] == young["items"]
        with pytest.raises(NotAllowedError, match="'age' has the value 'old'; allowed: a number, or null"):
            ask(features={"age": "old"})
    finally:
        service.close()


def test_a_loss_trains_the_model(way: SimpleNamespace) -> None:
    assert calls
    with pytest.raises(ConfigError, match="softmax over the batch's queries, and kind is hinge"):
        tt.configure({"train.loss.symmetric": True}, base=way.config)


def test_an_index_kind_is_built(way: SimpleNamespace) -> None:
    shards = tt.Retriever.open(way.generation).generation.manifest["shards"]
    assert {shard["factory"] for shard in shards} == {"SQfp16"}


def test_a_baseline_and_a_metric_are_in_the_report(way: SimpleNamespace) -> None:
    found = way.report.metrics
    assert 0 <= found["unpopular_f1@5"] <= found["f1@5"] <= 1
    recall, precision = found["recall@5"], found["precision@5"]
    # All users have two test items, so the mean of the harmonic means is that of the means.
    assert found["f1@5"] == pytest.approx(2 * recall * precision / (recall + precision))
    page = (Path(way.report.path) / "report.html").read_text()
    for text in ("F1", "Unpopular", "The fifth of five interactions is test."):
        assert text in page


@dataclass(frozen=True, kw_only=True)
class ToyQuery(Query):
    """A query with one more field."""

    min_score: Annotated[
        float | None,
        Http(
            Annotated[float, Field(ge=-1, le=1)] | None,
            "Leave out items with a lower score.",
            "a number from -1 to 1; or null",
        ),
    ] = None


def test_an_http_field_is_described_once() -> None:
    model = request_model(ToyQuery)
    query = query_of(parse({"k": 3, "history": ["a"], "min_score": 0.5}, 10, model))
    assert isinstance(query, ToyQuery)
    assert (query.min_score, query.history[0].item_id) == (0.5, "a")
    with pytest.raises(
        InvalidQueryError, match="min_score: 3 is not allowed; allowed: a number from -1 to 1"
    ):
        parse({"k": 3, "min_score": 3}, 10, model)
    schema = model.model_json_schema()["properties"]["min_score"]
    assert schema["description"] == "Leave out items with a lower score."
    with pytest.raises(InvalidQueryError, match="min_score: there is no such key"):
        parse_retrieve(b'{"k": 3, "min_score": 0.5}', 10, LimitsConfig())


def test_help_and_messages_name_what_was_added(toys: None, tmp_path: Path) -> None:
    text = config_reference()
    for line in ("type: quantile", "data.source[pairs].each", "softmax | bsl | bce | slatk | hinge"):
        assert line in " ".join(text.split())
    with pytest.raises(ConfigError, match="did you mean 'quantile'"):
        tt.configure(settings(tmp_path, **{"features.item": [{"name": "price", "type": "quantil"}]}))
    item = [{"name": "price", "type": "quantile", "ranges": 1}]
    with pytest.raises(ConfigError, match=r"features.item.0.ranges: must be an integer of at least 2"):
        tt.configure(settings(tmp_path, **{"features.item": item}))
    with pytest.raises(ValueError, match="'quantile' is already a type of feature"):
        feature_type(QuantileFeature)


def test_what_is_taken_out_is_refused_again(toys: None) -> None:
    LOSSES.add("brief", HingeSection)
    assert tt.configure({"train.loss.kind": "brief"}).train.loss.kind == "brief"
    LOSSES.remove("brief")
    with pytest.raises(ConfigError, match=r"must be one of softmax, bsl, bce, slatk, hinge \(got"):
        tt.configure({"train.loss.kind": "brief"})


def test_what_a_type_learns_beside_the_usual_is_written_only_where_there_is_some() -> None:
    plain, more = (FittedFeature(spec=IdFeature(name="id"), more=values) for values in ({}, {"edges": [1.5]}))
    assert list(plain.model_dump()) == ["spec", "values", "mean", "std"]
    assert FittedFeature.model_validate(more.model_dump()) == more != plain


def test_types_are_named_by_their_files_alone() -> None:
    # Ids, histories and profiles are what the model itself is about; the others are only read from columns.
    types = "|".join(kind.__name__ for kind in FEATURES if kind.reads == "column")
    told = {
        str(path.relative_to(ROOT))
        for folder in ("twotower", "serve", "jobs")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(rf"\b({types})\b", path.read_text())
    }
    assert {path for path in told if not path.startswith("twotower/features/")} <= {"twotower/schema.py"}


def test_the_page_names_files_and_names_that_exist() -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    for path in re.findall(r"`((?:twotower|serve|jobs|tests)/[\w./]+)`", page):
        assert (ROOT / path).exists(), path
    registries = {"FEATURES", "LOSSES", "SPLIT_KINDS", "SOURCES", "INDEX_KINDS", "BASELINES", "METRICS"}
    assert registries <= set(re.findall(r"`(\w+)`", page))
