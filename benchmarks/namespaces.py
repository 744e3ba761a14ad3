"""Hosts as network namespaces: each has an address of its own behind a bridge, and can be cut off from the others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.in_namespace import VARIABLE
from chaos.servers import Server
from tests.servers import ServerProcess

_BRIDGE = "rrbridge"
_NETWORK = "10.213.77"
PORT = 50051


def unusable() -> str | None:
    """Return the reason for which namespaces cannot be made here; ``None`` if they can."""
    if shutil.which("ip") is None:
        return "there is no program ip; install iproute2"
    if os.geteuid():
        return "network namespaces need root"
    made = subprocess.run(["ip", "netns", "add", "rrprobe"], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"ip netns add: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", "rrprobe"], check=True)
    return None


class Host:
    """A host behind the bridge.

    Args:
        number: Its number, from 1.
    """

    def __init__(self, number: int) -> None:
        self.namespace = f"rrhost{number}"
        self.ip = f"{_NETWORK}.{number + 1}"
        self._link = f"rrlink{number}"

    def partition(self) -> None:
        """Lose every packet to and from the host, without a word to either side."""
        _ip("link", "set", self._link, "down")

    def heal(self) -> None:
        """Carry packets again."""
        _ip("link", "set", self._link, "up")

    def make(self) -> None:
        """Make the namespace and its link to the bridge."""
        _ip("netns", "add", self.namespace)
        _ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        _ip("link", "set", self._link, "master", _BRIDGE, "up")
        _ip("-n", self.namespace, "address", "add", f"{self.ip}/24", "dev", "eth0")
        _ip("-n", self.namespace, "link", "set", "eth0", "up")
        _ip("-n", self.namespace, "link", "set", "lo", "up")

    def remove(self) -> None:
        """Remove the namespace, and the link with it."""
        subprocess.run(["ip", "netns", "delete", self.namespace], capture_output=True, check=False)


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Make hosts, which this process reaches over the bridge, for as long as the block lasts."""
    made = [Host(number) for number in range(1, count + 1)]
    try:
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("address", "add", f"{_NETWORK}.1/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        for host in made:
            host.make()
        yield made
    finally:
        for host in made:
            host.remove()
        subprocess.run(["ip", "link", "delete", _BRIDGE], capture_output=True, check=False)


class HostServer(Server):
    """A server of fixed speed on a host.

    Args:
        host: The host.
        model: Directory of the model.
        directory: Directory for the file of pairs scored.
        rate: Pairs that its engine scores in a second.
    """

    def __init__(self, host: Host, model: Path, directory: Path, rate: float) -> None:
        super().__init__(model, directory, rate, flags=("--host", host.ip, "--insecure-network"))
        self._port = PORT
        self.address = f"{host.ip}:{PORT}"
        self._host = host

    def _launch(self, *flags: str) -> ServerProcess:
        own = {"seed": self.seed, "rate": self._rate, "scored": str(self._scored)}
        flags = ("--model", str(self._model), "--engine", "torch", "--engine-args", json.dumps(own), *flags)
        environment = {VARIABLE: self._host.namespace}
        return ServerProcess(*flags, ready=False, module="benchmarks.in_namespace", environment=environment)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
