"""Logs: every line of the process on stderr in one format, those of its libraries and of vLLM's processes too.

Lines come from structlog, from ``logging`` and ``warnings``, from exceptions that nothing handles, from text that
libraries write to ``sys.stdout`` and ``sys.stderr``, and from the output of vLLM's processes. What C++ code of this
process writes to file descriptor 2 is not caught: a message of a crash must not wait for a thread of the process that
crashes.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, TextIO

import structlog

Format = Literal["logfmt", "json"]
Level = Literal["debug", "info", "warning", "error"]

# The lowest level at which libraries are heard: their "info" is this server's "debug".
_LIBRARY_LEVELS = {"debug": logging.INFO, "info": logging.WARNING, "warning": logging.WARNING, "error": logging.ERROR}
# "(EngineCore pid=12) INFO 11-25 22:52:04 [core.py:133] Initializing an engine"
_VLLM_LINE = re.compile(
    r"\((?P<process>\S+) pid=(?P<pid>\d+)\) (?P<level>[A-Z]+) \d\d-\d\d [\d:.]+ \[(?P<source>[^]]+)\] (?P<event>.*)"
)
# "[W1125 22:52:14.582044626 utils.cpp:68] Warning: ..." or "W1125 22:52:13.860000 28296 torch/triton.py:53] ..."
_GLOG_LINE = re.compile(r"\[?(?P<level>[IWEF])\d{4} [\d:.]+ +(?:\d+ )?(?P<source>\S+:\d+)\] (?P<event>.*)")
_GLOG_LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "error"}

REPLICA_VARIABLE = "RERANKER_REPLICA"
"""Variable with the number of this server among those of ``--replicas``, which each of its log lines then has."""

log = structlog.get_logger()


def configure_logs(log_format: Format, level: Level) -> None:
    """Log to stderr, one line for each event."""
    # gRPC's C++ core writes lines of its own, such as one for each TLS handshake that a client fails.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    stderr = sys.stderr.stream if isinstance(sys.stderr, LineWriter) else sys.stderr
    shared: list[structlog.typing.Processor] = [
        *([_numbered(int(replica))] if (replica := os.environ.get(REPLICA_VARIABLE)) else []),
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], bool_as_flag=False)
    )
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        # It writes each line with one call: other processes write to the same pipe.
        logger_factory=structlog.WriteLoggerFactory(file=stderr),
    )
    handler = logging.StreamHandler(stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=_LIBRARY_LEVELS[level], force=True)
    logging.captureWarnings(True)
    sys.stdout, sys.stderr = LineWriter(stderr), LineWriter(stderr)
    sys.excepthook = _on_exception
    threading.excepthook = lambda found: _on_exception(found.exc_type, found.exc_value, found.exc_traceback)
    sys.unraisablehook = lambda found: _on_exception(found.exc_type, found.exc_value, found.exc_traceback)


def _numbered(replica: int) -> structlog.typing.Processor:
    def add(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event.setdefault("replica", replica)
        return event

    return add


def adopt_handlers() -> None:
    """Send what libraries log by handlers of their own to the one handler of this process; call it after imports."""
    for logger in list(logging.root.manager.loggerDict.values()):
        if not isinstance(logger, logging.Logger):
            continue
        for handler in logger.handlers.copy():
            if type(handler) is logging.StreamHandler:
                logger.removeHandler(handler)
                logger.propagate = True


class LineWriter(io.TextIOBase):
    """A text stream that logs each line that is written to it; of a progress bar's line its last state.

    Attributes:
        stream: The stream in whose place it stands; its file descriptor is this one's too.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._lock = threading.Lock()
        self._begun = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """See ``io.TextIOBase``."""
        return "utf-8"

    def fileno(self) -> int:
        """See ``io.TextIOBase``."""
        return int(self.stream.fileno())

    def isatty(self) -> bool:
        """False: lines are for machines."""
        return False

    def writable(self) -> bool:
        """See ``io.TextIOBase``."""
        return True

    def write(self, text: str) -> int:
        """Log the lines that ``text`` ends, and keep the rest for the next call."""
        with self._lock:
            *lines, begun = (self._begun + text).split("\n")
            self._begun = begun.rpartition("\r")[2] if len(begun) > 10_000 else begun
        for line in lines:
            log_line(line)
        return len(text)

    def flush(self) -> None:
        """Do nothing: the begun line is not complete yet."""


def log_line(line: str) -> None:
    """Log a line that a library has written, with the level that it names; ``info`` if it names none."""
    line = line.rstrip("\r").rpartition("\r")[2].rstrip()
    if not line:
        return
    found: Any = _VLLM_LINE.fullmatch(line)
    if found is not None:
        level = found["level"].lower()
        level = level if level in ("debug", "info", "warning", "error") else "error"
        getattr(log, level)(found["event"], process=found["process"], pid=int(found["pid"]), source=found["source"])
        return
    found = _GLOG_LINE.fullmatch(line)
    if found is not None:
        getattr(log, _GLOG_LEVELS[found["level"]])(found["event"], source=found["source"])
    else:
        log.info(line, source="output")


@contextmanager
def output_of_children() -> Iterator[None]:
    """Log the output of processes that are started in the block, and of the processes that those start."""
    reading, writing = os.pipe()
    threading.Thread(target=_log_lines, args=(reading,), name="output-of-children", daemon=True).start()
    kept = [(number, os.dup(number)) for number in (1, 2)]
    try:
        for number, _ in kept:
            os.dup2(writing, number)
        yield
    finally:
        for number, own in kept:
            os.dup2(own, number)
            os.close(own)
        os.close(writing)


def _log_lines(reading: int) -> None:
    with open(reading, encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in lines:
            log_line(line.rstrip("\n"))


def _on_exception(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    if not issubclass(kind, (KeyboardInterrupt, SystemExit)):
        log.error("unhandled exception", exc_info=(kind, error or kind(), traceback))
