"""Command line: ``reranker-service serve|check|health|bench|top``; without a command it serves."""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import sys
import threading
import time
from importlib import metadata

try:
    import structlog
    from pydantic import ValidationError
    from pydantic_settings import CliApp, SettingsError
except ModuleNotFoundError as error:
    sys.exit(f"reranker-service: the package {error.name} is missing; install 'reranker-grpc[server]'")

from .former_names import take_former_names
from .observing.logs import configure_logs
from .settings import Settings, variable_errors

# Commands that ask a running server, and need none of its settings.
_OF_SERVERS = ("health", "bench", "top")
_COMMANDS = ("serve", "check", *_OF_SERVERS)
_EXIT_SECONDS = 3.0


def main() -> None:
    """Run the command that the first argument names; without one, run the server.

    The server exits with 0 after SIGTERM or SIGINT, 2 for wrong settings, 1 for every other failure. For the exit
    status of another command see the ``main`` of its module. With ``--version`` alone, the version of the package is
    printed.
    """
    if sys.argv[1:] == ["--version"]:
        print(f"reranker-grpc {metadata.version('reranker-grpc')}")
        return
    command = sys.argv[1] if sys.argv[1:] and not sys.argv[1].startswith("-") else None
    if command not in (None, *_COMMANDS):
        print(f"reranker-service: there is no command {command!r}; right are {', '.join(_COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    if command in _OF_SERVERS:
        module = importlib.import_module(f"reranker_service.commands.{command}")
        sys.exit(module.main(sys.argv[2:]))
    former_names = take_former_names(sys.argv, os.environ)
    if unknown := variable_errors(os.environ.items()):
        for message in unknown:
            print(f"reranker-service: {message}", file=sys.stderr)
        sys.exit(2)
    if command == "check":
        from .check import main as check

        sys.exit(check(sys.argv[2:]))
    if command == "serve":
        del sys.argv[1]
    try:
        settings = CliApp.run(Settings)
    except ValidationError as error:
        for one in error.errors():
            name = ".".join(str(part) for part in one["loc"])
            # The input of a rule over several settings is all of them, which its message names.
            got = "" if isinstance(one["input"], dict) else f" (got {one['input']!r})"
            print(f"reranker-service: {name}: {one['msg']}{got}", file=sys.stderr)
        sys.exit(2)
    except SettingsError as error:
        print(f"reranker-service: {error}", file=sys.stderr)
        sys.exit(2)
    configure_logs(settings.log_format, settings.log_level)
    for former, present in former_names.items():
        structlog.get_logger().warning("former name", name=former, use=present)
    if settings.replicas != 1:
        from .replicas import supervise

        sys.exit(asyncio.run(supervise(settings)))
    # Imported here, so that --help and wrong settings do not wait for the server's imports.
    from .server import serve

    with asyncio.Runner() as runner:
        status = runner.run(serve(settings))
        # A thread that waits for the hub, or loads weights, would keep the process alive.
        threading.Thread(target=_exit_late, args=(status,), daemon=True).start()
    # Spares the garbage collection at exit, which would search all objects of torch and vLLM for two seconds.
    gc.freeze()
    sys.exit(status)


def _exit_late(status: int) -> None:
    """Exit if the process has not ended ``_EXIT_SECONDS`` after the server."""
    time.sleep(_EXIT_SECONDS)
    os._exit(status)


if __name__ == "__main__":
    main()
