"""Endpoint: one target of a client with its channel, its check of the contract, and its backoff after failures."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
from grpc import aio

from loss_client.client.credentials import Credentials
from loss_client.client.errors import IncompatibleServerError, RerankerError
from loss_client.client.targets import Target
from reranker.v1 import reranker_pb2, reranker_pb2_grpc

if TYPE_CHECKING:
    from reranker.v1.reranker_pb2_grpc import RerankerServiceAsyncStub

CONTRACT_MAJOR = 1
# Short enough to find a restarted server within seconds, long enough not to flood one that is down.
_FIRST_BACKOFF_SECONDS = 0.1
_LONGEST_BACKOFF_SECONDS = 5.0
_CHANNEL_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # The client retries itself, because a retry sends only chunks without an answer.
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5000),
    # gRPC servers by default close connections that ping more often than every five minutes.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # One name may stand for many servers; streams spread over them.
    ("grpc.lb_policy_name", "round_robin"),
)


@dataclass(frozen=True, slots=True)
class ChannelSettings:
    """Settings of all channels of a client.

    Attributes:
        targets: The servers, at least one.
        metadata: Pairs of key and value, sent with every call.
        credentials: Token and certificates.
    """

    targets: tuple[Target, ...]
    metadata: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # it may hold secrets
    credentials: Credentials = field(default_factory=Credentials)


class Endpoint:
    """One target with its channel, which is made at first use, and its failures since the last success."""

    def __init__(self, target: Target, settings: ChannelSettings) -> None:
        self.target = target
        self.credentials = settings.credentials
        self.failures = 0
        self.ready_at = 0.0  # loop time before which it is not tried
        self._metadata = settings.metadata
        self._channel: aio.Channel | None = None
        self._stub: RerankerServiceAsyncStub | None = None
        self._checked = False

    @property
    def metadata(self) -> aio.Metadata:
        """The metadata of a call, with the token. Raises ``RerankerError`` if the token's file has become unusable."""
        try:
            return aio.Metadata(*self._metadata, *self.credentials.metadata())
        except ValueError as error:
            raise RerankerError(str(error)) from None

    async def stub(self, timeout: float) -> RerankerServiceAsyncStub:
        """Return the stub; at the first use of a connection, check the server's contract before.

        Args:
            timeout: Most seconds of the check.

        Raises:
            IncompatibleServerError: The server has another major version of the contract, or no reranker service.
            grpc.aio.AioRpcError: The server did not answer.
        """
        if self._channel is None:
            if self.target.secure:
                credentials = self.credentials.channel()
                self._channel = aio.secure_channel(self.target.address, credentials, options=_CHANNEL_OPTIONS)
            else:
                self._channel = aio.insecure_channel(self.target.address, options=_CHANNEL_OPTIONS)
            self._stub = reranker_pb2_grpc.RerankerServiceStub(self._channel)
        stub = self._stub
        assert stub is not None  # made together with the channel
        if not self._checked:
            await self._check(stub, timeout)
            self._checked = True
        return stub

    async def _check(self, stub: RerankerServiceAsyncStub, timeout: float) -> None:
        try:
            request = reranker_pb2.GetModelInfoRequest()
            info = await stub.GetModelInfo(request, timeout=timeout, metadata=self.metadata)
        except aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise IncompatibleServerError(f"{self.target} does not serve reranker.v1.RerankerService") from None
            raise
        if info.contract.major != CONTRACT_MAJOR:
            raise IncompatibleServerError(
                f"{self.target} speaks contract {info.contract.major}.{info.contract.minor}; this client needs "
                f"{CONTRACT_MAJOR}.x: use a server and a client of the same major version"
            )

    def succeeded(self) -> None:
        """Reset the backoff after an answer."""
        self.failures = 0
        self.ready_at = 0.0

    def failed(self, now: float) -> None:
        """Set the time of the next attempt: exponential backoff with full jitter.

        Args:
            now: The loop's time.
        """
        longest = min(_LONGEST_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2**self.failures)
        self.failures = min(self.failures + 1, 16)
        self.ready_at = now + random.uniform(0, longest)
        self._checked = False  # a restarted server may have another version

    async def close(self) -> None:
        """Close the channel, if there is one; the next use makes another."""
        channel, self._channel, self._stub = self._channel, None, None
        if channel is not None:
            await channel.close()
