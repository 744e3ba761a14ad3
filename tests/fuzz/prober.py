"""Prober: asks a server for health every tenth of a second until SIGTERM, and then prints what it saw, as JSON.

``python -m tests.fuzz.prober HOST:PORT``. It is a process of its own, because an attacking client and its event loop
would delay a health check in the same process.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from .reconnecting import LOST, RECONNECT

_PERIOD_SECONDS = 0.1
_MOST_SECONDS = 10.0


def main() -> None:
    """Probe the server."""
    done = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: done.set())
    slowest, checks, failures = 0.0, 0, []
    with grpc.insecure_channel(sys.argv[1], RECONNECT) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        _check(stub)
        print("ready", flush=True)
        while not (done.wait(_PERIOD_SECONDS) and checks):
            began = time.monotonic()
            status = _check(stub)
            # A server that listens anew cancels or refuses a call that comes at this moment.
            while status in [one.name for one in LOST] and time.monotonic() < began + _MOST_SECONDS:
                status = _check(stub)
            if status != "SERVING":
                failures.append(status)
            checks += 1
            slowest = max(slowest, time.monotonic() - began)
    print(json.dumps({"slowest": slowest, "checks": checks, "failures": failures}), flush=True)


def _check(stub: health_pb2_grpc.HealthStub) -> str:
    """The status of the server, or the code of the call that asked for it."""
    try:
        reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=_MOST_SECONDS, wait_for_ready=True)
    except grpc.RpcError as error:
        return str(error.code().name)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)


if __name__ == "__main__":
    main()
