"""Spread: runs the streams of one job, the first with retries and one more at each server for which there are chunks.

The first stream follows the rules of every call: attempts in turn, backoff, deadline, errors. The others help: each is
one attempt at a server that the job does not use yet. A server whose attempt failed rests, and is then used again.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from functools import partial

from loss_client.client.batch import score_in_batches
from loss_client.client.channels import Channels, is_unimplemented
from loss_client.client.endpoints import Endpoint
from loss_client.client.errors import RerankerError
from loss_client.client.job import Job
from loss_client.client.patience import Patience
from loss_client.client.progress import Progress
from loss_client.client.stream import score_on_stream
from loss_client.client.streams import Streams
from loss_client.client.window import first_pairs

# Time after which a job with free chunks looks again for servers, such as one that has rested.
_LOOK_SECONDS = 0.1
# Time after which a job looks for new addresses of host names.
_LOOK_FOR_NAMES_SECONDS = 0.5
# Longest time that a stream waits for the one before it, at the same address, to open.
_OPEN_SECONDS = 0.5
# Time that streams have to end in order once the job has all scores.
_END_SECONDS = 0.5


class Spread:
    """The streams of one job and the servers that they use.

    Args:
        job: The job.
        channels: The servers.
    """

    def __init__(self, job: Job, channels: Channels) -> None:
        self._job = job
        self._channels = channels
        self._changed = asyncio.Event()
        self._progress = Progress(job)
        self._streams = Streams(self._progress, self._changed.set, parallel=channels.look())
        self._patience = Patience(job.timeout, job.stall_timeout)
        self._attempt = partial(score_on_stream, job, self._streams, partial(channels.turns.agree, job.pin))
        self._busy: set[Endpoint] = set()
        self._without_streams: set[Endpoint] = set()
        self._helpers: dict[asyncio.Task[None], Endpoint] = {}
        self._opening: dict[Endpoint, float] = {}  # endpoints without an open stream, and since when

    async def run(self) -> None:
        """Score all pairs of the job.

        Raises:
            RerankerError: The job failed.
        """
        try:
            await self._score()
        except RerankerError as error:
            if not is_unimplemented(error):
                raise
            await score_in_batches(self._job, self._progress, self._channels, self._patience)

    async def _score(self) -> None:
        first = asyncio.get_running_loop().create_task(self._first())
        first.add_done_callback(lambda _: self._changed.set())
        try:
            while self._progress.pairs_left and not first.done():
                self._changed.clear()
                self._end_helpers()
                self._channels.look()
                if self._streams.parallel:
                    self._begin_helpers()
                await self._wait_for_change()
            if first.done():
                first.result()
            await asyncio.wait({first, *self._helpers}, timeout=_END_SECONDS)
        finally:
            tasks = {first, *self._helpers}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _first(self) -> None:
        while self._progress.pairs_left:
            await self._channels.run(
                self._attempt, self._patience, self._progress.describe, self._job.pin, busy=self._busy
            )

    def _begin_helpers(self) -> None:
        progress = self._progress
        if not progress.pairs_free:
            return
        # Streams that still open will take as many chunks as any stream begins with.
        windows = [one.window for one in self._streams.members if one.window is not None]
        usual = first_pairs(progress.chunk_pairs)
        room = sum(max(window.pairs - window.in_flight, 0) for window in windows)
        room += usual * (len(self._busy) - len(windows))
        wanted = math.ceil((progress.pairs_free - room) / usual)
        now = asyncio.get_running_loop().time()
        spare = self._channels.turns.spare(self._job.pin, self._busy | self._without_streams, now)
        opening = self._addresses_that_open(now)
        for endpoint in spare:
            if wanted <= 0:
                break
            if endpoint.address.target in opening:
                continue
            wanted -= 1
            opening.add(endpoint.address.target)
            self._busy.add(endpoint)
            patience = self._patience.branch()
            helper = asyncio.get_running_loop().create_task(self._channels.help(self._attempt, endpoint, patience))
            self._helpers[helper] = endpoint
            helper.add_done_callback(lambda _: self._changed.set())

    def _addresses_that_open(self, now: float) -> set[str]:
        """Return the addresses at which a stream is opening and has not been for long.

        A proxy behind an address chooses the server with the fewest streams. Envoy counts a stream once it is connected
        to its server: of 16 streams that were opened at once, one of eight servers got ten.
        """
        opened = {one.endpoint for one in self._streams.members if one.window is not None}
        self._opening = {one: self._opening.get(one, now) for one in self._busy - opened}
        return {one.address.target for one, since in self._opening.items() if now - since < _OPEN_SECONDS}

    def _end_helpers(self) -> None:
        """Free the endpoints of helpers that have ended. Raises ``RerankerError`` if one failed for good."""
        for helper in [helper for helper in self._helpers if helper.done()]:
            endpoint = self._helpers.pop(helper)
            self._busy.discard(endpoint)
            try:
                helper.result()
            except RerankerError as error:
                if not is_unimplemented(error):
                    raise
                self._without_streams.add(endpoint)

    async def _wait_for_change(self) -> None:
        seconds = _LOOK_FOR_NAMES_SECONDS if self._channels.may_change else None
        if self._streams.parallel and self._progress.pairs_free:
            seconds = _LOOK_SECONDS
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
