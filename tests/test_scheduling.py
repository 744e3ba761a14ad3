"""Scheduling: the order in which a controlled engine is given batches."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Hashable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from reranker_service.engines import TokenSequence, WrongResultError
from reranker_service.engines.checks import NonFiniteScoreError, finite
from reranker_service.scheduling import Job, Scheduler, Ticket, watch_stalls
from reranker_service.scheduling.entry import Entry
from reranker_service.scheduling.queue import FairQueue
from reranker_service.scheduling.share import BulkShare
from reranker_service.scheduling.window import Pace

from .servers import ControlledEngine


def job(stream: str, count: int, *, interactive: bool = False, length: int = 3) -> Job:
    """``count`` sequences whose first token id is the stream's first letter."""

    return mixed(stream, [length] * count, interactive=interactive)


def mixed(stream: str, lengths: Sequence[int], *, interactive: bool = False) -> Job:
    """Sequences of these lengths whose token ids are the stream's first letter."""

    def make(positions: NDArray[np.intp]) -> list[TokenSequence]:
        return [TokenSequence(np.full(lengths[one], ord(stream[0]), dtype=np.int32), lengths[one]) for one in positions]

    return Job(Ticket(stream, interactive), np.array(lengths), make)


async def values(scheduler: Scheduler, job: Job) -> NDArray[np.float32]:
    return (await scheduler.run(job)).values


def order(engine: ControlledEngine) -> str:
    """Streams of the batches given to the engine, in order."""
    return "".join(chr(batch[0].ids[0]) for batch in engine.batches)


def one_at_a_time() -> ControlledEngine:
    return ControlledEngine(max_in_flight=2, max_batch=2, open_gate=False)


def test_results_come_in_the_order_of_the_job() -> None:
    async def scenario() -> np.ndarray:
        engine = ControlledEngine(max_in_flight=4, max_batch=3)
        return await values(Scheduler(engine), mixed("a", range(1, 12)))

    assert asyncio.run(scenario()).tolist() == list(range(1, 12))


def test_the_engine_never_holds_more_than_max_in_flight() -> None:
    async def scenario() -> int:
        engine = ControlledEngine(max_in_flight=7, max_batch=3, open_gate=False)
        scheduler = Scheduler(engine)
        runs = [asyncio.create_task(values(scheduler, job(name, 10))) for name in "abc"]
        await engine.wait_for_sequences(6)
        held = sum(map(len, engine.batches))
        engine.gate.set()
        await asyncio.gather(*runs)
        return held

    assert asyncio.run(scenario()) == 6


def test_the_engine_is_given_a_few_steps_of_tokens_at_a_time() -> None:
    async def scenario(lengths: list[int]) -> tuple[list[list[int]], int]:
        engine = ControlledEngine(max_in_flight=64, max_batch=16, open_gate=False)
        engine.step_tokens = 10
        scheduler = Scheduler(engine)
        run = asyncio.create_task(values(scheduler, mixed("a", lengths)))
        await engine.wait_for_sequences(1)
        held = scheduler.running
        engine.gate.set()
        await run
        return [lengths_of(batch) for batch in engine.batches], held

    batches, held = asyncio.run(scenario([3] * 40))
    assert batches == [[3] * 3] * 13 + [[3]]
    assert held == 4 * 3  # batches of 9 tokens: a fifth one would exceed four steps of 10
    # A sequence longer than a step is a batch of its own; one longer than four steps enters only an idle engine.
    batches, held = asyncio.run(scenario([4, 4, 4, 25, 8, 50, 1]))
    assert batches == [[4, 4], [4], [25], [8], [50], [1]]
    assert held == 4


def test_interactive_work_overtakes_bulk_work() -> None:
    async def scenario() -> str:
        engine = one_at_a_time()
        scheduler = Scheduler(engine)
        bulk = asyncio.create_task(values(scheduler, job("bulk", 8)))
        await engine.wait_for_sequences(2)

        async def open_gate() -> None:
            engine.gate.set()

        # Tasks begin in the order of their creation: the gate opens after the interactive job has entered the queue.
        await asyncio.gather(bulk, values(scheduler, job("quick", 4, interactive=True)), open_gate())
        return order(engine)

    assert asyncio.run(scenario()) == "bqqbbb"


def test_interactive_work_enters_at_once_if_the_engine_lets_it_overtake() -> None:
    async def scenario() -> tuple[str, list[bool], tuple[int, int]]:
        engine = ControlledEngine(max_in_flight=4, max_batch=2, open_gate=False)
        engine.overtakes = True
        scheduler = Scheduler(engine)
        bulk = asyncio.create_task(values(scheduler, job("bulk", 8)))
        await engine.wait_for_sequences(4)
        quick = asyncio.create_task(values(scheduler, job("quick", 6, interactive=True)))
        await engine.wait_for_sequences(8)
        held = order(engine)  # interactive work has room for max_in_flight of its own
        engine.gate.set()
        await asyncio.gather(bulk, quick)
        return held, engine.urgent, (scheduler.waiting, scheduler.running)

    held, urgent, left = asyncio.run(scenario())
    assert held == "bbqq"
    assert urgent == [False, False, True, True, True, False, False]
    assert left == (0, 0)


def test_two_streams_take_turns_however_many_jobs_one_has() -> None:
    async def scenario() -> str:
        engine = one_at_a_time()
        scheduler = Scheduler(engine)
        runs = [asyncio.create_task(values(scheduler, job("many", 4))) for _ in range(3)]
        runs.append(asyncio.create_task(values(scheduler, job("few", 8))))
        await engine.wait_for_sequences(2)
        engine.gate.set()
        await asyncio.gather(*runs)
        return order(engine)

    # The first batch was admitted before "few" arrived.
    assert asyncio.run(scenario()) == "m" + "mf" * 4 + "m"


def test_streams_share_by_tokens_not_by_pairs() -> None:
    async def scenario() -> str:
        engine = one_at_a_time()
        scheduler = Scheduler(engine)
        runs = [
            asyncio.create_task(values(scheduler, job("long", 8, length=30))),
            asyncio.create_task(values(scheduler, job("short", 8, length=10))),
        ]
        await engine.wait_for_sequences(2)
        engine.gate.set()
        await asyncio.gather(*runs)
        return order(engine)

    # A batch of "long" is 60 tokens, one of "short" 20; the first batch was admitted before "short" arrived.
    assert asyncio.run(scenario()) == "l" + "lsss" + "lsl"


def test_a_cancelled_job_leaves_the_queue_and_the_engine() -> None:
    async def scenario() -> tuple[int, str]:
        engine = one_at_a_time()
        scheduler = Scheduler(engine)
        gone = asyncio.create_task(values(scheduler, job("gone", 100)))
        await engine.wait_for_sequences(2)
        stays = asyncio.create_task(values(scheduler, job("stays", 2)))
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
            await values(scheduler, job("a", 10))
        engine.failure = None
        return await values(scheduler, job("b", 4))

    assert asyncio.run(scenario()).tolist() == [3, 3, 3, 3]


def test_sequences_that_cannot_be_made_fail_their_own_job_only() -> None:
    def broken(positions: NDArray[np.intp]) -> list[TokenSequence]:
        raise ValueError("cannot join")

    async def scenario() -> np.ndarray:
        engine = one_at_a_time()
        engine.gate.set()
        scheduler = Scheduler(engine)
        with pytest.raises(ValueError, match="cannot join"):
            await values(scheduler, Job(Ticket("a", False), np.ones(3, dtype=np.int64), broken))
        return await values(scheduler, job("b", 1))

    assert asyncio.run(scenario()).tolist() == [3]


def test_a_batch_that_is_cancelled_before_it_begins_leaves_the_engine() -> None:
    """The last batch of a job ends; the next job is admitted, and cancelled before the engine is called for it."""

    async def scenario() -> tuple[np.ndarray, int]:
        engine = one_at_a_time()
        scheduler = Scheduler(engine)
        first = asyncio.create_task(values(scheduler, job("first", 2)))
        await engine.wait_for_sequences(2)
        second = asyncio.create_task(values(scheduler, job("second", 2)))
        third = asyncio.create_task(values(scheduler, job("third", 2)))
        first.add_done_callback(lambda _: second.cancel())
        engine.gate.set()
        await asyncio.wait({first, second, third}, timeout=10)
        return await third, scheduler.running

    found, running = asyncio.run(scenario())
    assert found.tolist() == [3, 3]
    assert running == 0


def test_waiting_and_running_sequences_are_counted() -> None:
    async def scenario() -> list[tuple[int, int, bool]]:
        engine = one_at_a_time()
        scheduler = Scheduler(engine)
        seen = []

        def look() -> None:
            seen.append((scheduler.waiting, scheduler.running, scheduler.waiting_since is not None))

        look()
        runs = [asyncio.create_task(values(scheduler, job(name, 5))) for name in "abc"]
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


def padding(*, max_batch: int = 8, batch_tokens: int = 1000) -> ControlledEngine:
    engine = ControlledEngine(max_in_flight=2 * max_batch, max_batch=max_batch, open_gate=False)
    engine.batch_tokens = batch_tokens
    return engine


def lengths_of(batch: Sequence[TokenSequence]) -> list[int]:
    return [len(one.ids) for one in batch]


async def hold(scheduler: Scheduler, engine: ControlledEngine) -> list[asyncio.Task[np.ndarray]]:
    """Fill the engine with two batches, so that later jobs wait until the gate opens."""
    runs = [asyncio.create_task(values(scheduler, job("hold", 1))) for _ in range(2)]
    await engine.wait_for_sequences(2)
    return runs


def test_an_engine_that_pads_gets_full_batches_from_many_small_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    # An endless window: its size must not depend on the measured time of the first batch.
    monkeypatch.setattr("reranker_service.scheduling.window._WINDOW_SECONDS", 1e9)

    async def scenario() -> tuple[list[int], list[list[float]]]:
        engine = padding()
        scheduler = Scheduler(engine)
        runs = [asyncio.create_task(values(scheduler, job(f"{i}", 3, length=i + 1))) for i in range(8)]
        await engine.wait_for_sequences(3)
        engine.gate.set()
        found = [one.tolist() for one in await asyncio.gather(*runs)]
        return [len(batch) for batch in engine.batches], found

    sizes, found = asyncio.run(scenario())
    # One job runs and one is next; the jobs that arrive meanwhile share batches.
    assert sizes == [3, 3, 8, 8, 2]
    assert found == [[i + 1] * 3 for i in range(8)]


def test_a_shared_batch_is_cancelled_only_with_the_last_of_its_jobs() -> None:
    async def scenario() -> tuple[int, list[float], int]:
        engine = padding()
        scheduler = Scheduler(engine, bulk_share=0.25)
        runs = [asyncio.create_task(values(scheduler, job(name, 8))) for name in "ab"]
        runs += [asyncio.create_task(values(scheduler, job(name, 2))) for name in "cde"]
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


def test_a_window_sorts_sequences_of_many_jobs_and_cuts_them_by_tokens() -> None:
    draw = random.Random(0)
    jobs = [[draw.randrange(1, 100) for _ in range(7)] for _ in range(9)]

    async def scenario() -> tuple[list[list[int]], list[list[float]]]:
        engine = padding(max_batch=64, batch_tokens=200)
        scheduler = Scheduler(engine, bulk_share=0.25)
        held = await hold(scheduler, engine)
        runs = [asyncio.create_task(values(scheduler, mixed(f"{i}", lengths))) for i, lengths in enumerate(jobs)]
        # Every task pushes its job before the gate opens.
        await asyncio.sleep(0)
        engine.gate.set()
        found = await asyncio.gather(*runs)
        await asyncio.gather(*held)
        return [lengths_of(batch) for batch in engine.batches[2:]], [one.tolist() for one in found]

    batches, found = asyncio.run(scenario())
    # Longest first: no batch has a sequence longer than any sequence of the batch before it.
    assert all(min(before) >= max(after) for before, after in itertools.pairwise(batches))
    assert all(len(batch) * max(batch) <= 200 for batch in batches)
    # Batches are full: no batch has room for the next sequence.
    assert all((len(one) + 1) * max(one) > 200 for one in batches[:-1])
    assert found == jobs


def test_results_of_a_job_larger_than_a_window_land_in_their_places() -> None:
    draw = random.Random(1)
    lengths = [draw.randrange(1, 50) for _ in range(5000)]

    async def scenario() -> tuple[list[int], list[float]]:
        engine = padding(max_batch=16, batch_tokens=100)
        engine.gate.set()
        found = await values(Scheduler(engine, bulk_share=0.25), mixed("a", lengths))
        return [max(lengths_of(batch)) for batch in engine.batches], found.tolist()

    longest, found = asyncio.run(scenario())
    assert found == lengths
    # The job is sorted as a whole, not window by window.
    assert longest == sorted(longest, reverse=True)


def test_a_sequence_longer_than_the_budget_goes_alone() -> None:
    async def scenario() -> list[list[int]]:
        engine = padding(batch_tokens=10)
        engine.gate.set()
        await Scheduler(engine, bulk_share=0.25).run(mixed("a", [3, 30, 5, 20, 3]))
        return [lengths_of(batch) for batch in engine.batches]

    assert asyncio.run(scenario()) == [[30], [20], [5, 3], [3]]


def test_interactive_work_overtakes_a_filled_window() -> None:
    async def scenario() -> str:
        engine = padding(batch_tokens=6)
        scheduler = Scheduler(engine, bulk_share=0.25)
        # All 8 sequences are in one window, two to a batch; two batches are in the engine.
        bulk = asyncio.create_task(values(scheduler, job("bulk", 8)))
        await engine.wait_for_sequences(4)
        quick = asyncio.create_task(values(scheduler, job("quick", 4, interactive=True)))
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(bulk, quick)
        return order(engine)

    assert asyncio.run(scenario()) == "bbqqbb"


def test_a_cancelled_jobs_share_of_a_window_never_reaches_the_engine() -> None:
    async def scenario() -> tuple[str, list[tuple[int, int]], list[float]]:
        engine = padding(max_batch=32, batch_tokens=12)
        scheduler = Scheduler(engine, bulk_share=0.25)
        held = await hold(scheduler, engine)
        gone = asyncio.create_task(values(scheduler, mixed("gone", [3] * 6)))
        stays = asyncio.create_task(values(scheduler, mixed("stays", [4, 3, 2, 3, 1])))
        await asyncio.sleep(0)
        # One batch ends: the window is filled, and its first batch, of lengths 4, 3 and 3, enters.
        held[0].cancel()
        await engine.wait_for_sequences(5)
        seen = [(scheduler.waiting, scheduler.running)]
        gone.cancel()
        await asyncio.wait({gone})
        seen.append((scheduler.waiting, scheduler.running))
        engine.gate.set()
        found = await stays
        await held[1]
        entered = "".join(chr(one.ids[0]) for batch in engine.batches[3:] for one in batch)
        return entered, seen, found.tolist()

    entered, seen, found = asyncio.run(scenario())
    # Sequences in the window count as waiting.
    assert seen == [(8, 4), (4, 4)]
    assert entered == "ssss"
    assert found == [4, 3, 2, 3, 1]


def test_streams_share_a_padding_engine_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    # A fixed window size: it must not depend on the measured speed of the engine.
    monkeypatch.setattr("reranker_service.scheduling.window._MOST_SEQUENCES", 256)

    async def scenario() -> list[tuple[str, int]]:
        engine = padding(max_batch=256, batch_tokens=300)
        scheduler = Scheduler(engine, bulk_share=0.25)
        held = await hold(scheduler, engine)
        runs = [asyncio.create_task(values(scheduler, job("long", 64, length=30))) for _ in range(40)]
        runs += [asyncio.create_task(values(scheduler, job("short", 64, length=10))) for _ in range(40)]
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(*held, *runs)
        return [(chr(one.ids[0]), len(one.ids)) for batch in engine.batches[2:] for one in batch]

    entered = asyncio.run(scenario())
    assert len(entered) == 2 * 40 * 64
    # Counted while both streams have work. Within a window the long sequences come first, so single batches differ.
    middle = [at for at, (name, _) in enumerate(entered) if name == "s"][20 * 64]
    tokens = {name: sum(length for owner, length in entered[:middle] if owner == name) for name in "ls"}
    assert abs(tokens["l"] - tokens["s"]) <= 0.2 * max(tokens.values())


def test_an_error_in_one_batch_fails_only_the_jobs_in_it() -> None:
    class Failing(ControlledEngine):
        async def run(self, sequences: Sequence[TokenSequence], urgent: bool = False) -> np.ndarray:
            found = await super().run(sequences, urgent)
            if max(lengths_of(sequences)) == 50:
                raise RuntimeError("out of memory")
            return found

    async def scenario() -> tuple[list[object], str, tuple[int, int]]:
        engine = Failing(max_in_flight=16, max_batch=8, open_gate=False)
        engine.batch_tokens = 100
        scheduler = Scheduler(engine, bulk_share=0.25)
        held = await hold(scheduler, engine)
        jobs = [mixed("a", [50, 2, 2]), mixed("b", [45, 30]), mixed("c", [30, 20])]
        runs = [asyncio.create_task(values(scheduler, one)) for one in jobs]
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(*held)
        found = await asyncio.gather(*runs, return_exceptions=True)
        last = "".join(chr(one.ids[0]) for batch in engine.batches[3:] for one in batch)
        return found, last, (scheduler.waiting, scheduler.running)

    found, last, left = asyncio.run(scenario())
    assert [str(one) for one in found[:2]] == ["out of memory"] * 2
    assert np.array_equal(found[2], [30, 20])
    # The second sequence of b may share the batch that entered before the error was known.
    assert last in ("bcc", "cc")
    assert left == (0, 0)


def test_a_score_that_is_not_finite_fails_only_its_own_job() -> None:
    class Overflowing(ControlledEngine):
        async def run(self, sequences: Sequence[TokenSequence], urgent: bool = False) -> np.ndarray:
            found = await super().run(sequences, urgent)
            return finite("model", "float16", np.where(found == 45, np.inf, found).astype(np.float32))

    async def scenario() -> list[object]:
        engine = Overflowing(max_in_flight=16, max_batch=8, open_gate=False)
        engine.batch_tokens = 200
        scheduler = Scheduler(engine, bulk_share=0.25)
        held = await hold(scheduler, engine)
        runs = [asyncio.create_task(values(scheduler, one)) for one in (mixed("a", [50, 2]), mixed("b", [45, 30]))]
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(*held)
        found = await asyncio.gather(*runs, return_exceptions=True)
        assert any({50, 45} <= set(lengths_of(batch)) for batch in engine.batches), "they shared no batch"
        return found

    good, bad = asyncio.run(scenario())
    assert np.array_equal(good, [50, 2])
    assert isinstance(bad, NonFiniteScoreError)


def test_sequences_that_cannot_be_made_fail_only_their_job_in_a_shared_batch() -> None:
    class Broken(Sequence[TokenSequence]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: object) -> TokenSequence:
            raise ValueError("cannot join")

    async def scenario() -> list[object]:
        engine = padding()
        scheduler = Scheduler(engine, bulk_share=0.25)
        held = await hold(scheduler, engine)
        broken = Job(Ticket("a", False), np.array([3, 3]), lambda positions: Broken())
        runs = [asyncio.create_task(values(scheduler, one)) for one in (broken, job("b", 2))]
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(*held)
        return await asyncio.gather(*runs, return_exceptions=True)

    first, second = asyncio.run(scenario())
    assert str(first) == "cannot join"
    assert np.array_equal(second, [3, 3])


def test_a_window_is_half_a_second_of_the_engines_recent_work() -> None:
    pace = Pace()
    # Before a measurement: the fewest sequences.
    assert not pace.fills_window(255, 25_500, 256)
    assert pace.fills_window(256, 25_600, 256)
    pace.add(100_000, 1.0)
    assert not pace.fills_window(499, 49_900, 256)
    assert pace.fills_window(500, 50_000, 256)
    # The fewest sequences also bound the window of a slow engine, and 4,096 the window of a fast one.
    assert not pace.fills_window(255, 90_000, 256)
    pace.add(10_000_000, 1.0)
    assert not pace.fills_window(4095, 409_500, 256)
    assert pace.fills_window(4096, 409_600, 256)


def test_old_work_counts_little_for_the_pace() -> None:
    pace = Pace()
    pace.add(1_000, 10.0)
    for _ in range(100):
        pace.add(10_000, 0.1)
    assert not pace.fills_window(400, 45_000, 256)
    assert pace.fills_window(500, 50_000, 256)


WRONG_RESULTS: dict[str, Callable[[NDArray[np.float32]], object]] = {
    "too few": lambda found: found[:-1],
    "too many": lambda found: np.append(found, 1.0),
    "a number": lambda found: np.float32(1.0),
    "none": lambda found: None,
    "a list": lambda found: found.tolist(),
    "texts": lambda found: found.astype(str),
    "other vectors": lambda found: np.ones((len(found), len(found)), dtype=np.float32),
}


@pytest.mark.parametrize("name", WRONG_RESULTS)
def test_a_wrong_result_of_the_engine_fails_its_batch_and_the_rest_goes_on(name: str) -> None:
    class Wrong(ControlledEngine):
        async def run(self, sequences: Sequence[TokenSequence], urgent: bool = False) -> NDArray[np.float32]:
            found = await super().run(sequences, urgent)
            return WRONG_RESULTS[name](found) if len(self.batches) == 2 else found  # type: ignore[return-value]

    async def scenario() -> tuple[list[object], tuple[int, int]]:
        engine = Wrong(max_in_flight=4, max_batch=2, open_gate=False)
        scheduler = Scheduler(engine, bulk_share=0.25)
        runs = [asyncio.create_task(values(scheduler, job(stream, 3))) for stream in "ab"]
        await engine.wait_for_sequences(3)
        engine.gate.set()
        found = await asyncio.wait_for(asyncio.gather(*runs, return_exceptions=True), 20)
        return found, (scheduler.waiting, scheduler.running)

    (first, second), left = asyncio.run(scenario())
    assert isinstance(first, WrongResultError)
    assert np.array_equal(second, [3, 3, 3])
    assert left == (0, 0)


def test_the_time_without_a_result_is_known_while_the_engine_holds_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("reranker_service.scheduling.scheduler.time", clock)

    async def scenario() -> list[float]:
        nonlocal now
        engine = ControlledEngine(max_in_flight=2, max_batch=2, open_gate=False)
        scheduler = Scheduler(engine, bulk_share=0.25)
        seen = [scheduler.stalled_seconds()]
        first = asyncio.create_task(values(scheduler, job("a", 1)))
        await engine.wait_for_sequences(1)
        now += 7
        seen.append(scheduler.stalled_seconds())
        # A cancelled batch proves nothing of the engine: its time counts on, but not while the engine holds no work.
        first.cancel()
        await asyncio.wait({first})
        now += 100
        seen.append(scheduler.stalled_seconds())
        second = asyncio.create_task(values(scheduler, job("b", 1)))
        await engine.wait_for_sequences(2)
        now += 2
        seen.append(scheduler.stalled_seconds())
        engine.gate.set()
        await second
        now += 5
        return [*seen, scheduler.stalled_seconds()]

    assert asyncio.run(scenario()) == [0, 7, 7, 9, 0]


def test_the_watchdog_reports_a_stall_once_and_its_end() -> None:
    async def scenario() -> list[bool]:
        engine = ControlledEngine(open_gate=False)
        scheduler = Scheduler(engine, bulk_share=0.25)
        reports: asyncio.Queue[bool] = asyncio.Queue()
        watch = asyncio.create_task(watch_stalls(scheduler, 0.05, reports.put))
        await asyncio.sleep(0.2)
        assert reports.empty()
        run = asyncio.create_task(values(scheduler, job("a", 1)))
        seen = [await asyncio.wait_for(reports.get(), 20)]
        await asyncio.sleep(0.2)
        assert reports.empty()
        engine.gate.set()
        seen.append(await asyncio.wait_for(reports.get(), 20))
        await run
        watch.cancel()
        return seen

    assert asyncio.run(scenario()) == [True, False]


class ListedQueue:
    """The rule of ``FairQueue`` by definition: a minimum over all streams, in order of arrival."""

    def __init__(self) -> None:
        self.streams: dict[Hashable, list[Entry]] = {}
        self.served: dict[Hashable, int] = {}

    def push(self, entry: Entry) -> None:
        stream = entry.job.ticket.stream
        self.served.setdefault(stream, min(self.served.values(), default=0))
        self.streams.setdefault(stream, []).append(entry)

    def first(self) -> Entry | None:
        return self.streams[min(self.streams, key=self.served.__getitem__)][0] if self.streams else None

    def drawn(self, entry: Entry, tokens: int) -> None:
        self.served[entry.job.ticket.stream] += tokens
        if entry.drawn == len(entry.job):
            self.remove(entry)

    def remove(self, entry: Entry) -> None:
        stream = entry.job.ticket.stream
        self.streams[stream].remove(entry)
        if not self.streams[stream]:
            del self.streams[stream], self.served[stream]


@pytest.mark.parametrize("seed", range(5))
def test_the_queue_follows_its_rule(seed: int) -> None:
    draw = random.Random(seed)

    async def scenario() -> None:
        queue, listed = FairQueue(), ListedQueue()
        waiting: list[Entry] = []
        for _ in range(4000):
            action = draw.random()
            if action < 0.35:
                lengths = [draw.randrange(1, 9) for _ in range(draw.randrange(1, 40))]
                entry = Entry(mixed(f"{draw.randrange(60)}", lengths), longest_first=draw.random() < 0.5)
                queue.push(entry)
                listed.push(entry)
                waiting.append(entry)
            elif action < 0.45 and waiting:
                entry = waiting.pop(draw.randrange(len(waiting)))
                entry.entered = entry.drawn  # none of its sequences is in a window
                queue.remove(entry)
                listed.remove(entry)
            elif (first := queue.first()) is not None:
                _, tokens = queue.draw(first, draw.randrange(1, 20))
                listed.drawn(first, tokens)
                if first.drawn == len(first.job):
                    waiting.remove(first)
            assert queue.first() is listed.first()

    asyncio.run(scenario())


def test_the_choice_of_the_next_job_takes_no_longer_with_many_waiting_calls() -> None:
    def seconds(calls: int) -> float:
        queue = FairQueue()
        entries = [Entry(job(f"{number}", 2), longest_first=False) for number in range(calls)]
        for entry in entries:
            queue.push(entry)
        began = time.process_time()
        for _ in range(300):
            first = queue.first()
            assert first is not None
            queue.draw(first, 1)
        return time.process_time() - began

    async def scenario() -> float:
        return min(seconds(8000) for _ in range(3)) / min(seconds(400) for _ in range(3))

    assert asyncio.run(scenario()) < 5  # 20 for a search through all calls


async def endless(scheduler: Scheduler, jobs: int) -> None:
    """Run interactive jobs, four at a time, so that one always waits."""

    async def work() -> None:
        for _ in range(jobs // 4):
            await values(scheduler, job("quick", 2, interactive=True))

    await asyncio.gather(*(work() for _ in range(4)))


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25])
def test_bulk_work_gets_its_share_while_interactive_work_never_ends(share: float, pads: bool) -> None:
    async def scenario() -> str:
        engine = padding(max_batch=2, batch_tokens=6) if pads else one_at_a_time()
        scheduler = Scheduler(engine, bulk_share=share)
        bulk = asyncio.create_task(values(scheduler, job("bulk", 200)))
        await engine.wait_for_sequences(2)
        interactive = asyncio.create_task(endless(scheduler, 200))
        await asyncio.sleep(0)
        engine.gate.set()
        await interactive
        seen = order(engine)
        await bulk
        return seen

    seen = asyncio.run(scenario())
    # The batches that entered before the first interactive job, and after the last one, are not counted.
    contested = seen[seen.index("q") : seen.rindex("q")]
    assert contested.count("b") == pytest.approx(share * len(contested), abs=2)


def test_a_burst_of_interactive_work_still_overtakes_all_bulk_work() -> None:
    async def scenario() -> str:
        engine = one_at_a_time()
        scheduler = Scheduler(engine, bulk_share=0.1)
        for _ in range(3):  # a pause between bursts leaves nothing owed
            bulk = asyncio.create_task(values(scheduler, job("bulk", 6)))
            await engine.wait_for_sequences(sum(map(len, engine.batches)) + 2)
            quick = asyncio.create_task(values(scheduler, job("quick", 14, interactive=True)))
            await asyncio.sleep(0)
            engine.gate.set()
            await asyncio.gather(bulk, quick)
            engine.gate.clear()
        return order(engine)

    assert asyncio.run(scenario()) == "bqqqqqqqbb" * 3


def test_a_share_of_bulk_work_overtakes_inside_the_engine_like_interactive_work() -> None:
    async def scenario() -> tuple[str, list[bool]]:
        engine = ControlledEngine(max_in_flight=4, max_batch=2, open_gate=False)
        engine.overtakes = True
        scheduler = Scheduler(engine, bulk_share=0.25)
        bulk = asyncio.create_task(values(scheduler, job("bulk", 8)))
        await engine.wait_for_sequences(4)
        quick = asyncio.create_task(values(scheduler, job("quick", 16, interactive=True)))
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(bulk, quick)
        return order(engine), engine.urgent

    batches, urgent = asyncio.run(scenario())
    assert batches == "bbqqqbqqqbqq"
    assert [one for one, each in zip(urgent, batches, strict=True) if each == "b"] == [False, False, True, True]


def test_small_interactive_batches_count_as_a_part_of_a_full_one() -> None:
    share = BulkShare(0.5, least=10)
    share.give(40, bulk=True, contested=False)
    due = []
    for _ in range(5):
        share.give(1, bulk=False, contested=True)
        due.append(share.is_due())
    assert due == [False, False, False, True, True]
    share.give(40, bulk=True, contested=True)
    share.give(30, bulk=False, contested=True)
    assert share.is_due()  # 10 of the fifth batch, and 30
    share.give(1, bulk=False, contested=False)
    assert not share.is_due()
