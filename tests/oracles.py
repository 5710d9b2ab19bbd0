"""Slow reference implementations from the definitions. They import nothing from the code they check."""

import math

import numpy as np


def recall_at_k(ranked, relevant, k):
    """Hits in the first k over the number of relevant items; ``ranked`` a list, ``relevant`` a set."""
    hits = 0
    for item in ranked[:k]:
        if item in relevant:
            hits += 1
    return hits / len(relevant)


def ndcg_at_k(ranked, relevant, k):
    """Binary gain, discount log2(rank + 1) with rank from 1, ideal list of min(k, relevant) hits."""
    gained = 0.0
    for rank, item in enumerate(ranked[:k], start=1):
        if item in relevant:
            gained += 1 / math.log2(rank + 1)
    ideal = 0.0
    for rank in range(1, min(k, len(relevant)) + 1):
        ideal += 1 / math.log2(rank + 1)
    return gained / ideal


def mrr_at_k(ranked, relevant, k):
    """One over the rank of the first hit, 0 without one."""
    for rank, item in enumerate(ranked[:k], start=1):
        if item in relevant:
            return 1 / rank
    return 0.0


def hit_rate_at_k(ranked, relevant, k):
    """1 with a hit in the first k, else 0."""
    return 1.0 if any(item in relevant for item in ranked[:k]) else 0.0


def average_precision_at_k(ranked, relevant, k):
    """Precisions at the ranks of the hits in the first k, over the number of relevant items."""
    total = 0.0
    for rank, item in enumerate(ranked[:k], start=1):
        if item in relevant:
            total += sum(other in relevant for other in ranked[:rank]) / rank
    return total / len(relevant)


def precision_at_k(ranked, relevant, k):
    """Hits in the first k over k."""
    return sum(item in relevant for item in ranked[:k]) / k


def gini(counts):
    """Mean absolute difference of all pairs over twice the mean."""
    total = sum(abs(a - b) for a in counts for b in counts)
    return total / (2 * len(counts) * sum(counts))


def coverage_at_k(lists, num_items, k):
    """Share of the catalogue in any top k."""
    found = set()
    for ranked in lists:
        found.update(ranked[:k])
    return len(found) / num_items


def share_same_top10(lists):
    """Share of lists whose first ten are the most common first ten."""
    counts = {}
    for ranked in lists:
        top = tuple(ranked[:10])
        counts[top] = counts.get(top, 0) + 1
    return max(counts.values()) / len(lists)


def top_k(queries, item_vectors, masked, k):
    """Lists of item rows by dot product in float64, best first, equal scores by row, without masked items."""
    lists = []
    for query, without in zip(np.asarray(queries, float), masked, strict=True):
        scored = []
        for row, vector in enumerate(np.asarray(item_vectors, float)):
            if row not in without:
                scored.append((-float(sum(q * v for q, v in zip(query, vector, strict=True))), row))
        lists.append([row for _, row in sorted(scored)[:k]])
    return lists


def pad(lists, width):
    """Lists of item rows as one int64 array, -1 behind each."""
    padded = np.full((len(lists), width), -1, dtype=np.int64)
    for row, items in enumerate(lists):
        padded[row, : len(items)] = items
    return padded


def csr(sets):
    """Sets (or lists) of item rows as offsets and rows."""
    offsets = np.cumsum([0, *(len(s) for s in sets)]).astype(np.int64)
    return offsets, np.array([row for s in sets for row in s], dtype=np.int64)
