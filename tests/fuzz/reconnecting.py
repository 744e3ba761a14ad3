"""Reconnecting: how a client bears with a server that listens anew."""

from __future__ import annotations

import grpc

LOST = (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
"""Statuses of calls whose connection was lost; every client tries them again."""
# gRPC otherwise waits for a second before it connects again.
RECONNECT = [
    ("grpc.use_local_subchannel_pool", 1),
    *((f"grpc.{name}_reconnect_backoff_ms", 100) for name in ("initial", "min", "max")),
]
"""Options of a channel of its own that connects again at once."""
