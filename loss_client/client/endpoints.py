"""Endpoint: one address of a client with its channel, its check of the contract, and its times of rest."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import SystemRandom
from typing import TYPE_CHECKING

import grpc
from grpc import aio

from loss_client.client.addresses import Address
from loss_client.client.credentials import Credentials
from loss_client.client.errors import IncompatibleServerError, RerankerError
from reranker.v1 import reranker_pb2, reranker_pb2_grpc

if TYPE_CHECKING:
    from reranker.v1.reranker_pb2_grpc import RerankerServiceAsyncStub

CONTRACT_MAJOR = 1
# Short enough to find a restarted server within seconds, long enough not to flood one that is down.
_FIRST_BACKOFF_SECONDS = 0.1
_LONGEST_BACKOFF_SECONDS = 5.0
# A stalled server costs its next job a whole stall limit; after n stalls in a row it rests 2^n limits, at most these.
_LONGEST_REST_LIMITS = 16
# A server of another model may be replaced by one of the right model; this is how soon the client finds out.
_OTHER_MODEL_SECONDS = 30.0
# Ranks that start together connect within so many seconds a rank, so that a server sees no burst of connections.
_CONNECT_SECONDS_A_RANK = 0.002
_LONGEST_CONNECT_SECONDS = 1.0
_WORLD_VARIABLES = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# Not the global generator of ``random``: training code seeds it alike on all ranks, and restores its state.
_generator = SystemRandom()
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
        addresses: The servers, at least one.
        metadata: Pairs of key and value, sent with every call.
        credentials: Token and certificates.
    """

    addresses: tuple[Address, ...]
    metadata: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # it may hold secrets
    credentials: Credentials = field(default_factory=Credentials)


def connect_seconds(environment: Mapping[str, str]) -> float:
    """Return the time over which the ranks of one training run spread their first connections; 0 for one process.

    Args:
        environment: Variables that launchers of distributed training set.
    """
    sizes = (environment.get(name, "") for name in _WORLD_VARIABLES)
    ranks = next((int(size) for size in sizes if size.isdigit()), 1)
    return min(ranks * _CONNECT_SECONDS_A_RANK, _LONGEST_CONNECT_SECONDS) if ranks > 1 else 0.0


class Endpoint:
    """One address with its channel, which is made at first use, and its failures since the last success.

    Attributes:
        address: The address.
        metadata: Sent with every call.
        failures: Failed attempts since the last success, at most 16.
        stalls: Stalled attempts since the last success, at most 16.
        ready_at: Loop time of the next attempt.
        rests_until: Loop time before which other endpoints are preferred, because this one stalled.
        fingerprint: The model that the server named last; None before the first answer.
        reports: Whether the server sends progress on streams: it speaks contract 1.1 or newer.
        attempts: Number of attempts that are being made now.
        leaving: Whether the endpoint is out of use: attempts that are being made take no more work.
    """

    def __init__(self, address: Address, settings: ChannelSettings) -> None:
        self.address = address
        self.credentials = settings.credentials
        self.failures = self.stalls = self.attempts = 0
        self.ready_at = self.rests_until = 0.0
        self.fingerprint: str | None = None
        self.reports = self.leaving = False
        self._seen_at = 0.0  # loop time of ``fingerprint``
        self._metadata = settings.metadata
        self._channel: aio.Channel | None = None
        self._stub: RerankerServiceAsyncStub | None = None
        self._checked = self._spread = False

    @property
    def metadata(self) -> aio.Metadata:
        """The metadata of a call, with the token. Raises ``RerankerError`` if the token's file has become unusable."""
        try:
            return aio.Metadata(*self._metadata, *self.credentials.metadata())
        except ValueError as error:
            raise RerankerError(str(error)) from None

    async def stub(self, timeout: float) -> RerankerServiceAsyncStub:
        """Return the stub; at the first use of a connection, check the server's contract before.

        The ranks of one training run make their first connections at random times of a second or less.

        Args:
            timeout: Most seconds of the check.

        Raises:
            IncompatibleServerError: The server has another major version of the contract, or no reranker service.
            grpc.aio.AioRpcError: The server did not answer.
        """
        if not self._spread:
            self._spread = True
            await asyncio.sleep(_generator.uniform(0, connect_seconds(os.environ)))
        if self._channel is None:
            target, authority, options = self.address.target, self.address.authority, _CHANNEL_OPTIONS
            if authority is not None:  # proxies route by the name, and the certificate is for the name
                host = authority.rpartition(":")[0]
                options += (("grpc.default_authority", authority), ("grpc.ssl_target_name_override", host))
            if self.address.secure:
                self._channel = aio.secure_channel(target, self.credentials.channel(), options=options)
            else:
                self._channel = aio.insecure_channel(target, options=options)
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
                raise IncompatibleServerError(f"{self.address} does not serve reranker.v1.RerankerService") from None
            raise
        if info.contract.major != CONTRACT_MAJOR:
            raise IncompatibleServerError(
                f"{self.address} speaks contract {info.contract.major}.{info.contract.minor}; this client needs "
                f"{CONTRACT_MAJOR}.x: use a server and a client of the same major version"
            )
        self.reports = info.contract.minor >= 1
        self.saw(info.fingerprint)

    def saw(self, fingerprint: str) -> None:
        """Note the model that the server serves now."""
        self.fingerprint, self._seen_at = fingerprint, asyncio.get_running_loop().time()

    def has_other_model(self, wanted: str | None, now: float) -> bool:
        """Whether the server served another model than ``wanted`` when it was last asked, not long ago."""
        if wanted is None or self.fingerprint is None:
            return False
        return self.fingerprint != wanted and now < self._seen_at + _OTHER_MODEL_SECONDS

    def succeeded(self) -> None:
        """Reset backoff and rest after an answer."""
        self.failures = self.stalls = 0
        self.ready_at = self.rests_until = 0.0

    def failed(self, now: float) -> None:
        """Set the time of the next attempt: exponential backoff with full jitter.

        Args:
            now: The loop's time.
        """
        longest = min(_LONGEST_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2**self.failures)
        self.failures = min(self.failures + 1, 16)
        self.ready_at = now + _generator.uniform(0, longest)
        self._checked = False  # a restarted server may have another version

    def full(self, now: float, seconds: float) -> None:
        """Set the time of the next attempt as the server asked for it, later by up to a half.

        Args:
            now: The loop's time.
            seconds: The delay that the server named.
        """
        self.ready_at = now + seconds * _generator.uniform(1, 1.5)

    async def stalled(self, now: float, limit: float) -> None:
        """Rest after a stall, twice as long after each one; drop a connection that no other attempt uses.

        Args:
            now: The loop's time.
            limit: The stall limit, in seconds.
        """
        self.failed(now)
        self.stalls = min(self.stalls + 1, 16)
        self.rests_until = now + limit * min(2**self.stalls, _LONGEST_REST_LIMITS) * _generator.uniform(0.5, 1)
        # A connection whose packets are lost stays open for minutes; the next attempt makes another.
        if not self.attempts:
            await self.close()

    async def close(self) -> None:
        """Close the channel, if there is one; the next use makes another."""
        channel, self._channel, self._stub = self._channel, None, None
        if channel is not None:
            await channel.close()
