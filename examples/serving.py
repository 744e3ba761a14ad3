"""Reranker server in a child process, started and ended by a ``with`` block."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from examples.processes import Child


def server_command(*flags: str, module: str = "reranker_service") -> list[str]:
    """The command that starts a server on a free loopback port; ``module`` may be one that wraps the server."""
    return [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", "0", "--log-format", "logfmt", *flags]


@contextmanager
def reranker_server(log_path: Path, engine: str = "auto", flags: Sequence[str] = ()) -> Iterator[Child]:
    """Start ``python -m reranker_service`` on a free loopback port, and end it with the block.

    The block begins at once, while the server still loads; ``Child.wait_ready`` gives the address.

    Args:
        log_path: Where the server's log goes; the directory must exist.
        engine: ``"auto"``, ``"vllm"`` or ``"torch"``.
        flags: More flags of the server, such as ``["--model", "path/to/model"]``.
    """
    server = Child(server_command("--engine", engine, *flags), log_path, name="The reranker server")
    try:
        yield server
    finally:
        server.stop()
