"""The real server, whose port another program takes when it is free: run with ``python -m tests.unbindable``."""

from __future__ import annotations

from unittest import mock

from reranker_service import __main__
from reranker_service.rpc import listener


def main() -> None:
    """Run the server; it can bind its port only once."""
    restart = listener.Listener._restart

    async def hindered(self: listener.Listener) -> None:
        self._bind = mock.Mock(side_effect=RuntimeError("taken"))
        await restart(self)

    with (
        mock.patch.object(listener.Listener, "_restart", hindered),
        mock.patch.object(listener, "_REBIND_SECONDS", 0.1),
    ):
        __main__.main()


if __name__ == "__main__":
    main()
