"""Command line of the server: reads the settings, runs the server, and exits with its status."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time

from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError

from .observing.logs import configure_logs
from .settings import Settings, variable_errors

_EXIT_SECONDS = 3.0


def main() -> None:
    """Run the server; exits 0 after SIGTERM or SIGINT, 2 for wrong settings, 1 for every other failure.

    With the word "check" as first argument, a model is checked instead; see ``check.main`` for the exit status.
    """
    if unknown := variable_errors(os.environ.items()):
        for message in unknown:
            print(f"reranker-service: {message}", file=sys.stderr)
        sys.exit(2)
    if sys.argv[1:2] == ["check"]:
        from .check import main as check

        sys.exit(check(sys.argv[2:]))
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
