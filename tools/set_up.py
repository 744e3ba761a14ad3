"""Set-up: makes the virtual environment and installs a pinned list. Run by `make`; needs only the standard library.

python tools/set_up.py ENVIRONMENT REQUIREMENTS
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Takes less than half of the CPU time that the pip of Python 3.11 takes for the same list.
PIP = "pip==26.3"
TICK_SECONDS = 20.0
# Few of these files are ever imported, and Python compiles those at the first import.
NOT_COMPILED = r"/(tests?|models)/"


def step(text: str, *command: str | Path, progress: Callable[[], str] = str, check: bool = True) -> None:
    """Say what begins, run a command, and print a line every 20 seconds while it runs.

    Raises:
        subprocess.CalledProcessError: The command failed, and ``check`` is set.
    """
    print(text, flush=True)
    began = time.monotonic()
    with subprocess.Popen([str(one) for one in command]) as process:
        while True:
            try:
                status = process.wait(TICK_SECONDS)
                break
            except subprocess.TimeoutExpired:
                print(f"  after {time.monotonic() - began:.0f} s{progress()}", flush=True)
    if check and status:
        raise subprocess.CalledProcessError(status, process.args)


def works(*command: str | Path) -> bool:
    """Whether a program exists and ends without an error; its output is dropped."""
    return Path(command[0]).exists() and subprocess.run(command, capture_output=True, check=False).returncode == 0


def set_up(environment: Path, requirements: Path) -> None:
    """Install the list; afterwards ``import torch`` works in the environment.

    An interrupted installation leaves packages that pip cannot read: the next call makes the environment anew.

    Raises:
        subprocess.CalledProcessError: A step failed; its output says why.
    """
    unfinished = environment / ".unfinished"
    python = environment / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--progress-bar", "off")
    pins = [line.strip() for line in requirements.read_text().splitlines() if "==" in line]

    def unpacked() -> str:
        count = len(list(environment.glob("lib/python*/site-packages/*.dist-info")))
        return f": {count} packages unpacked" if count > 2 else ": downloading"

    if unfinished.exists() or not works(python, "-m", "pip", "--version"):
        step(f"Making a virtual environment in {environment}", sys.executable, "-m", "venv", "--clear", environment)
    unfinished.touch()
    step(f"Installing {PIP}", *pip, PIP)
    step(
        f"Installing about {round(len(pins), -1)} packages of {requirements}: one to three minutes on a fast network",
        *(*pip, "--no-deps", "--no-compile", "--requirement", requirements),
        progress=unpacked,
    )
    # pip would compile on one core. A few packages carry files for other Pythons, which cannot be compiled.
    compileall = ("-m", "compileall", "-qq", "-j", "0", "-x", NOT_COMPILED, environment / "lib")
    step("Compiling them to bytecode: about half a minute on two idle cores", python, *compileall, check=False)
    if not works(python, "-c", "import torch"):
        (torch,) = (pin for pin in pins if pin.startswith("torch=="))
        step(
            f"pip gave the CUDA build of {torch}: installing what that build requires, 3.5 GB, about two minutes.\n"
            "For the small CPU build, set PIP_EXTRA_INDEX_URL to PyTorch's CPU index, then `make clean install`.",
            *(*pip, "--constraint", requirements, torch),
        )
        step("Importing torch", python, "-c", "import torch")
    unfinished.unlink()


if __name__ == "__main__":
    try:
        set_up(Path(sys.argv[1]), Path(sys.argv[2]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"Set-up failed; this command ended with status {error.returncode}: {' '.join(error.cmd)}")
    except KeyboardInterrupt:
        sys.exit("Set-up was interrupted; the same command makes the environment anew")
