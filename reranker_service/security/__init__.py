"""Security: TLS, tokens, and the refusal to listen beyond loopback without them."""

from __future__ import annotations

from .files import SecurityError
from .guard import Guard
from .request_ids import RequestIds

__all__ = ["Guard", "RequestIds", "SecurityError"]
