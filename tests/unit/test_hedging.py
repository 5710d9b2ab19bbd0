"""Calls to the replicas of a group: the first answer counts, the dead are left alone, and few are hedged."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from serve.hedging import CutShortError, GroupUnavailableError, Replicas, UnansweredError

LONG_S = 30.0


class Fake:
    """A replica that does as it is told."""

    def __init__(self, name: str) -> None:
        self.answer = name.encode()
        self.asked = 0
        self.given_up = 0
        self.behave: Callable[[], Awaitable[None]] = self.at_once

    async def at_once(self) -> None:
        pass

    async def never(self) -> None:
        await asyncio.Event().wait()

    async def fail(self) -> None:
        raise ConnectionResetError("gone")

    async def refuse(self) -> None:
        raise UnansweredError("this message only")

    async def __call__(self, message: bytes) -> bytes:
        self.asked += 1
        try:
            await self.behave()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        return self.answer


async def warm(group: Replicas, calls: int = 100) -> None:
    """Let the group learn how long a call takes."""
    for _ in range(calls):
        await group.call(b"x", LONG_S)


def test_calls_go_to_replicas_in_turn() -> None:
    a, b = Fake("a"), Fake("b")

    async def main() -> list[bytes]:
        group = Replicas("g", [a, b], hedge_share=0)
        return [await group.call(b"x", LONG_S) for _ in range(10)]

    answers = asyncio.run(main())
    assert (a.asked, b.asked) == (5, 5)
    assert {*answers} == {b"a", b"b"}


def test_a_busy_replica_gets_fewer() -> None:
    a, b = Fake("a"), Fake("b")

    async def main() -> None:
        group = Replicas("g", [a, b], hedge_share=0)
        a.behave = a.never
        stuck = [asyncio.ensure_future(group.call(b"x", LONG_S)) for _ in range(2)]
        await asyncio.sleep(0)
        for _ in range(10):
            assert await group.call(b"x", LONG_S) == b"b"
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)

    asyncio.run(main())
    assert a.asked == 1
    assert a.given_up == 1


def test_a_slow_call_is_hedged_and_given_up() -> None:
    a, b = Fake("a"), Fake("b")

    async def main() -> Replicas:
        group = Replicas("g", [a, b], hedge_share=1)
        await warm(group)
        before = group.counts.hedges
        a.behave = a.never
        answers = [await group.call(b"x", LONG_S) for _ in range(4)]
        assert answers == [b"b"] * 4
        assert 1 <= group.counts.hedges - before <= 4
        return group

    group = asyncio.run(main())
    assert group.counts.failures == 0
    assert a.given_up >= 1


def test_a_replica_that_says_nothing_is_left_alone_before_hedges_run_out() -> None:
    a, b = Fake("a"), Fake("b")

    async def main() -> Replicas:
        group = Replicas("g", [a, b])
        await warm(group, 400)
        before, asked = group.counts.hedges, a.asked
        a.behave = a.never
        for _ in range(300):
            assert await group.call(b"x", LONG_S) == b"b"
        # Two, and one more after each pause.
        assert 2 <= a.asked - asked <= 4
        assert group.counts.hedges - before == a.asked - asked
        a.behave = a.at_once
        await asyncio.sleep(1.1)
        assert {await group.call(b"x", LONG_S) for _ in range(4)} == {b"a", b"b"}
        return group

    assert asyncio.run(main()).counts.failures == 0


def test_calls_that_are_outrun_together_make_one_short_pause() -> None:
    a, b = Fake("a"), Fake("b")

    async def main() -> None:
        group = Replicas("g", [a, b], hedge_share=1)
        await warm(group)
        a.behave = a.never
        answers = await asyncio.gather(*(group.call(b"x", LONG_S) for _ in range(20)))
        assert set(answers) == {b"b"}
        assert a.given_up == 10
        a.behave = a.at_once
        # Less than a pause after the third failure in a row, which would be 0.4 s.
        await asyncio.sleep(0.15)
        assert {await group.call(b"x", LONG_S) for _ in range(2)} == {b"a", b"b"}

    asyncio.run(main())


def test_a_replica_that_is_late_now_and_then_is_not_left_alone() -> None:
    a, b = Fake("a"), Fake("b")

    async def main() -> None:
        group = Replicas("g", [a, b], hedge_share=1)
        await warm(group)
        for _ in range(10):
            a.behave = a.never
            assert {await group.call(b"x", LONG_S) for _ in range(2)} == {b"b"}
            a.behave = a.at_once
            # It is asked in its turn.
            assert {await group.call(b"x", LONG_S) for _ in range(2)} == {b"a", b"b"}

    asyncio.run(main())


def test_hedges_stay_within_their_share() -> None:
    a, b = Fake("a"), Fake("b")

    async def slow() -> None:
        await asyncio.sleep(0.003)

    async def main() -> Replicas:
        group = Replicas("g", [a, b], hedge_share=0.05)
        await warm(group)
        a.behave = b.behave = slow
        for _ in range(200):
            await group.call(b"x", LONG_S)
        return group

    counts = asyncio.run(main()).counts
    assert counts.calls == 300
    # Every call was slower than what was usual before.
    assert 3 <= counts.hedges <= 1 + 0.05 * 300


def test_batches_are_hedged_after_their_own_time_and_leave_that_of_single_queries() -> None:
    a, b = Fake("a"), Fake("b")
    took = 0.0

    async def work() -> None:
        await asyncio.sleep(took)

    async def main() -> None:
        nonlocal took
        group = Replicas("g", [a, b], hedge_share=1)
        a.behave = b.behave = work
        took = 0.02
        await warm(group, 60)
        before = group.counts.hedges
        # A hundred queries at once take as long as ten.
        took = 0.2
        for _ in range(20):
            await group.call(b"x", LONG_S, num_queries=100)
        assert group.counts.hedges == before
        # A single query that takes so long is still late.
        await group.call(b"x", LONG_S)
        assert group.counts.hedges == before + 1

    asyncio.run(main())


def test_without_a_second_replica_nothing_is_hedged() -> None:
    a = Fake("a")

    async def slow() -> None:
        await asyncio.sleep(0.01)

    async def main() -> Replicas:
        group = Replicas("g", [a], hedge_share=1)
        await warm(group)
        a.behave = slow
        assert await group.call(b"x", LONG_S) == b"a"
        return group

    assert asyncio.run(main()).counts.hedges == 0
    assert a.asked == 101


def test_a_failed_call_is_asked_elsewhere_and_the_replica_left_alone() -> None:
    a, b = Fake("a"), Fake("b")

    async def main() -> Replicas:
        group = Replicas("g", [a, b], hedge_share=0)
        a.behave = a.fail
        answers = [await group.call(b"x", LONG_S) for _ in range(20)]
        assert answers == [b"b"] * 20
        asked = a.asked
        assert asked < 5
        a.behave = a.at_once
        # After a pause it is asked again, and is one of two once more.
        await asyncio.sleep(1.1)
        answers = [await group.call(b"x", LONG_S) for _ in range(10)]
        assert answers.count(b"a") == 5
        assert group.counts.retries == asked
        return group

    assert asyncio.run(main()).counts.failures == 0


def test_a_replica_without_the_generation_is_no_failure() -> None:
    a, b = Fake("a"), Fake("b")
    a.answer = b""

    async def main() -> Replicas:
        group = Replicas("g", [a, b], hedge_share=0)
        assert [await group.call(b"x", LONG_S) for _ in range(10)] == [b"b"] * 10
        a.answer = b"a"
        assert {await group.call(b"x", LONG_S) for _ in range(10)} == {b"a", b"b"}
        b.answer = a.answer = b""
        with pytest.raises(GroupUnavailableError, match="g"):
            await group.call(b"x", LONG_S)
        return group

    assert asyncio.run(main()).counts.failures == 1


@pytest.mark.parametrize("how", ["fail", "never"])
def test_a_group_that_is_down_says_so_and_later_at_once(how: str) -> None:
    a, b = Fake("a"), Fake("b")

    async def main() -> None:
        group = Replicas("g", [a, b], hedge_share=1)
        await warm(group)
        for fake in (a, b):
            fake.behave = getattr(fake, how)
        with pytest.raises(GroupUnavailableError):
            await group.call(b"x", 0.05)
        asked = a.asked + b.asked
        for _ in range(5):
            with pytest.raises(GroupUnavailableError):
                await group.call(b"x", LONG_S)
        # Nobody waited for what is known to be down.
        assert a.asked + b.asked == asked
        for fake in (a, b):
            fake.behave = fake.at_once
        await asyncio.sleep(1.1)
        assert await group.call(b"x", LONG_S) in (b"a", b"b")

    asyncio.run(main())


def test_a_replica_that_has_failed_for_long_is_no_error() -> None:
    a, b = Fake("a"), Fake("b")

    async def main() -> None:
        group = Replicas("g", [a, b], hedge_share=0)
        a.behave = a.fail
        for _ in range(2_000):
            group._replicas[0].failed(0.0)
        assert [await group.call(b"x", LONG_S) for _ in range(10)] == [b"b"] * 10
        assert a.asked > 0

    asyncio.run(main())


def test_a_message_that_nobody_can_answer_takes_no_replica_out() -> None:
    a, b = Fake("a"), Fake("b")

    async def main() -> Replicas:
        group = Replicas("g", [a, b], hedge_share=0)
        a.behave, b.behave = a.refuse, b.refuse
        for _ in range(10):
            with pytest.raises(GroupUnavailableError):
                await group.call(b"x", LONG_S)
        assert (a.asked, b.asked) == (10, 10)
        a.behave, b.behave = a.at_once, b.at_once
        assert {await group.call(b"x", LONG_S) for _ in range(2)} == {b"a", b"b"}
        return group

    assert asyncio.run(main()).counts.retries == 10


@pytest.mark.parametrize("how", ["never", "fail"])
@pytest.mark.parametrize("blame", [True, False])
def test_only_what_is_late_and_not_to_be_blamed_is_cut_short(how: str, blame: bool) -> None:
    a = Fake("a")
    a.behave = getattr(a, how)

    async def main() -> Replicas:
        group = Replicas("g", [a])
        with pytest.raises(GroupUnavailableError, match="g") as caught:
            await group.call(b"x", 0.02, blame)
        cut_short = how == "never" and not blame
        assert isinstance(caught.value, CutShortError) == cut_short
        assert group.counts.failures == (0 if cut_short else 1)
        return group

    assert asyncio.run(main())._replicas[0].num_running == 0


@pytest.mark.parametrize("why", ["the time was the client's", "it answered others meanwhile"])
def test_a_replica_that_is_only_slow_is_not_left_alone(why: str) -> None:
    a = Fake("a")

    async def main() -> None:
        group = Replicas("g", [a], hedge_share=0)
        await warm(group, 1)
        a.behave = a.never
        if why == "the time was the client's":
            with pytest.raises(GroupUnavailableError):
                await group.call(b"x", 0.02, blame=False)
        else:
            slow = asyncio.ensure_future(group.call(b"x", 0.1))
            await asyncio.sleep(0.02)
            a.behave = a.at_once
            assert await group.call(b"x", LONG_S) == b"a"
            with pytest.raises(GroupUnavailableError):
                await slow
        a.behave = a.at_once
        assert await group.call(b"x", LONG_S) == b"a"

    asyncio.run(main())
