"""Who shares a batch, who waits, who is turned away, and who has gone."""

import asyncio
import threading
import time

import pytest

from pipelines.serving.batching import Batcher, Overloaded, TimedOut
from pipelines.serving.latency_model import LatencyModel


class Workshop:
    """A batcher whose work waits for a sign, and keeps what it was given."""

    def __init__(self, **settings):
        self.batches, self.sign = [], threading.Event()
        self.sign.set()
        defaults = {"max_batch_size": 3, "wait_s": 0.02, "max_waiting": 5}
        self.batcher = Batcher(self.work, **defaults | settings)

    def work(self, key, items):
        assert self.sign.wait(10)
        self.batches.append((key, items))
        return [f"{key}{item}" for item in items]

    async def submit_all(self, *wanted):
        """Tasks, all of them in the queue."""
        tasks = [asyncio.create_task(self.batcher.submit(*each)) for each in wanted]
        await asyncio.sleep(0)
        return tasks


def run(body, **settings):
    async def inside():
        workshop = Workshop(**settings)
        await body(workshop)
        return workshop

    return asyncio.run(inside())


async def start_busy(workshop):
    """A task that is worked on until the sign comes."""
    workshop.sign.clear()
    (task,) = await workshop.submit_all(("x", 0))
    while workshop.batcher.num_waiting:
        await asyncio.sleep(0.001)
    return task


def test_those_of_a_key_share_a_batch_and_others_wait_their_turn():
    async def body(workshop):
        first = await start_busy(workshop)
        wanted = [("a", 1), ("b", 2), ("a", 3), ("a", 4), ("a", 5)]
        tasks = await workshop.submit_all(*wanted)
        await asyncio.sleep(0.1)  # longer than anyone waits for company, and yet no batch is closed
        assert workshop.batcher.num_waiting == 5
        workshop.sign.set()
        assert await asyncio.gather(first, *tasks) == ["x0", "a1", "b2", "a3", "a4", "a5"]

    assert run(body).batches == [("x", [0]), ("a", [1, 3, 4]), ("b", [2]), ("a", [5])]


def test_who_comes_while_a_batch_runs_joins_the_next():
    async def body(workshop):
        first = await start_busy(workshop)
        tasks = await workshop.submit_all(("a", 1))
        await asyncio.sleep(0.1)
        tasks += await workshop.submit_all(("a", 2))
        workshop.sign.set()
        await asyncio.gather(first, *tasks)

    assert run(body).batches == [("x", [0]), ("a", [1, 2])]


def test_a_full_batch_and_one_alone_wait_for_nobody():
    async def body(workshop):
        async with asyncio.timeout(60):  # of the 600 s that a batch may wait
            await asyncio.gather(*await workshop.submit_all(("a", 1), ("a", 2), ("a", 3)))
            await workshop.batcher.submit("a", 4)
            await workshop.batcher.submit("a", 5)

    run(body, wait_s=600)


def test_the_rest_of_a_request_is_waited_for_but_not_for_long():
    async def body(workshop):
        first = asyncio.create_task(workshop.batcher.submit("a", 1, group_size=2))
        await asyncio.sleep(0.1)
        await asyncio.gather(first, workshop.batcher.submit("a", 2, group_size=2))
        started = time.monotonic()
        async with asyncio.timeout(60):
            await workshop.batcher.submit("a", 3, group_size=2)
        assert time.monotonic() - started >= 0.5

    assert run(body, wait_s=0.5).batches == [("a", [1, 2]), ("a", [3])]


def test_clients_that_ask_again_at_once_do_not_split_into_halves_that_take_turns():
    sizes = []

    def work(key, items):
        sizes.append(len(items))
        time.sleep(0.08)
        return items

    async def body():
        batcher = Batcher(work, max_batch_size=8, wait_s=0.05, max_waiting=8)

        async def client(number):
            await asyncio.sleep(0.01 * number)  # so that they begin split
            for _ in range(8):
                await batcher.submit("a", number)
                await asyncio.sleep(0.002)

        await asyncio.gather(*map(client, range(6)))

    asyncio.run(body())
    assert sizes.count(6) >= 5, sizes


def test_who_has_waited_for_long_enough_is_told():
    async def body(workshop):
        first = await start_busy(workshop)
        late = asyncio.create_task(workshop.batcher.submit("a", 1, timeout_s=0.05))
        patient = asyncio.create_task(workshop.batcher.submit("a", 2, timeout_s=5))
        with pytest.raises(TimedOut):
            await late
        assert workshop.batcher.num_waiting == 1
        workshop.sign.set()
        assert [await first, await patient] == ["x0", "a2"]

    assert run(body).batches == [("x", [0]), ("a", [2])]


def test_what_has_started_is_not_given_up():
    async def body(workshop):
        workshop.sign.clear()
        task = asyncio.create_task(workshop.batcher.submit("a", 1, timeout_s=0.05))
        await asyncio.sleep(0.1)
        workshop.sign.set()
        assert await task == "a1"

    run(body)


def test_batches_are_as_large_as_the_target_leaves_time_for():
    async def body(workshop):
        for size, seconds in ((1, 0.3), (2, 0.4), (3, 0.5)):
            workshop.batcher._latency_models.setdefault("a", LatencyModel()).add(size, seconds)
        tasks = await workshop.submit_all(*[("a", item) for item in range(5)])
        await asyncio.gather(*tasks)

    for target_s, size in ((0.83, 2), (0.1, 1), (None, 3)):  # the first: later ones go by their own speed
        assert len(run(body, target_s=target_s).batches[0][1]) == size


def test_the_time_of_a_batch_is_learnt_and_follows_changes():
    model = LatencyModel()
    assert model.seconds(4) == 0 and model.largest(1, 8) == 8
    model.add(2, 1.0)
    assert model.seconds(4) == pytest.approx(2.0), "proportional, while one size is known"
    model.add(6, 2.0)
    assert (model.seconds(1), model.seconds(4)) == pytest.approx((0.75, 1.5))
    assert (model.largest(1.5, 8), model.largest(1.5, 3), model.largest(0.1, 8)) == (4, 3, 1)
    for size in [2, 6] * 30:
        model.add(size, 0.1 * size)
    assert model.seconds(4) == pytest.approx(0.4, rel=0.05)


def test_who_is_one_too_many_is_turned_away_until_there_is_room():
    async def body(workshop):
        first = await start_busy(workshop)
        tasks = await workshop.submit_all(*[("a", item) for item in range(5)])
        for _ in range(2):
            with pytest.raises(Overloaded) as turned_away:
                await workshop.batcher.submit("b", 9)
            assert turned_away.value.retry_after_s >= 1
        tasks[2].cancel()
        await asyncio.sleep(0)
        tasks += await workshop.submit_all(("b", 9))
        workshop.sign.set()
        results = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert results[-1] == "b9" and isinstance(results[3], asyncio.CancelledError)

    assert run(body).batches == [("x", [0]), ("a", [0, 1, 3]), ("a", [4]), ("b", [9])]


def test_retry_after_is_the_time_that_the_queue_takes():
    async def body(workshop):
        workshop.batcher._last_s = 4.0
        first = await start_busy(workshop)
        tasks = await workshop.submit_all(*[("a", item) for item in range(5)])
        with pytest.raises(Overloaded) as turned_away:
            workshop.batcher.check_room()
        assert turned_away.value.retry_after_s == 8, "two batches of three"
        workshop.sign.set()
        await asyncio.gather(first, *tasks)

    run(body)


def test_who_has_gone_is_not_worked_for():
    async def body(workshop):
        first = await start_busy(workshop)
        tasks = await workshop.submit_all(("a", 1), ("a", 2), ("b", 3))
        tasks[0].cancel()
        tasks[2].cancel()
        await asyncio.sleep(0)
        assert workshop.batcher.num_waiting == 1
        first.cancel()  # while it is being worked on: nobody else notices
        workshop.sign.set()
        assert await tasks[1] == "a2"

    assert run(body).batches == [("x", [0]), ("a", [2])]


def test_a_failure_is_its_batch_alone():
    async def body(workshop):
        work = workshop.work
        workshop.batcher._work = lambda key, items: 1 / 0 if key == "bad" else work(key, items)
        tasks = await workshop.submit_all(("bad", 1), ("a", 2), ("bad", 3))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(each) for each in results] == [ZeroDivisionError, str, ZeroDivisionError]
        assert await workshop.batcher.submit("a", 4) == "a4"

    run(body)


def test_work_between_batches_is_in_their_thread():
    async def body(workshop):
        first = await start_busy(workshop)
        thread_name = workshop.batcher.run_between_batches(lambda: threading.current_thread().name)
        name = asyncio.create_task(thread_name)
        await asyncio.sleep(0.05)
        assert not name.done()
        workshop.sign.set()
        await first
        assert (await name).startswith("trajectory")

    run(body)
