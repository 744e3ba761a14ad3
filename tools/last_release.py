"""The last release against this one: its client calls this server, and this client calls its server.

The last release is the last tag ``vX.Y.Z`` before the present commit. Until there is one, the commit ``FIRST`` stands
for version 0.1.0. A wheel is built from it and installed into a virtual environment of its own, which borrows the
installed dependencies of the environment that runs this program. Both servers score the same texts for both clients:
the four answers must be equal.

``python -m tools.last_release --help`` lists the arguments.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.processes import Child

ROOT = Path(__file__).resolve().parent.parent
#: Last commit whose contract was 1.0.
FIRST = "2d6e7d7bcfb2fa6fe0a1e7441c35bc7b3f3db305"
_PROGRAM = ROOT / "tools" / "score_texts.py"
_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Side:
    """One release, installed.

    Attributes:
        name: Name in messages.
        python: Interpreter of its environment.
        folder: Directory that its packages must come from.
        path: Value of PYTHONPATH.
    """

    name: str
    python: Path
    folder: Path
    path: str = ""

    def serve(self, log: Path) -> Child:
        """Start the release's server with its default model, on a free port."""
        # -P: the working directory holds this release's packages.
        command = [str(self.python), "-P", "-m", "reranker_service", "--port", "0", "--engine", "torch"]
        return Child(command, log, self._environment(), f"The server of {self.name}")

    def ask(self, address: str) -> dict[str, Any]:
        """Run the release's client against a server; gives the answers of ``score_texts.py``.

        Raises:
            SystemExit: The client failed, or another release's packages were imported.
        """
        done = subprocess.run(
            [self.python, "-P", _PROGRAM, address],
            env={**os.environ, **self._environment()}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"The client of {self.name} failed:\n{done.stderr}")
        answers: dict[str, Any] = json.loads(done.stdout)
        if not Path(answers["package"]).is_relative_to(self.folder):
            sys.exit(f"The client of {self.name} is to come from {self.folder}, but came from {answers['package']}")
        return answers

    def _environment(self) -> dict[str, str]:
        return {"PYTHONPATH": self.path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def git(*arguments: str) -> str | None:
    """Output of a git command without the last newline; None if it failed."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def last_release() -> str | None:
    """The last tag before the present commit; without one ``FIRST``, or None where that commit is missing."""
    # A tag of the present commit itself is the release that is to be checked.
    tagged = git("describe", "--tags", "--exact-match", "--match", "v[0-9]*", "HEAD") is not None
    start = "HEAD^" if tagged else "HEAD"
    tag = git("describe", "--tags", "--abbrev=0", "--match", "v[0-9]*", start)
    if tag is not None or git("cat-file", "-e", f"{FIRST}^{{commit}}") is None:
        return tag
    return FIRST


def install(release: str, folder: Path) -> Side:
    """Build the wheel of a commit, and install it into an environment of its own in ``folder``.

    Raises:
        subprocess.CalledProcessError: A step failed; its output says why.
    """
    shutil.rmtree(folder, ignore_errors=True)
    source, environment = folder / "source", folder / "environment"
    archive = subprocess.run(["git", "archive", release], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(source, filter="data")
    uv = Path(sys.executable).parent / "uv"
    subprocess.run([uv, "build", "--quiet", "--wheel", "--out-dir", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run([uv, "pip", "install", "--quiet", "--no-deps", "--python", python, wheel], check=True)
    # Adds a directory without reading the .pth files in it, so that an editable installation there is not found.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Side(f"the last release ({release[:12]})", python, environment)


def differences(answers: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of the answers that differ, scores by more than 1e-5."""

    def flat(value: Any) -> list[Any]:
        return [one for each in value for one in flat(each)] if isinstance(value, list) else [value]

    def same(left: Any, right: Any) -> bool:
        if isinstance(left, float):
            return math.isclose(left, right, rel_tol=0.0, abs_tol=_TOLERANCE)
        return bool(left == right)

    differing = []
    for name in ("model", "rerank", "grid", "pairs", "refused"):
        left, right = flat(answers.get(name)), flat(expected.get(name))
        if len(left) != len(right) or not all(map(same, left, right)):
            differing.append(f"{name}: {answers.get(name)} instead of {expected.get(name)}")
    return differing


def main(arguments: list[str] | None = None) -> int:
    """Compare the two releases.

    Returns:
        The exit status: 0 if all answers are equal, or if there is no last release here; 1 otherwise.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tools.last_release", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--release", help="tag or commit to take as the last release (default: found as described)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "last-release", help="directory for its files")
    options = parser.parse_args(arguments)
    release = options.release or last_release()
    if release is None:
        where = "a shallow clone" if git("rev-parse", "--is-shallow-repository") == "true" else "this copy"
        print(
            f"Skipped: there is no tag vX.Y.Z before this commit, and {where} lacks the commit {FIRST[:12]}, which "
            "stands for version 0.1.0 (git fetch --unshallow --tags gets both)"
        )
        return 0
    print(f"Building and installing {release} into {options.folder}", flush=True)
    old = install(release, options.folder)
    new = Side("this release", Path(sys.executable), ROOT, f"{ROOT}{os.pathsep}{ROOT / 'protos'}")
    servers = {side.name: side.serve(options.folder / f"server-{number}.log") for number, side in enumerate((old, new))}
    failed = False
    try:
        expected = old.ask(servers[old.name].wait_ready())
        for client, server in ((old, new), (new, old), (new, new)):
            found = differences(client.ask(servers[server.name].wait_ready()), expected)
            failed = failed or bool(found)
            print(f"Client of {client.name}, server of {server.name}: {'; '.join(found) or 'the same answers'}")
    finally:
        for each in servers.values():
            each.stop()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
