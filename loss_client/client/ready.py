"""Readiness: waits until a server serves its model, with reports on the way."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from loss_client.client.calls import Calls
from loss_client.client.channels import Channels
from loss_client.client.options import positive_seconds
from loss_client.client.patience import Patience
from reranker.v1 import reranker_pb2 as pb

_logger = logging.getLogger(__name__)

_STALL_SECONDS = 5.0
_REPORT_SECONDS = 5.0


def wait_until_ready(
    calls: Calls, timeout: float, on_progress: Callable[[str], object] | None
) -> pb.GetModelInfoResponse:
    """Wait until a server serves its model; see ``RerankerClient.wait_until_ready``."""
    last = "no answer yet"

    def note(failure: str) -> None:
        nonlocal last
        last = failure

    async def work(channels: Channels) -> pb.GetModelInfoResponse:
        patience = Patience(seconds, min(_STALL_SECONDS, seconds))
        ask = pb.GetModelInfoRequest()
        found: pb.GetModelInfoResponse = await channels.call(
            lambda stub: stub.GetModelInfo, ask, patience, on_failure=note
        )
        return found

    seconds, begun = positive_seconds("timeout", timeout), time.monotonic()

    def report() -> None:
        text = f"waited {time.monotonic() - begun:.0f} s of {seconds:g} s for the reranker: {last}"
        if on_progress is None:
            _logger.info("%s", text)
        else:
            on_progress(text)

    return calls.wait(work, report, _REPORT_SECONDS)
