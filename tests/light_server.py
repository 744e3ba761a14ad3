"""Servers that serve nothing and start at once, to test ``--replicas``: run with ``python -m tests.light_server``.

The supervisor is the real one. A server says that it is ready, and waits for SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys

from reranker_service.observing.notify import notify_ready


def serve(flags: list[str]) -> None:
    """Take the part of one server."""
    # Before it says that it is ready: SIGTERM may follow at once.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    (port,) = [flag.removeprefix("--port=") for flag in flags if flag.startswith("--port=")]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    print(f"event=light pid={os.getpid()} port={port} cores={cores}", file=sys.stderr, flush=True)
    notify_ready(f"127.0.0.1:{port}")
    signal.sigwait({signal.SIGTERM})


def main() -> None:
    """Run the supervisor, or one of its servers."""
    if "--replicas=1" in sys.argv:
        serve(sys.argv[1:])
        return
    from reranker_service import __main__

    __main__.main()


if __name__ == "__main__":
    main()
