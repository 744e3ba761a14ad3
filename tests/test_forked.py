"""Programs that tests fork behave as those that they start."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest

from examples.processes import Child

from .forked import ForkedProgram

pytestmark = pytest.mark.usefixtures("forked_children")


@pytest.fixture
def slow_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reading of an exit status take longer than another thread needs to begin with it."""
    read = forkserver.read_signed

    def slowly(file: int) -> int:
        time.sleep(0.1)
        return read(file)

    monkeypatch.setattr(forkserver, "read_signed", slowly)


@pytest.mark.usefixtures("slow_reading")
def test_threads_that_ask_for_an_exit_status_all_get_it() -> None:
    program = ForkedProgram([sys.executable, "-c", "raise SystemExit(3)"])
    found: list[int | None] = []
    threads = [threading.Thread(target=lambda: found.append(program.wait(30))) for _ in range(4)]
    for thread in threads:
        thread.start()
    # To start another program is to ask for the status of all that run.
    other = ForkedProgram([sys.executable, "-c", "pass"])
    for thread in threads:
        thread.join()
    assert found == [3] * 4
    assert other.wait(30) == 0


@pytest.fixture
def ending_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Child]:
    """A process that ends right after it was seen to run."""
    process = Child([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log")
    program = process._process

    def poll_then_end() -> None:
        monkeypatch.undo()
        program.send_signal(signal.SIGKILL)
        program.wait(30)

    monkeypatch.setattr(program, "poll", poll_then_end)
    yield process
    program.kill()


def test_a_process_that_ends_while_it_is_stopped_is_no_error(ending_child: Child) -> None:
    ending_child.stop()
    assert ending_child.wait(0) == -signal.SIGKILL
