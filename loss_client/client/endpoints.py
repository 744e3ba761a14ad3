"""One server of a client: its channel, the contract that it speaks, and when it may be tried again after a failure."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from grpc import aio

from loss_client.client.errors import IncompatibleServerError
from loss_client.client.targets import Target
from reranker.v1 import reranker_pb2, reranker_pb2_grpc

if TYPE_CHECKING:
    from reranker.v1.reranker_pb2_grpc import RerankerServiceAsyncStub

CONTRACT_MAJOR = 1
# A server that is back is found again within seconds, and one that is not is not hammered.
_FIRST_BACKOFF_SECONDS = 0.1
_LONGEST_BACKOFF_SECONDS = 5.0
_CHANNEL_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # The attempts are made here, where it is known what is left to send.
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5000),
    # Servers that were not told otherwise put up with one ping in five minutes.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Behind one name there may be many servers; streams spread over them.
    ("grpc.lb_policy_name", "round_robin"),
)


@dataclass(frozen=True, slots=True)
class ChannelSettings:
    """What a client's channels have in common.

    Attributes:
        targets: The servers, at least one.
        metadata: Sent along with every call.
        root_certificates: PEM bytes that TLS trusts; None for gRPC's own choice.
    """

    targets: tuple[Target, ...]
    metadata: tuple[tuple[str, str], ...] = ()
    root_certificates: bytes | None = None


class Endpoint:
    """One target with its channel, which is made at first use, and what is known of its health."""

    def __init__(self, target: Target, settings: ChannelSettings) -> None:
        self.target = target
        self.metadata = aio.Metadata(*settings.metadata)
        self.failures = 0
        self.ready_at = 0.0  # loop time before which it is left alone
        self._root_certificates = settings.root_certificates
        self._channel: aio.Channel | None = None
        self._stub: RerankerServiceAsyncStub | None = None
        self._checked = False

    async def stub(self, timeout: float) -> RerankerServiceAsyncStub:
        """Return the stub, once per connection after asking the server which contract it speaks.

        Raises:
            IncompatibleServerError: It speaks another one.
            grpc.aio.AioRpcError: It did not answer.
        """
        if self._channel is None:
            if self.target.secure:
                credentials = grpc.ssl_channel_credentials(self._root_certificates)
                self._channel = aio.secure_channel(self.target.address, credentials, options=_CHANNEL_OPTIONS)
            else:
                self._channel = aio.insecure_channel(self.target.address, options=_CHANNEL_OPTIONS)
            self._stub = reranker_pb2_grpc.RerankerServiceStub(self._channel)
        stub = self._stub
        assert stub is not None  # made with the channel
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
        """Note that it answered."""
        self.failures = 0
        self.ready_at = 0.0

    def failed(self, now: float) -> None:
        """Leave it alone for a while: exponential backoff with full jitter."""
        longest = min(_LONGEST_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2**self.failures)
        self.failures = min(self.failures + 1, 16)
        self.ready_at = now + random.uniform(0, longest)
        self._checked = False  # what comes back may be another version

    async def close(self) -> None:
        """Close the channel, if there is one; the next call makes another."""
        channel, self._channel, self._stub = self._channel, None, None
        if channel is not None:
            await channel.close()
