"""Guard: everything that protects one server, made from its flags."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from pathlib import Path

import structlog
from grpc import aio

from .access import Access
from .exposure import check_exposure, is_loopback
from .files import SecurityError
from .tls import Tls
from .tokens import Tokens

REFRESH_SECONDS = 1.0

log = structlog.get_logger()


class Guard:
    """TLS and tokens of a server.

    Attributes:
        tls: The certificates; ``None`` for plaintext.
        tokens: The tokens; ``None`` if calls need none.
    """

    def __init__(
        self,
        *,
        host: str,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
        tls_client_ca: Path | None = None,
        token_file: Path | None = None,
        insecure_network: bool = False,
        reflection: bool = False,
    ) -> None:
        """Read the files, and refuse to leave ``host`` open.

        Args:
            host: Address that the server and its metrics will listen on.
            tls_cert: See ``Tls``.
            tls_key: See ``Tls``.
            tls_client_ca: See ``Tls``.
            token_file: See ``Tokens``.
            insecure_network: Whether to listen beyond loopback without protection.
            reflection: Whether calls of reflection need no token.

        Raises:
            SecurityError: A file is unusable, or the flags do not fit together or leave the server open.
        """
        if (tls_cert is None) != (tls_key is None):
            given, missing = ("--tls-key", "--tls-cert") if tls_cert is None else ("--tls-cert", "--tls-key")
            raise SecurityError(f"{given} is given without {missing}; TLS needs both")
        if tls_client_ca is not None and tls_cert is None:
            raise SecurityError("--tls-client-ca is given without --tls-cert and --tls-key; mutual TLS needs all three")
        tls, tokens, mutual = tls_cert is not None, token_file is not None, tls_client_ca is not None
        if not insecure_network:
            check_exposure(host, tls=tls, tokens=tokens, mutual=mutual)
        self.tls = Tls(tls_cert, tls_key, tls_client_ca) if tls_cert is not None and tls_key is not None else None
        self.tokens = Tokens(token_file) if token_file is not None else None
        local = is_loopback(host)
        if not local and not mutual and not (tls and tokens):
            log.warning(
                "other machines can reach this server, and it is not protected",
                host=host,
                tls=tls,
                tokens=tokens,
                flag="--insecure-network",
            )
        self._reflection = reflection
        # Without tokens, reflection is open where its callers are known: on this machine, or by their certificate.
        self._reflection_without_tokens = reflection or local or mutual

    def access(
        self, *, health: Collection[str], reflection: Collection[str], refused: Callable[[str], None]
    ) -> aio.ServerInterceptor:
        """The interceptor that asks for tokens.

        Args:
            health: Full names of services that never need a token.
            reflection: Full names of the reflection services.
            refused: Called with the method of each refused call.
        """
        return Access(
            self.tokens,
            open_services=[*health, *(reflection if self._reflection else ())],
            closed_services=() if self._reflection_without_tokens else reflection,
            refused=refused,
        )

    def listen(self, server: aio.Server, address: str) -> int:
        """Have a server listen on ``address``; returns the port. Raises ``RuntimeError`` if it cannot."""
        if self.tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, self.tls.credentials())

    async def watch(self) -> None:
        """Read changed files again, within about a second of the change, until cancelled."""
        files = [one for one in (self.tls, self.tokens) if one is not None]
        while files:
            await asyncio.sleep(REFRESH_SECONDS)
            for one in files:
                # In a thread, because files of a network may take long.
                await asyncio.to_thread(one.refresh)
