"""Nothing imports itself by way of others: a file is read, tested and moved without the ones above it."""

from __future__ import annotations

import graphlib

import grimp

ROOTS = ("twotower", "serve", "jobs", "benchmarks")


def test_no_circle_between_files() -> None:
    # import-linter looks at siblings; a file that imports the package it is in is a circle too. Imports for
    # type checkers count, as they do there.
    graph = grimp.build_graph(*ROOTS, cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    assert len(imports) > 300
    graphlib.TopologicalSorter(imports).prepare()
