"""The queue before the net: what shares a batch, what is refused, what is late, and that nothing is mixed up."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from nndefense.serving.http.batcher import Batcher
from nndefense.serving.http.problem import ServiceProblem


class Work:
    """Doubles numbers, remembers the batches, and can be held up."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.sizes: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Event()

    def __call__(self, key: str, numbers: list[int]) -> list[int]:
        self.begun.set()
        assert self.go.wait(10)
        self.batches.append((key, numbers))
        if any(number < 0 for number in numbers):
            raise ValueError("negative")
        return [2 * number for number in numbers]

    def batch(self, size: int, seconds: float, waits: Sequence[float]) -> None:
        assert seconds >= 0
        assert all(wait >= 0 for wait in waits)
        assert len(waits) == size
        self.sizes.append(size)


def run(
    test: Callable[[Batcher[str, int, int], Work], Awaitable[None]],
    *,
    size: int = 4,
    wait: float = 0.005,
    capacity: int = 100,
) -> Work:
    """Run a test in an event loop, with a batcher around it."""
    work = Work()

    async def whole() -> None:
        batcher = Batcher(work, size=lambda key: size, wait=wait, capacity=capacity, observer=work.batch)
        batcher.start()
        assert batcher.alive
        try:
            await asyncio.wait_for(test(batcher, work), 20)
        finally:
            work.go.set()
            batcher.close()
            assert await asyncio.to_thread(batcher.join, 5)
            assert not batcher.alive

    asyncio.run(whole())
    return work


async def blocked(
    batcher: Batcher[str, int, int], work: Work, *, timeout: float = 10, items: int = 1
) -> asyncio.Task[list[int]]:
    """Have the worker busy with some items until ``work.go`` is set."""
    work.go.clear()
    task = asyncio.create_task(batcher.submit("a", [0] * items, timeout))
    assert await asyncio.to_thread(work.begun.wait, 5)
    return task


def test_what_comes_together_is_worked_on_together() -> None:
    async def test(batcher: Batcher[str, int, int], work: Work) -> None:
        first = await blocked(batcher, work)
        tasks = [asyncio.create_task(batcher.submit("a", [number], 10)) for number in range(1, 11)]
        await asyncio.sleep(0.05)
        assert batcher.waiting == 10
        work.go.set()
        assert await asyncio.gather(first, *tasks) == [[2 * number] for number in range(11)]
        assert [numbers for _, numbers in work.batches] == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]

    assert run(test).sizes == [1, 4, 4, 2]


def test_a_single_item_waits_no_longer_than_allowed() -> None:
    async def test(batcher: Batcher[str, int, int], work: Work) -> None:
        begun = time.monotonic()
        assert await batcher.submit("a", [7], 10) == [14]
        assert 0.09 < time.monotonic() - begun < 5

    run(test, wait=0.1)


def test_a_full_batch_does_not_wait() -> None:
    async def test(batcher: Batcher[str, int, int], work: Work) -> None:
        begun = time.monotonic()
        assert await batcher.submit("a", [1, 2, 3, 4], 60) == [2, 4, 6, 8]
        assert await asyncio.gather(*(batcher.submit("a", [number], 60) for number in range(4))) == [[0], [2], [4], [6]]
        assert time.monotonic() - begun < 10

    assert run(test, wait=30).sizes == [4, 4]


def test_one_job_may_need_several_batches() -> None:
    async def test(batcher: Batcher[str, int, int], work: Work) -> None:
        assert await batcher.submit("a", list(range(11)), 10) == list(range(0, 22, 2))

    assert run(test).sizes == [4, 4, 3]


def test_keys_never_share_a_batch_and_keep_their_order() -> None:
    async def test(batcher: Batcher[str, int, int], work: Work) -> None:
        first = await blocked(batcher, work)
        old = asyncio.create_task(batcher.submit("a", [1, 2], 10))
        await asyncio.sleep(0)
        new = asyncio.create_task(batcher.submit("b", [3], 10))
        await asyncio.sleep(0.02)
        work.go.set()
        assert await asyncio.gather(first, old, new) == [[0], [2, 4], [6]]
        assert work.batches == [("a", [0]), ("a", [1, 2]), ("b", [3])]

    run(test)


def test_a_full_queue_refuses_and_recovers() -> None:
    async def test(batcher: Batcher[str, int, int], work: Work) -> None:
        first = await blocked(batcher, work)
        waiting = [asyncio.create_task(batcher.submit("a", [1, 1], 10)) for _ in range(4)]
        await asyncio.sleep(0.02)
        for numbers in ([1], [1, 2, 3]):
            with pytest.raises(ServiceProblem) as refused:
                await batcher.submit("a", numbers, 10)
            assert (refused.value.code, refused.value.status) == ("queue_full", 503)
            assert 1 <= int(refused.value.headers["retry-after"]) <= 60
        work.go.set()
        await asyncio.gather(first, *waiting)
        assert await batcher.submit("a", [5], 10) == [10]

    run(test, capacity=8)


def test_a_queue_that_would_take_too_long_refuses_though_it_is_not_full() -> None:
    async def test(batcher: Batcher[str, int, int], work: Work) -> None:
        first = await blocked(batcher, work)
        await asyncio.sleep(0.3)
        work.go.set()
        await first
        # An item took 0.3 seconds, so ten of them are more than the second that the next one has.
        work.begun.clear()
        second = await blocked(batcher, work)
        many = asyncio.create_task(batcher.submit("a", [1] * 10, 60))
        await asyncio.sleep(0.02)
        assert batcher.backlog_seconds > 1
        with pytest.raises(ServiceProblem) as refused:
            await batcher.submit("a", [1], 1)
        assert refused.value.code == "queue_full"
        assert int(refused.value.headers["retry-after"]) >= 2
        work.go.set()
        await asyncio.gather(second, many)

    run(test)


def test_what_is_late_is_answered_in_time_and_not_worked_on() -> None:
    async def test(batcher: Batcher[str, int, int], work: Work) -> None:
        first = await blocked(batcher, work)
        begun = time.monotonic()
        with pytest.raises(ServiceProblem) as late:
            await batcher.submit("a", [77], 0.1)
        assert (late.value.code, late.value.status) == ("timed_out", 503)
        assert time.monotonic() - begun < 5
        work.go.set()
        await first
        assert await batcher.submit("a", [1], 10) == [2]
        assert all(77 not in numbers for _, numbers in work.batches)

    run(test)


def test_a_late_answer_of_a_running_batch_is_thrown_away() -> None:
    async def test(batcher: Batcher[str, int, int], work: Work) -> None:
        with pytest.raises(ServiceProblem, match="not ready in time"):
            await (await blocked(batcher, work, timeout=0.1))
        work.go.set()
        assert await batcher.submit("a", [1], 10) == [2]

    run(test)


def test_whoever_gives_up_is_not_worked_for() -> None:
    async def test(batcher: Batcher[str, int, int], work: Work) -> None:
        first = await blocked(batcher, work)
        gone = asyncio.create_task(batcher.submit("a", [55], 10))
        kept = asyncio.create_task(batcher.submit("a", [6], 10))
        await asyncio.sleep(0.02)
        gone.cancel()
        await asyncio.sleep(0)
        work.go.set()
        assert await asyncio.gather(first, kept) == [[0], [12]]
        assert all(55 not in numbers for _, numbers in work.batches)

    run(test)


def test_giving_up_in_the_moment_of_being_taken_does_not_end_the_worker() -> None:
    work = Work()

    async def whole() -> None:
        given_up = threading.Event()

        def size(key: str) -> int:
            # The worker has seen that somebody waits, and has not taken him yet.
            if key == "impatient":
                loop.call_soon_threadsafe(task.cancel)
                assert given_up.wait(5)
            return 1

        loop = asyncio.get_running_loop()
        batcher: Batcher[str, int, int] = Batcher(work, size=size, wait=0, capacity=10)
        batcher.start()
        task = asyncio.ensure_future(batcher.submit("impatient", [1], 10))
        task.add_done_callback(lambda _: given_up.set())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await batcher.submit("patient", [2], 5) == [4]
        batcher.close()
        assert await asyncio.to_thread(batcher.join, 5)

    asyncio.run(whole())
    assert work.batches == [("patient", [2])]


def test_one_job_s_fault_does_not_fail_the_others() -> None:
    async def test(batcher: Batcher[str, int, int], work: Work) -> None:
        first = await blocked(batcher, work)
        tasks = [asyncio.create_task(batcher.submit("a", [number], 10)) for number in (1, -2, 3)]
        await asyncio.sleep(0.02)
        work.go.set()
        await first
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert found[0] == [2]
        assert isinstance(found[1], ValueError)
        assert found[2] == [6]
        with pytest.raises(ValueError, match="negative"):
            await batcher.submit("a", [-1], 10)
        # And the worker lives on.
        assert await batcher.submit("a", [4], 10) == [8]

    run(test)


def test_a_wrong_number_of_results_is_an_error_and_not_a_hang() -> None:
    async def test() -> None:
        batcher: Batcher[str, int, int] = Batcher(lambda key, numbers: [], size=lambda key: 4, wait=0, capacity=9)
        batcher.start()
        with pytest.raises(RuntimeError, match="0 results for 2 items"):
            await batcher.submit("a", [1, 2], 10)
        assert batcher.alive
        batcher.close()
        assert await asyncio.to_thread(batcher.join, 5)

    asyncio.run(test())


def test_closing_finishes_what_was_accepted_and_takes_nothing_more() -> None:
    async def test(batcher: Batcher[str, int, int], work: Work) -> None:
        # A full batch: one that is not would wait.
        first = await blocked(batcher, work, items=4)
        accepted = [asyncio.create_task(batcher.submit("a", [number], 10)) for number in range(9)]
        await asyncio.sleep(0.02)
        batcher.close()
        with pytest.raises(ServiceProblem) as refused:
            await batcher.submit("a", [1], 10)
        assert refused.value.code == "stopping"
        work.go.set()
        assert await asyncio.gather(first, *accepted) == [[0] * 4, *([2 * number] for number in range(9))]

    run(test, wait=30)


def test_many_jobs_of_all_sizes_get_their_own_results() -> None:
    draws = random.Random(0)

    async def test(batcher: Batcher[str, int, int], work: Work) -> None:
        async def one(number: int) -> None:
            await asyncio.sleep(draws.random() * 0.05)
            numbers = [1000 * number + place for place in range(draws.randrange(1, 9))]
            assert await batcher.submit(draws.choice("ab"), numbers, 20) == [2 * value for value in numbers]

        await asyncio.gather(*(one(number) for number in range(500)))

    work = run(test, size=7, capacity=10_000, wait=0.001)
    assert sum(work.sizes) == sum(len(numbers) for _, numbers in work.batches)
    assert max(work.sizes) <= 7
    # It would be no batching, were they all alone.
    assert len(work.sizes) < 450


def test_two_event_loops_may_share_a_batcher() -> None:
    work = Work()
    batcher: Batcher[str, int, int] = Batcher(work, size=lambda key: 4, wait=0.01, capacity=100)
    batcher.start()
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda value=value: found.append(asyncio.run(batcher.submit("a", [value], 10))))
        for value in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    batcher.close()
    assert batcher.join(5)
    assert sorted(found) == [[2 * value] for value in range(6)]
