"""HTTP/2 frames written by hand, for requests that no gRPC client sends (RFC 9113, RFC 7541)."""

from __future__ import annotations

import socket
from collections.abc import Sequence

_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 1, 4
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One frame."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def headers(stream: int, fields: Sequence[tuple[bytes, bytes]], *, end_stream: bool = False) -> bytes:
    """A HEADERS frame of literal fields, never indexed and without Huffman coding, each shorter than 127 bytes."""
    block = b"".join(b"\x10" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields)
    return frame(_HEADERS, _END_HEADERS | (_END_STREAM if end_stream else 0), stream, block)


def call_headers(stream: int, path: bytes, *more: tuple[bytes, bytes], end_stream: bool = False) -> bytes:
    """The HEADERS frame that begins a gRPC call of ``path``."""
    fields = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        *more,
    ]
    return headers(stream, fields, end_stream=end_stream)


def message(stream: int, payload: bytes, *, compressed: bool = False, end_stream: bool = True) -> bytes:
    """DATA frames of 16 KiB at most that carry one gRPC message."""
    data = bytes([compressed]) + len(payload).to_bytes(4, "big") + payload
    parts = [data[start : start + 16384] for start in range(0, len(data), 16384)]
    return b"".join(
        frame(_DATA, _END_STREAM if end_stream and part is parts[-1] else 0, stream, part) for part in parts
    )


def connect(address: str) -> socket.socket:
    """A connection to ``HOST:PORT``, with preface and SETTINGS sent."""
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(_PREFACE + frame(_SETTINGS, 0, 0, b""))
    return connection
