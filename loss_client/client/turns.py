"""Turns: the order in which a client uses its endpoints, and the model that their scores have to come from."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from random import SystemRandom
from typing import Literal
from zlib import crc32

from loss_client.client.endpoints import Endpoint
from loss_client.client.errors import ModelChangedError, OtherModelError
from loss_client.former_names import former_attribute

_logger = logging.getLogger(__name__)

# One name may stand for several servers, so that the next attempt may reach another one.
_OTHER_MODEL_ATTEMPTS = 3
# After so many failures in a row an endpoint is no better than one that rests after a stall.
_HOPELESS_FAILURES = 3
_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_RUN_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")

Condition = Literal["unused", "working", "failing", "stalled", "other model"]
"""State of a server, as the client last saw it; see ``ServerState``."""


@dataclass(frozen=True, slots=True)
class ServerState:
    """One address of a client, or one IP address of a host name, and the client's last experience with it.

    Attributes:
        address: The address, with the host name that it was found for.
        condition: ``"unused"``: not asked yet. ``"working"``: the last attempt got an answer. ``"failing"``: the last
            attempts failed. ``"stalled"``: the last attempts ended without a sign of life. ``"other model"``: left out,
            because its model is not the client's.
        fingerprint: The model that the server named last; None before the first answer.
    """

    address: str
    condition: Condition
    fingerprint: str | None

    target = former_attribute("target", "address")


@dataclass(slots=True)
class ModelPin:
    """The model that all scores of a job, or of several jobs that belong together, come from.

    Attributes:
        fingerprint: The model; None before the first score.
    """

    fingerprint: str | None = None


class Turns:
    """Chooses the endpoint of each attempt. Everything here runs on the client's event loop.

    Args:
        endpoints: All endpoints; the list may change, and has at least one when it is used.
    """

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.model: str | None = None
        self._endpoints = endpoints
        self._next: int | None = None  # position of the next endpoint; None: none was chosen yet
        self._reported: set[tuple[Endpoint, str]] = set()

    def vote(self) -> None:
        """Take the model that most endpoints serve, of equally many the one of the first address, and report others.

        All ranks of a run that ask the same servers take the same model.
        """
        if self.model is None:
            self.model = self._most_served()
        for endpoint in self._endpoints:
            self._report(endpoint)

    def agree(self, pin: ModelPin, endpoint: Endpoint, fingerprint: str) -> None:
        """Take note of the model at an endpoint, and pin it if there is no pin yet.

        Raises:
            OtherModelError: The endpoint's model is not the pinned one, or without a pin not the client's.
        """
        endpoint.saw(fingerprint)
        wanted = pin.fingerprint or self.model
        if wanted not in (None, fingerprint):
            self._report(endpoint)
            raise OtherModelError(f"{endpoint.address} serves the model {fingerprint} and not {wanted}")
        pin.fingerprint = fingerprint
        self.model = self.model or fingerprint

    def choose(
        self, pin: ModelPin, others: Mapping[Endpoint, int], now: float, busy: Collection[Endpoint] = ()
    ) -> tuple[Endpoint, float] | tuple[None, float]:
        """Return (endpoint, seconds until it is ready): the next in turn that is ready, or the first that will be.

        Args:
            pin: The model that is needed.
            others: How often the present call met another model at each endpoint.
            now: The loop's time.
            busy: Endpoints that other streams of the job use. If there is no other one, the endpoint is None.

        Raises:
            ModelChangedError: All endpoints serve another model than the pinned one.
        """
        usable = self.usable(pin, others, now)
        if not usable:
            if pin.fingerprint is not None:
                raise ModelChangedError(
                    f"the scores began with the model {pin.fingerprint} and cannot continue at "
                    f"{', '.join(f'{one.address} with {one.fingerprint}' for one in self._endpoints)}: no other server "
                    "is left. Serve the same model, in the same version, at all addresses, then start the step again"
                )
            self._adopt()
            usable = [endpoint for endpoint in self._endpoints if endpoint.fingerprint == self.model]
        if busy:
            usable = [endpoint for endpoint in usable if endpoint not in busy]
        if not usable:
            return None, 0.0
        awake = [endpoint for endpoint in usable if endpoint.rests_until <= now]
        for endpoint in awake:
            if endpoint.ready_at <= now:
                self._next = (self._endpoints.index(endpoint) + 1) % len(self._endpoints)
                return endpoint, 0.0
        if busy and not awake:  # the streams at the busy endpoints go on meanwhile
            first = min(usable, key=lambda endpoint: endpoint.rests_until)
            return first, first.rests_until - now
        hopeful = [endpoint for endpoint in awake if endpoint.failures < _HOPELESS_FAILURES] or usable
        first = min(hopeful, key=lambda endpoint: endpoint.ready_at)
        return first, max(first.ready_at - now, 0.0)

    def spare(self, pin: ModelPin, busy: Collection[Endpoint], now: float) -> list[Endpoint]:
        """Return the endpoints that a further stream of a job may use at once, in turn.

        Args:
            pin: The model that is needed.
            busy: Endpoints that the job uses already.
            now: The loop's time.
        """
        wanted = pin.fingerprint or self.model
        return [
            endpoint
            for endpoint in self._in_turn()
            if endpoint not in busy
            and max(endpoint.ready_at, endpoint.rests_until) <= now
            and not endpoint.has_other_model(wanted, now)
        ]

    def usable(self, pin: ModelPin, others: Mapping[Endpoint, int], now: float) -> list[Endpoint]:
        """Return the endpoints that may serve the needed model, in turn; for the arguments see ``choose``."""
        possible = [endpoint for endpoint in self._in_turn() if others.get(endpoint, 0) < _OTHER_MODEL_ATTEMPTS]
        wanted = pin.fingerprint or self.model
        return [endpoint for endpoint in possible if not endpoint.has_other_model(wanted, now)] or possible

    def states(self) -> tuple[ServerState, ...]:
        """Return the state of each endpoint; may be called from any thread."""
        endpoints = list(self._endpoints)
        return tuple(ServerState(str(one.address), self._condition(one), one.fingerprint) for one in endpoints)

    def left_out(self) -> str:
        """Name the endpoints of other models, as the end of an error message; empty if there are none."""
        found = [f"{one.address} serves another model" for one in self._endpoints if self._is_other(one)]
        return f"; left out: {', '.join(found)}" if found else ""

    def _in_turn(self) -> list[Endpoint]:
        count = len(self._endpoints)
        self._next = first_turn(count, os.environ) if self._next is None else self._next % count
        return [*self._endpoints[self._next :], *self._endpoints[: self._next]]

    def _most_served(self) -> str | None:
        votes = Counter(endpoint.fingerprint for endpoint in self._endpoints if endpoint.fingerprint is not None)
        return votes.most_common(1)[0][0] if votes else None

    def _condition(self, endpoint: Endpoint) -> Condition:
        if self._is_other(endpoint):
            return "other model"
        if endpoint.failures:
            return "stalled" if endpoint.stalls else "failing"
        return "unused" if endpoint.fingerprint is None else "working"

    def _is_other(self, endpoint: Endpoint) -> bool:
        return endpoint.fingerprint not in (None, self.model) and self.model is not None

    def _report(self, endpoint: Endpoint) -> None:
        """Warn, once for each endpoint and model, that an endpoint is left out."""
        found = endpoint.fingerprint
        if found is None or not self._is_other(endpoint) or (endpoint, found) in self._reported:
            return
        self._reported.add((endpoint, found))
        _logger.warning(
            "%s serves the model %s, and the client's scores come from %s: this server is left out while a server "
            "with the client's model is left. Serve the same model, in the same version, at all addresses.",
            *(endpoint.address, found, self.model),
        )

    def _adopt(self) -> None:
        """Take the model that most endpoints serve, because none serves the client's any more."""
        former, self.model = self.model, self._most_served()
        _logger.warning(
            "No server has the model %s any more; from now on scores come from the model %s.", former, self.model
        )


def first_turn(endpoints: int, environment: Mapping[str, str]) -> int:
    """Return the position of the endpoint that a client uses first.

    Clients of different runs begin anywhere. The ranks of one run begin at neighbours, so that they spread evenly.

    Args:
        endpoints: Number of endpoints.
        environment: Variables that launchers of distributed training set.
    """
    rank = _rank(environment)
    if rank is None:
        return SystemRandom().randrange(endpoints)
    run = ":".join(environment.get(name, "") for name in _RUN_VARIABLES)
    return (crc32(run.encode()) + rank) % endpoints


def _rank(environment: Mapping[str, str]) -> int | None:
    """Return this process's rank; None outside distributed training."""
    # Without an import: the client works where torch is not installed.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    found = next((environment[name] for name in _RANK_VARIABLES if environment.get(name, "").isdigit()), None)
    return None if found is None else int(found)
