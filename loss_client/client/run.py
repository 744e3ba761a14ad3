"""A job's run: streams until no pair is left, or unary calls where the server has no streams."""

from __future__ import annotations

import asyncio

from loss_client.client.channels import Channels
from loss_client.client.errors import ClientClosedError
from loss_client.client.job import Job
from loss_client.client.spread import Spread


async def run_job(job: Job, channels: Channels) -> None:
    """Score a job. Its matrix gets every score, or the error that ended the job."""
    try:
        await channels.queue.begin(job.place)
        await Spread(job, channels).run()
    except asyncio.CancelledError:
        # Without effect where the caller cancelled the job: ``ScoreMatrix.cancel`` set its error before.
        job.matrix.fail(ClientClosedError("the client was closed before these scores arrived"))
        raise
    except Exception as error:  # a bug as well: otherwise readers of the matrix would wait for ever
        job.matrix.fail(error)
