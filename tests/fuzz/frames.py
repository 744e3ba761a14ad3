"""Frames: connections that break HTTP/2 and gRPC, by hand-written bytes.

Each attack gets a connection factory and a seeded generator, and may leave its connections open. While all of them run
the server answers health checks, and its memory stays inside a bound.
"""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Callable, Mapping

from reranker.v1 import reranker_pb2 as pb

from .. import http2
from .mutation import varint
from .target import HEALTH_SECONDS, MIB, TEXTS, Target, Watch

GROWTH = 96 * MIB
"""Bound of the growth of the server's memory while one attack runs and its connections stay open."""
# gRPC keeps the fields of a header block until it refuses them: 16 KiB of references to fields take up to 1.4 MiB.
GROWTHS = {"large_headers": 384 * MIB, "continuation_flood": 192 * MIB}
"""Bounds of attacks on gRPC's parser of headers."""

_DATA, _HEADERS, _PRIORITY, _RST, _SETTINGS, _PUSH, _PING, _GOAWAY, _WINDOW, _CONTINUATION = range(10)
_END_STREAM, _END_HEADERS, _PADDED = 1, 4, 8
_RERANK = b"/reranker.v1.RerankerService/Rerank"
_STREAM = b"/reranker.v1.RerankerService/RerankStream"
_REQUEST = pb.RerankRequest(query=TEXTS[0], documents=TEXTS[1:3]).SerializeToString()
_LARGEST = 8 * MIB
_REFUSED_SECONDS = 2.0


class Connections:
    """Connections of one attack; closed together."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._open: list[socket.socket] = []

    def connect(self, *, preface: bool = True) -> Connection:
        """Open a connection, with preface and SETTINGS sent unless asked otherwise."""
        host, _, port = self._address.rpartition(":")
        deadline = time.monotonic() + _REFUSED_SECONDS
        while True:
            try:
                made = http2.connect(self._address) if preface else socket.create_connection((host, int(port)))
                break
            except ConnectionError:
                # A path that is not UTF-8 makes the server listen anew.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        made.settimeout(2)
        self._open.append(made)
        return Connection(made)

    def close(self) -> None:
        """Close all connections."""
        for one in self._open:
            one.close()


class Connection:
    """A connection whose peer may close it at any time."""

    def __init__(self, made: socket.socket) -> None:
        self._socket = made

    def send(self, data: bytes) -> bool:
        """Send bytes; returns whether the server still takes them."""
        try:
            self._socket.sendall(data)
        except OSError:
            return False
        return True

    def drain(self, seconds: float = 0.05) -> bytes:
        """Read what the server has sent, until it is silent for a moment."""
        self._socket.settimeout(seconds)
        data = b""
        with contextlib.suppress(OSError):
            while part := self._socket.recv(1 << 16):
                data += part
        with contextlib.suppress(OSError):
            self._socket.settimeout(2)
        return data


Attack = Callable[[Connections, random.Random, int], None]
"""Connections, generator, and how often the attack does what it does."""


def _call(stream: int = 1, *more: tuple[bytes, bytes], path: bytes = _RERANK) -> bytes:
    return http2.call_headers(stream, path, *more) + http2.message(stream, _REQUEST)


def no_http2(connections: Connections, draw: random.Random, times: int) -> None:
    """Bytes that are no HTTP/2: other protocols, noise, and half a preface."""
    for _ in range(times):
        connection = connections.connect(preface=False)
        connection.send(
            draw.choice(
                (
                    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(500),
                    b"PRI * HTTP/2.0\r\n\r\nSM\r\n",
                    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + draw.randbytes(9),
                    draw.randbytes(draw.randrange(1, 3000)),
                    b"",
                )
            )
        )


def random_frames(connections: Connections, draw: random.Random, times: int) -> None:
    """Frames of random kinds, known and unknown, with random flags, streams and payloads."""
    connection = connections.connect()
    for _ in range(times):
        kind = draw.choice((draw.randrange(10), draw.randrange(256)))
        stream = draw.choice((0, 1, 2, 3, (1 << 31) - 1, 1 << 31))
        payload = draw.randbytes(draw.choice((0, 4, 5, 6, 8, 40, 300, 16384, 16385)))
        if not connection.send(http2.frame(kind, draw.randrange(256), stream, payload)):
            connection = connections.connect()


def damaged_calls(connections: Connections, draw: random.Random, times: int) -> None:
    """Right calls with flipped, missing and additional bytes."""
    for _ in range(times):
        data = bytearray(_call())
        for _ in range(draw.choice((1, 2, 8))):
            place = draw.randrange(len(data))
            match draw.randrange(3):
                case 0:
                    data[place] ^= 1 << draw.randrange(8)
                case 1:
                    del data[place]
                case 2:
                    data.insert(place, draw.randrange(256))
        connections.connect().send(bytes(data))


def unknown_frames(connections: Connections, draw: random.Random, times: int) -> None:
    """Frames of unknown kinds, which a server must ignore."""
    connection = connections.connect()
    for _ in range(times):
        connection.send(http2.frame(draw.randrange(11, 256), 0, draw.choice((0, 1)), bytes(64)) * 16)


def settings_flood(connections: Connections, draw: random.Random, times: int) -> None:
    """SETTINGS frames whose acknowledgements are not read, and SETTINGS with values that are not allowed."""
    connection = connections.connect()
    for _ in range(times):
        kind, value = (
            draw.choice((1, 2, 3, 4, 5, 6, 0xFE03, 77)),
            draw.choice((0, 1, 1 << 14, (1 << 24), (1 << 32) - 1)),
        )
        frame = http2.frame(_SETTINGS, 0, 0, kind.to_bytes(2, "big") + value.to_bytes(4, "big"))
        if not connection.send(draw.choice((http2.frame(_SETTINGS, 0, 0, b""), frame)) * 50):
            connection = connections.connect()


def ping_flood(connections: Connections, draw: random.Random, times: int) -> None:
    """PING frames whose replies are not read."""
    connection = connections.connect()
    for _ in range(times):
        if not connection.send(http2.frame(_PING, 0, 0, draw.randbytes(8)) * 100):
            connection = connections.connect()


def reset_flood(connections: Connections, draw: random.Random, times: int) -> None:
    """Calls that are reset as soon as they begin (rapid reset)."""
    connection, stream = connections.connect(), 1
    for _ in range(times):
        reset = draw.choice((8, 0, 7)).to_bytes(4, "big")
        data = b"".join(
            _call(one, path=draw.choice((_RERANK, _STREAM))) + http2.frame(_RST, 0, one, reset)
            for one in range(stream, stream + 100, 2)
        )
        stream += 100
        if not connection.send(data):
            connection, stream = connections.connect(), 1


def continuation_flood(connections: Connections, draw: random.Random, times: int) -> None:
    """Headers that never end."""
    connection = connections.connect()
    connection.send(http2.frame(_HEADERS, 0, 1, b""))
    field = b"\x10\x01x\x7f" + varint(16000 - 127 - 10) + b"v" * (16000 - 10)
    for _ in range(times):
        payload = draw.choice((b"", b"\x10\x01x\x01y" * 3000, field))
        if not connection.send(http2.frame(_CONTINUATION, 0, 1, payload)):
            connection = connections.connect()
            connection.send(http2.frame(_HEADERS, 0, 1, b""))


def large_headers(connections: Connections, draw: random.Random, times: int) -> None:
    """Metadata beyond the limit, and small headers that refer to large ones again and again."""
    for number in range(times):
        connection = connections.connect()
        large = b"\x40\x01x\x7f" + varint(4000 - 127) + b"v" * 4000  # kept in the table of the connection
        again = b"\xbe" * draw.choice((1, 100, 16000))
        block = http2.call_headers(1, _RERANK)[9:] + large + again
        connection.send(http2.frame(_HEADERS, _END_HEADERS, 1, block[:16384]) + http2.message(1, _REQUEST))
        if number % 2:
            for stream in range(3, 23, 2):
                block = http2.call_headers(stream, _RERANK)[9:] + again[:8000]
                connection.send(http2.frame(_HEADERS, _END_HEADERS, stream, block))
            connection.drain()


def bad_paths(connections: Connections, draw: random.Random, times: int) -> None:
    """Paths of no RPC, some of which are no paths."""
    paths = (b"", b"/", b"*", b"//", b"no/slash", b"/reranker.v1.RerankerService", _RERANK + b"/", _RERANK + b"?x=1")
    odd = (b"/" + b"a" * 100, b"/\x00/\x00", b"/a\r\nb/c", "/naïve/–".encode(), b"/../../etc/passwd", b"/%ff/%00")
    for number in range(times):
        connection = connections.connect()
        connection.send(b"".join(_call(stream, path=draw.choice(paths + odd)) for stream in range(1, 21, 2)))
        if number % 16 == 0:
            # The server then listens anew, which ends the connections that have no call.
            connections.connect().send(_call(1, path=draw.choice((b"/\xff\xfe/x", b"\xc3\x28"))))


def bad_headers(connections: Connections, draw: random.Random, times: int) -> None:
    """Calls whose headers are missing, twice there, or have values that gRPC does not know."""
    fields = (
        *((b"grpc-timeout", one) for one in (b"", b"0n", b"-1S", b"99999999999999H", b"1", b"abc", b"1e9S", b"1S1S")),
        *((b"grpc-encoding", one) for one in (b"gzip", b"deflate", b"nonsense", b"identity,gzip", b"\xff")),
        *((b"content-type", one) for one in (b"", b"text/html", b"application/grpc+json", b"application/grpcx")),
        *((b"te", one) for one in (b"", b"gzip")),
        *((b":method", one) for one in (b"GET", b"PUT", b"", b"CONNECT")),
        *((b":scheme", one) for one in (b"ftp", b"")),
        *((b":authority", one) for one in (b"", b"a" * 100)),
        *((b":unknown", b"x"), (b"Upper", b"x"), (b"space name", b"x"), (b"", b"x"), (b"connection", b"close")),
        *((b"x-request-id", b"\x01\x02"), (b"authorization", b"Bearer "), (b"grpc-status-details-bin", b"!!!!")),
        *((b"traceparent", b"00-zz"), (b"content-length", b"-1"), (b"transfer-encoding", b"chunked")),
    )
    for _ in range(times):
        connection = connections.connect()
        for stream in range(1, 41, 2):
            chosen = draw.sample(fields, draw.randint(1, 3))
            if draw.random() < 0.5:
                head = http2.call_headers(stream, _RERANK, *chosen)
            else:
                head = http2.headers(stream, [*chosen, (b":path", _RERANK)])
            compressed = draw.random() < 0.3
            if not connection.send(head + http2.message(stream, _REQUEST, compressed=compressed)):
                break


def window_games(connections: Connections, draw: random.Random, times: int) -> None:
    """Windows that are closed, too large, or opened by nothing, around calls with replies."""
    for _ in range(times):
        connection = connections.connect()
        size = draw.choice((0, 1, (1 << 31) - 1, 1 << 31))
        setting = http2.frame(_SETTINGS, 0, 0, (4).to_bytes(2, "big") + size.to_bytes(4, "big"))
        connection.send(setting + b"".join(_call(stream) for stream in range(1, 11, 2)))
        for stream in (0, 1, 3, 99):
            step = draw.choice((0, 1, (1 << 31) - 1)).to_bytes(4, "big")
            connection.send(http2.frame(_WINDOW, 0, stream, step) * 3)
        connection.send(http2.call_headers(41, b"/grpc.health.v1.Health/Watch") + http2.message(41, b""))


def wrong_streams(connections: Connections, draw: random.Random, times: int) -> None:
    """Frames of streams that do not exist, are over, or may not be a client's."""
    for _ in range(times):
        connection = connections.connect()
        frames = [
            http2.frame(_DATA, 0, 0, b"x"),
            http2.frame(_DATA, _END_STREAM, 7, b"x"),
            http2.frame(_DATA, _PADDED, 1, b"\xffx"),
            http2.frame(_HEADERS, _END_HEADERS, 2, http2.call_headers(2, _RERANK)[9:]),
            http2.frame(_PRIORITY, 0, 1, (1).to_bytes(4, "big") + b"\x10"),
            http2.frame(_PUSH, _END_HEADERS, 1, (2).to_bytes(4, "big") + b"\x82"),
            http2.frame(_GOAWAY, 0, 0, bytes(8)),
            http2.frame(_RST, 0, 0, bytes(4)),
            http2.frame(_RST, 0, 1, bytes(3)),
            http2.frame(_WINDOW, 0, 0, bytes(4)),
            http2.frame(_CONTINUATION, _END_HEADERS, 1, b"\x82"),
            _call(1),
            _call(1),
            _call(3, path=_STREAM),
        ]
        draw.shuffle(frames)
        for one in frames:
            if not connection.send(one):
                break


def half_sent(connections: Connections, draw: random.Random, times: int) -> None:
    """Messages that promise up to 4 GiB and send little or nothing more, on connections that stay open."""
    for _ in range(times):
        connection = connections.connect()
        for stream in range(1, 17, 2):
            promised = draw.choice((_LARGEST, _LARGEST, _LARGEST - 1, _LARGEST + 1, (1 << 32) - 1, 1))
            head = http2.call_headers(stream, draw.choice((_RERANK, _STREAM)))
            prefix = bytes([draw.choice((0, 0, 1, 255))]) + promised.to_bytes(4, "big")
            connection.send(head + http2.frame(_DATA, 0, stream, prefix + bytes(draw.choice((0, 1, 4000)))))
            if draw.random() < 0.2:
                connection.send(http2.frame(_DATA, _END_STREAM, stream, b""))


def empty_data(connections: Connections, draw: random.Random, times: int) -> None:
    """Empty and padded DATA frames, and a message that comes byte by byte."""
    connection = connections.connect()
    connection.send(http2.call_headers(1, _STREAM))
    for _ in range(times):
        frame = draw.choice((http2.frame(_DATA, 0, 1, b""), http2.frame(_DATA, _PADDED, 1, b"\x40" + bytes(64))))
        if not connection.send(frame * 100):
            connection = connections.connect()
            connection.send(http2.call_headers(1, _STREAM))
    slow = connections.connect()
    slow.send(http2.call_headers(1, _RERANK))
    for byte in http2.message(1, _REQUEST)[9:]:
        slow.send(http2.frame(_DATA, 0, 1, bytes([byte])))
    slow.send(http2.frame(_DATA, _END_STREAM, 1, b""))


def many_connections(connections: Connections, draw: random.Random, times: int) -> None:
    """Connections that are opened, and closed or left."""
    for _ in range(times):
        one = Connections(connections._address)
        one.connect(preface=draw.random() < 0.5)
        one.close()
    for _ in range(min(times, 200)):
        connections.connect(preface=draw.random() < 0.5)


ATTACKS: Mapping[str, tuple[Attack, int]] = {
    one.__name__: (one, times)
    for one, times in (
        (no_http2, 400),
        (random_frames, 6000),
        (damaged_calls, 1500),
        (unknown_frames, 2000),
        (settings_flood, 2000),
        (ping_flood, 2000),
        (reset_flood, 400),
        (continuation_flood, 8000),
        (large_headers, 60),
        (bad_paths, 96),
        (bad_headers, 200),
        (window_games, 60),
        (wrong_streams, 150),
        (half_sent, 48),
        (empty_data, 1000),
        (many_connections, 1000),
    )
}
"""The attacks, by name, and how often each does what it does in the full form."""


def run(target: Target, name: str, seed: int, part: float = 1.0, seconds: float = HEALTH_SECONDS) -> Watch:
    """Run an attack, and check health and memory meanwhile and the scores afterwards.

    Args:
        target: The server.
        name: Name of the attack.
        seed: Seed of its generator.
        part: Part of the full form.
        seconds: Longest time that a health check may take.
    """
    attack, times = ATTACKS[name]
    connections = Connections(target.address)
    try:
        with target.watched() as watch:
            attack(connections, random.Random(f"{seed} {name}"), max(int(times * part), 2))
            target.check_scores()
            time.sleep(0.2)
    finally:
        connections.close()
    watch.check(GROWTHS.get(name, GROWTH), seconds)
    return watch
