"""Health check of a running server, for containers and scripts; it imports neither torch nor the server.

python -m reranker_service.commands.health [HOST:PORT] [--tls-ca FILE] [--timeout SECONDS]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2

_METHOD = "/grpc.health.v1.Health/Check"
_TIMEOUT_SECONDS = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask a server for its health, and print the answer.

    Args:
        arguments: Arguments of the command line; ``None`` for those of this process.

    Returns:
        0 if the server says SERVING, 1 if it says anything different or does not answer.
    """
    parser = argparse.ArgumentParser(prog="reranker-service health", description="Ask a server for its health.")
    port = os.environ.get("RERANKER_HEALTH_PORT") or os.environ.get("RERANKER_PORT") or "50051"
    parser.add_argument(
        "address",
        nargs="?",
        default=f"127.0.0.1:{port}",
        help="HOST:PORT; if not given, 127.0.0.1 and the port of RERANKER_HEALTH_PORT, RERANKER_PORT or 50051",
    )
    parser.add_argument(
        "--tls-ca", type=Path, metavar="FILE", help="PEM file of the authorities that TLS trusts; turns TLS on"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=_TIMEOUT_SECONDS,
        metavar="SECONDS",
        help=f"seconds that the answer may take; default: {_TIMEOUT_SECONDS:g}",
    )
    options = parser.parse_args(arguments)
    try:
        status = _ask(options.address, options.tls_ca, options.timeout)
    except grpc.RpcError as error:
        print(f"{options.address}: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    except OSError as error:
        parser.error(f"--tls-ca: {error}")
    print(f"{options.address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}")
    return 0 if status == health_pb2.HealthCheckResponse.SERVING else 1


def _ask(address: str, tls_ca: Path | None, seconds: float) -> int:
    """Return the status. Raises ``grpc.RpcError`` without an answer, ``OSError`` if the file cannot be read."""
    # A proxy that the environment names would be asked in place of the server.
    options = [("grpc.enable_http_proxy", 0)]
    if tls_ca is None:
        channel = grpc.insecure_channel(address, options=options)
    else:
        credentials = grpc.ssl_channel_credentials(tls_ca.read_bytes())
        channel = grpc.secure_channel(address, credentials, options=options)
    with channel:
        check = channel.unary_unary(
            _METHOD,
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        status: int = check(health_pb2.HealthCheckRequest(), timeout=seconds).status
    return status


if __name__ == "__main__":
    sys.exit(main())
