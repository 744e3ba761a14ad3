"""The real server where the hub never answers: run with ``python -m tests.hanging``."""

from __future__ import annotations

import sys
import threading
from unittest import mock

from reranker_service import __main__


def _download(*_: object, **__: object) -> str:
    print("event=downloading", file=sys.stderr, flush=True)
    threading.Event().wait()
    raise AssertionError("the event is never set")


if __name__ == "__main__":
    with mock.patch("huggingface_hub.snapshot_download", _download):
        __main__.main()
