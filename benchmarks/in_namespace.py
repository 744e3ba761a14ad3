"""The server of fixed speed in a network namespace: ``python -m benchmarks.in_namespace``.

The variable ``NETWORK_NAMESPACE`` names a namespace of ``ip netns``.
"""

from __future__ import annotations

import ctypes
import os

from chaos import served

VARIABLE = "NETWORK_NAMESPACE"
"""Variable with the name of the namespace."""
_CLONE_NEWNET = 0x40000000


def enter(name: str) -> None:
    """Move this thread, and the threads that it starts, into a namespace. Raises ``OSError``."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}", "rb") as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")


if __name__ == "__main__":
    enter(os.environ[VARIABLE])
    served.main()
