"""A job's run: stream after stream until no pair is left, or unary calls where the server has no streams."""

from __future__ import annotations

import asyncio
from functools import partial

from loss_client.client.batch import score_in_batches
from loss_client.client.channels import Channels, is_unimplemented
from loss_client.client.errors import ClientClosedError, RerankerError
from loss_client.client.job import Job
from loss_client.client.patience import Patience
from loss_client.client.progress import Progress
from loss_client.client.stream import score_on_stream


async def run_job(job: Job, channels: Channels) -> None:
    """Score a job. Its matrix gets every score, or the error that ended the job."""
    try:
        await channels.queue.begin(job.place)
        progress, patience = Progress(job), Patience(job.timeout, job.stall_timeout)
        attempt = partial(score_on_stream, job, progress, partial(channels.turns.agree, job.pin))
        while progress.pairs_left:
            try:
                await channels.run(attempt, patience, progress.describe, job.pin)
            except RerankerError as error:
                if not is_unimplemented(error):
                    raise
                await score_in_batches(job, progress, channels, patience)
                return
    except asyncio.CancelledError:
        # Without effect where the caller cancelled the job: ``ScoreMatrix.cancel`` set its error before.
        job.matrix.fail(ClientClosedError("the client was closed before these scores arrived"))
        raise
    except Exception as error:  # a bug as well: otherwise readers of the matrix would wait for ever
        job.matrix.fail(error)
