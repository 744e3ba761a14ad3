"""Command line of the server: settings in, a running server, an exit status out."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys

import structlog
from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError

from .settings import Settings


def configure_logs(settings: Settings) -> None:
    """Log to stderr, one line an event, as the settings say."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], bool_as_flag=False)
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[settings.log_level.upper()]),
        # A line in one piece: vLLM's processes write to the same pipe.
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )


def main() -> None:
    """Run the server; exits 0 after an orderly end, 2 on wrong settings, 1 on everything else that ends it."""
    try:
        settings = CliApp.run(Settings)
    except ValidationError as error:
        for one in error.errors():
            name = ".".join(str(part) for part in one["loc"])
            print(f"reranker-service: {name}: {one['msg']} (got {one['input']!r})", file=sys.stderr)
        sys.exit(2)
    except SettingsError as error:
        print(f"reranker-service: {error}", file=sys.stderr)
        sys.exit(2)
    configure_logs(settings)
    # Imported late: wrong settings and --help need no torch.
    from .server import serve

    status = asyncio.run(serve(settings))
    # Nobody needs to search what torch and vLLM leave behind for garbage: the process ends two seconds earlier.
    gc.freeze()
    sys.exit(status)


if __name__ == "__main__":
    main()
