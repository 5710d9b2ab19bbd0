"""Files as people have them, in shapes that differ from each other, for ``twotower init``."""

from __future__ import annotations

import csv
import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

GENRES = ["Comedy", "Drama", "Sci-Fi", "Horror", "Western"]
COUNTRIES = ["United Kingdom", "France", "Germany"]
WORDS = ["red", "blue", "large", "small", "wooden", "paper", "lantern", "mug", "clock", "bag"]


def _write(
    path: Path, header: list[str], rows: list[list[Any]], delimiter: str = ",", encoding: str = "utf-8"
) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding=encoding) as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerow(header)
        table.writerows(rows)
    return str(path)


def movielens(folder: Path) -> list[str]:
    """Ratings and movies, with links (another table of movies) and tags (another log)."""
    rng = np.random.default_rng(1)
    movies = rng.permutation(np.arange(1, 2_000))[:150]
    pairs = {
        (int(u), int(m)) for u, m in zip(rng.integers(1, 61, 2_500), rng.choice(movies, 2_500), strict=True)
    }
    log = [
        [u, m, float(rng.integers(1, 11)) / 2, int(1_100_000_000 + rng.integers(0, 3e8))]
        for u, m in sorted(pairs)
    ]
    titles = [
        [
            m,
            f"The {WORDS[m % 10]} {WORDS[m % 7]}, Part {m} ({1950 + m % 60})",
            "|".join(rng.choice(GENRES, 1 + m % 3, replace=False)),
        ]
        for m in sorted(movies.tolist())
    ]
    links = [[m, 100_000 + 7 * m, 3 * m] for m, *_ in titles]
    tags = [[u, m, WORDS[m % 10], t] for u, m, _, t in log[:80]]
    return [
        _write(folder / "links.csv", ["movieId", "imdbId", "tmdbId"], links),
        _write(folder / "movies.csv", ["movieId", "title", "genres"], titles),
        _write(folder / "ratings.csv", ["userId", "movieId", "rating", "timestamp"], log),
        _write(folder / "tags.csv", ["userId", "movieId", "tag", "timestamp"], tags),
    ]


def retail(folder: Path) -> list[str]:
    """Lines of invoices: customers as floats with gaps, months before days, returns, no item table."""
    rng = np.random.default_rng(2)
    rows: list[list[Any]] = []
    for invoice in range(536_365, 536_365 + 500):
        customer = "" if rng.random() < 0.2 else f"{12_346 + int(rng.integers(0, 80))}.0"
        day = datetime.datetime(2011, 1, 1, 8) + datetime.timedelta(minutes=int(rng.integers(0, 300_000)))
        for _ in range(int(rng.integers(1, 7))):
            item = int(rng.zipf(1.5)) % 120
            code, name = (
                f"{20_000 + item}{'A' if item % 7 == 0 else ''}",
                f"{WORDS[item % 10].upper()} {WORDS[item % 7].upper()} £{item}",
            )
            count = -1 if rng.random() < 0.03 else int(rng.integers(1, 24))
            rows.append(
                [
                    invoice,
                    code,
                    name,
                    count,
                    day.strftime("%m/%d/%Y %H:%M"),
                    round(0.5 + item / 9, 2),
                    customer,
                    COUNTRIES[(int(float(customer or 0))) % 3],
                ]
            )
    header = [
        "InvoiceNo",
        "StockCode",
        "Description",
        "Quantity",
        "InvoiceDate",
        "UnitPrice",
        "CustomerID",
        "Country",
    ]
    return [_write(folder / "online_retail.csv", header, rows, encoding="cp1252")]


def clickstream(folder: Path) -> list[str]:
    """Events of visitors in epoch milliseconds, in several files of one folder, and products in Parquet."""
    rng = np.random.default_rng(3)
    kinds = ["view", "view", "view", "addtocart", "transaction", "impression"]
    rows = [
        [
            int(1_433_221_332_117 + rng.integers(0, 10**10)),
            int(rng.integers(0, 300)),
            str(rng.choice(kinds)),
            int(rng.integers(0, 90)) + 10**6,
            "",
        ]
        for _ in range(3_000)
    ]
    paths = [
        _write(
            folder / f"events-2015-0{n}.csv",
            ["timestamp", "visitorid", "event", "itemid", "transactionid"],
            rows[n::3],
        )
        for n in range(3)
    ]
    ids = np.arange(100) + 10**6
    products = {
        "itemid": ids,
        "category": [f"c{i % 9}" for i in range(100)],
        "price": np.exp(rng.normal(3, 2, 100)),
        "available": [bool(i % 5) for i in range(100)],
        "tags": [[WORDS[i % 10], WORDS[i % 7]] for i in range(100)],
        "image": [[float(i), 0.5, 1.0, -1.0] for i in range(100)],
        "added": [datetime.datetime(2015, 1, 1) + datetime.timedelta(days=i) for i in range(100)],
    }
    pq.write_table(pa.table(products), folder / "products.parquet")
    return [*paths, str(folder / "products.parquet")]


def semicolons(folder: Path) -> list[str]:
    """A shop's German export: semicolons, a byte order mark, days as 31.12.2023, and a table of customers."""
    rng = np.random.default_rng(4)
    rows = []
    for _ in range(1_500):
        day = datetime.date(2023, 1, 1) + datetime.timedelta(days=int(rng.integers(0, 365)))
        rows.append(
            [
                f"K{int(rng.integers(0, 70)):05d}",
                f"A-{int(rng.integers(0, 60))}",
                day.strftime("%d.%m.%Y"),
                int(rng.integers(1, 4)),
            ]
        )
    customers = [[f"K{n:05d}", "mf"[n % 2], 20 + n % 50, ["Köln", "Bonn", "Ulm"][n % 3]] for n in range(70)]
    return [
        _write(folder / "Bestellungen.csv", ["Kunde", "Artikel", "Datum", "Menge"], rows, ";", "utf-8-sig"),
        _write(folder / "Kunden.csv", ["Kunde", "Geschlecht", "Alter", "Stadt"], customers, ";", "utf-8-sig"),
    ]


def timestamps(folder: Path) -> list[str]:
    """Plays of songs in a folder of Parquet with timestamps, and songs by name of another column."""
    rng = np.random.default_rng(5)
    folder.mkdir(parents=True, exist_ok=True)
    begin = np.datetime64("2024-03-01", "us")
    songs = [f"s{int(n):04x}" for n in rng.permutation(200)]
    for part in range(2):
        log = {
            "listener": [f"user-{n}" for n in rng.integers(0, 90, 1_200)],
            "track_id": rng.choice(songs[:180], 1_200),
            "played_at": begin + rng.integers(0, 10**12, 1_200).astype("timedelta64[us]"),
            "ms_played": rng.integers(1_000, 300_000, 1_200),
        }
        (folder / "plays").mkdir(exist_ok=True)
        pq.write_table(pa.table(log), folder / "plays" / f"part-{part}.parquet")
    catalogue = {
        "id": songs,
        "name": [f"{WORDS[n % 10]} {WORDS[n % 9]} no. {n}" for n in range(200)],
        "artist": [f"artist {n % 30}" for n in range(200)],
        "year": [1980 + n % 40 for n in range(200)],
    }
    pq.write_table(pa.table(catalogue), folder / "tracks.parquet")
    return [str(folder / "plays"), str(folder / "tracks.parquet")]


def bare(folder: Path) -> list[str]:
    """A log alone: who liked what, without times or a catalogue."""
    rng = np.random.default_rng(6)
    pairs = sorted(
        {(int(u), int(i)) for u, i in zip(rng.integers(0, 50, 900), rng.integers(0, 70, 900), strict=True)}
    )
    return [_write(folder / "likes.tsv", ["uid", "article"], [[u, f"a{i}"] for u, i in pairs], "\t")]


SHAPES = {f.__name__: f for f in (movielens, retail, clickstream, semicolons, timestamps, bare)}
