"""Who comes next, seen from the order in which an engine under the test's control is given work."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from reranker_service.engines.base import TokenSequence
from reranker_service.scheduling import Job, Scheduler, Ticket

from .servers import ControlledEngine


def job(stream: str, count: int, *, interactive: bool = False, length: int = 3) -> Job:
    """``count`` sequences whose first token id is the stream's first letter."""

    def make(begin: int, end: int) -> Sequence[TokenSequence]:
        ids = np.full(length, ord(stream[0]), dtype=np.int32)
        return [TokenSequence(ids, length) for _ in range(begin, end)]

    return Job(Ticket(stream, interactive), np.full(count, length), make)


def order(engine: ControlledEngine) -> str:
    """Streams of the batches given to the engine, in order."""
    return "".join(chr(batch[0].ids[0]) for batch in engine.batches)


def one_at_a_time() -> ControlledEngine:
    return ControlledEngine(max_in_flight=2, max_batch=2, open_gate=False)


def test_results_come_in_the_order_of_the_job() -> None:
    async def scenario() -> np.ndarray:
        engine = ControlledEngine(max_in_flight=4, max_batch=3)
        lengths = list(range(1, 12))

        def make(begin: int, end: int) -> list[TokenSequence]:
            return [TokenSequence(np.zeros(length, dtype=np.int32), length) for length in lengths[begin:end]]

        return await Scheduler(engine).run(Job(Ticket("a", False), np.array(lengths), make))

    assert asyncio.run(scenario()).tolist() == list(range(1, 12))


def test_the_engine_never_holds_more_than_it_wants() -> None:
    async def scenario() -> int:
        engine = ControlledEngine(max_in_flight=7, max_batch=3, open_gate=False)
        scheduler = Scheduler(engine)
        runs = [asyncio.create_task(scheduler.run(job(name, 10))) for name in "abc"]
        await engine.wait_for_sequences(6)
        held = sum(map(len, engine.batches))
        engine.gate.set()
        await asyncio.gather(*runs)
        return held

    assert asyncio.run(scenario()) == 6


def test_interactive_work_overtakes_bulk_work() -> None:
    async def scenario() -> str:
        engine = one_at_a_time()
        scheduler = Scheduler(engine)
        bulk = asyncio.create_task(scheduler.run(job("bulk", 8)))
        await engine.wait_for_sequences(2)

        async def open_gate() -> None:
            engine.gate.set()

        # Tasks begin in the order of their making: the gate opens when the interactive job is in the queue.
        await asyncio.gather(bulk, scheduler.run(job("quick", 4, interactive=True)), open_gate())
        return order(engine)

    assert asyncio.run(scenario()) == "bqqbbb"


def test_two_streams_take_turns_however_many_jobs_one_has() -> None:
    async def scenario() -> str:
        engine = one_at_a_time()
        scheduler = Scheduler(engine)
        runs = [asyncio.create_task(scheduler.run(job("many", 4))) for _ in range(3)]
        runs.append(asyncio.create_task(scheduler.run(job("few", 8))))
        await engine.wait_for_sequences(2)
        engine.gate.set()
        await asyncio.gather(*runs)
        return order(engine)

    # The first batch was admitted before "few" came.
    assert asyncio.run(scenario()) == "m" + "mf" * 4 + "m"


def test_streams_share_by_tokens_not_by_pairs() -> None:
    async def scenario() -> str:
        engine = one_at_a_time()
        scheduler = Scheduler(engine)
        runs = [
            asyncio.create_task(scheduler.run(job("long", 8, length=30))),
            asyncio.create_task(scheduler.run(job("short", 8, length=10))),
        ]
        await engine.wait_for_sequences(2)
        engine.gate.set()
        await asyncio.gather(*runs)
        return order(engine)

    # A batch of "long" is 60 tokens, one of "short" 20; the first batch was admitted before "short" came.
    assert asyncio.run(scenario()) == "l" + "lsss" + "lsl"


def test_a_cancelled_job_leaves_the_queue_and_the_engine() -> None:
    async def scenario() -> tuple[int, str]:
        engine = one_at_a_time()
        scheduler = Scheduler(engine)
        gone = asyncio.create_task(scheduler.run(job("gone", 100)))
        await engine.wait_for_sequences(2)
        stays = asyncio.create_task(scheduler.run(job("stays", 2)))
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        engine.gate.set()
        await stays
        return engine.cancelled, order(engine)

    assert asyncio.run(scenario()) == (2, "gs")


def test_an_engines_error_fails_the_job_and_the_next_one_runs() -> None:
    async def scenario() -> np.ndarray:
        engine = one_at_a_time()
        engine.failure = RuntimeError("no")
        scheduler = Scheduler(engine)
        engine.gate.set()
        with pytest.raises(RuntimeError, match="no"):
            await scheduler.run(job("a", 10))
        engine.failure = None
        return await scheduler.run(job("b", 4))

    assert asyncio.run(scenario()).tolist() == [3, 3, 3, 3]


def test_sequences_that_cannot_be_made_fail_their_own_job_only() -> None:
    def broken(begin: int, end: int) -> list[TokenSequence]:
        raise ValueError("cannot join")

    async def scenario() -> np.ndarray:
        engine = one_at_a_time()
        engine.gate.set()
        scheduler = Scheduler(engine)
        with pytest.raises(ValueError, match="cannot join"):
            await scheduler.run(Job(Ticket("a", False), np.ones(3, dtype=np.int64), broken))
        return await scheduler.run(job("b", 1))

    assert asyncio.run(scenario()).tolist() == [3]


def test_work_that_is_cancelled_before_it_begins_gives_its_place_back() -> None:
    """The last batch of one job ends; the next job is admitted and cancelled before the engine was called for it."""

    async def scenario() -> tuple[np.ndarray, int]:
        engine = one_at_a_time()
        scheduler = Scheduler(engine)
        first = asyncio.create_task(scheduler.run(job("first", 2)))
        await engine.wait_for_sequences(2)
        second = asyncio.create_task(scheduler.run(job("second", 2)))
        third = asyncio.create_task(scheduler.run(job("third", 2)))
        first.add_done_callback(lambda _: second.cancel())
        engine.gate.set()
        await asyncio.wait({first, second, third}, timeout=10)
        return await third, scheduler.running

    found, running = asyncio.run(scenario())
    assert found.tolist() == [3, 3]
    assert running == 0


def test_what_waits_and_runs_is_counted() -> None:
    async def scenario() -> list[tuple[int, int, bool]]:
        engine = one_at_a_time()
        scheduler = Scheduler(engine)
        seen = []

        def look() -> None:
            seen.append((scheduler.waiting, scheduler.running, scheduler.waiting_since is not None))

        look()
        runs = [asyncio.create_task(scheduler.run(job(name, 5))) for name in "abc"]
        await engine.wait_for_sequences(2)
        look()
        runs[2].cancel()
        await asyncio.wait({runs[2]})
        look()
        engine.gate.set()
        await asyncio.gather(*runs[:2])
        look()
        return seen

    assert asyncio.run(scenario()) == [(0, 0, False), (13, 2, True), (8, 2, True), (0, 0, False)]


def padding() -> ControlledEngine:
    engine = ControlledEngine(max_in_flight=16, max_batch=8, open_gate=False)
    engine.pads = True
    return engine


def test_an_engine_that_pads_gets_full_batches_from_many_small_jobs() -> None:
    async def scenario() -> tuple[list[int], list[list[float]]]:
        engine = padding()
        scheduler = Scheduler(engine)
        runs = [asyncio.create_task(scheduler.run(job(f"{i}", 3, length=i + 1))) for i in range(8)]
        await engine.wait_for_sequences(3)
        engine.gate.set()
        found = [one.tolist() for one in await asyncio.gather(*runs)]
        return [len(batch) for batch in engine.batches], found

    sizes, found = asyncio.run(scenario())
    # One runs, one is next, and what comes meanwhile shares batches.
    assert sizes == [3, 3, 8, 8, 2]
    assert found == [[i + 1] * 3 for i in range(8)]


def test_a_shared_batch_goes_on_for_those_who_still_want_it_and_ends_with_the_last() -> None:
    async def scenario() -> tuple[int, list[float], int]:
        engine = padding()
        scheduler = Scheduler(engine)
        runs = [asyncio.create_task(scheduler.run(job(name, 8))) for name in "ab"]
        runs += [asyncio.create_task(scheduler.run(job(name, 2))) for name in "cde"]
        await engine.wait_for_sequences(16)
        runs[0].cancel()
        await engine.wait_for_sequences(22)  # c, d and e in one batch
        runs[2].cancel()
        await asyncio.wait({runs[2]})
        before = engine.cancelled
        for run in (runs[3], runs[4]):
            run.cancel()
        await asyncio.wait(runs[3:])
        engine.gate.set()
        found = await runs[1]
        return before, found.tolist(), scheduler.running

    before, found, running = asyncio.run(scenario())
    assert before == 8
    assert found == [3] * 8
    assert running == 0
