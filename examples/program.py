"""Program: environment, signals, progress bars and exit status of the programs in examples and quality."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType


def prepare_process() -> None:
    """Set environment variables that libraries read on import, here and in the server. Call it before other imports.

    The libraries use no model hub, progress bars are off or slow unless stderr is a terminal, and OpenMP threads sleep
    while they wait. By default they spin, and because training and server share the cores, spinning takes a core from
    the other process (matrix products beside a busy process took twice as long).
    """
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        # TQDM_DISABLE has no effect on bars that set ``disable`` themselves; those are updated every 10 s.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("TQDM_MININTERVAL", "10")


def run_program(run: Callable[[], object], interrupted: str = "Interrupted; the server has been ended") -> int:
    """Run a program that starts servers; print an error or an interruption as one line.

    Call :func:`prepare_process` first.

    Args:
        run: The program.
        interrupted: Message after an interruption by Ctrl-C or SIGTERM.

    Returns:
        The exit status: 0 for success, 1 for an error, 130 if the program was interrupted.
    """
    # SIGTERM raises KeyboardInterrupt like Ctrl-C, so that the server is ended as well.
    signal.signal(signal.SIGTERM, _interrupt)

    import datasets  # type: ignore[import-untyped]
    from transformers.utils import logging

    from examples.processes import ProcessError
    from loss_client import RerankerError

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    try:
        run()
    except (ProcessError, RerankerError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return 1
    except KeyboardInterrupt:
        print(interrupted, flush=True)
        return 130
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
