"""Items made ahead by a thread: in order, as many as are taken and no more, errors where they are used."""

import threading
from collections.abc import Iterator

import pytest

from twotower.training.ahead import made_ahead


def test_items_come_in_order_from_another_thread() -> None:
    makers = set()

    def items() -> Iterator[int]:
        for i in range(20):
            makers.add(threading.get_ident())
            yield i

    assert list(made_ahead(items(), 3)) == list(range(20))
    assert makers != {threading.get_ident()}


def test_stopped_in_the_middle_it_has_made_a_fixed_number() -> None:
    """Ranks whose items are collectives would wait for each other otherwise."""
    for _ in range(20):
        made = []

        def items(made: list[int] = made) -> Iterator[int]:
            for i in range(100):
                made.append(i)
                yield i

        ahead = made_ahead(items(), 2)
        assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
        ahead.close()
        assert len(made) == 7


def test_an_error_is_raised_where_the_item_is_used() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("row 7 is damaged")

    ahead = made_ahead(items(), 2)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="row 7"):
        next(ahead)
