"""Notification of the service manager that the server is ready: systemd's protocol, which ``--replicas`` uses too."""

from __future__ import annotations

import contextlib
import os
import socket

READY = "READY=1"
"""Line that says that the server answers."""
ADDRESS = "X_ADDRESS="
"""Begin of the line with the server's ``HOST:PORT``."""


def notify_ready(address: str) -> None:
    """Tell the service manager, if there is one (``NOTIFY_SOCKET``), that the server answers at ``address``."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    # An abstract socket is written with a @ in the place of the null byte.
    name = f"\0{path[1:]}" if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(f"{READY}\n{ADDRESS}{address}\nSTATUS=serving at {address}\n".encode(), name)
