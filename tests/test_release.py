"""Tests of the release tools: choice of the last release, comparison of answers, and steps of the checklist."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest

from tools import last_release
from tools.release_check import CheckError, check_changelog, check_lock, check_metadata

ROOT = Path(__file__).parent.parent


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty git repository, in which the tools look."""
    monkeypatch.setattr(last_release, "ROOT", tmp_path)
    git(tmp_path, "init", "--quiet")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=A tester", "-c", "user.email=tester@localhost", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder: Path, tag: str | None = None) -> str:
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "One")
    if tag is not None:
        git(folder, "tag", tag)
    return git(folder, "rev-parse", "HEAD")


def test_without_a_tag_the_first_release_is_a_commit(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = commit(repository)
    commit(repository)
    monkeypatch.setattr(last_release, "FIRST", first)
    assert last_release.last_release() == first


def test_without_that_commit_the_comparison_is_skipped(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit(repository)
    assert last_release.last_release() is None
    assert last_release.main([]) == 0
    assert "no tag vX.Y.Z" in capsys.readouterr().out


def test_the_last_release_is_the_last_tag_before_this_commit(repository: Path) -> None:
    commit(repository, "v0.1.0")
    commit(repository, "v0.2.0")
    assert last_release.last_release() == "v0.1.0"
    commit(repository, "experiment-3")
    assert last_release.last_release() == "v0.2.0"


def test_answers_differ_by_more_than_rounding() -> None:
    answers = {
        "model": "m",
        "rerank": [[0, 0.5], [1, 0.25]],
        "grid": [[0.5]],
        "pairs": [0.5],
        "refused": ["max_length"],
    }
    rounded = {**answers, "rerank": [[0, 0.5 + 1e-7], [1, 0.25]]}
    assert last_release.differences(rounded, answers) == []
    other = {**answers, "grid": [[0.51]], "pairs": [0.5, 0.5], "refused": []}
    assert [one.split(":")[0] for one in last_release.differences(other, answers)] == ["grid", "pairs", "refused"]


CHANGES = """# Changelog

## [Unreleased]

## [0.2.0] - 2026-11-30

### Added

- One thing.
- Another thing.

## [0.1.0]

- No date.
"""


def test_a_release_needs_entries_with_a_date_in_the_changelog() -> None:
    assert check_changelog(CHANGES, "0.2.0") == "2 entries for 0.2.0 with a date"
    for version in ("0.1.0", "0.3.0", None):
        with pytest.raises(CheckError, match=r"CHANGELOG\.md"):
            check_changelog(CHANGES, version)
    assert "Unreleased" in check_changelog((ROOT / "CHANGELOG.md").read_text(), None)


def test_the_pinned_lists_satisfy_every_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in ("cpu.txt", "cuda.txt"):
        assert check_lock(project, (ROOT / "requirements" / name).read_text(), name) > 30


def test_a_pin_out_of_range_and_a_requirement_without_a_pin_are_found() -> None:
    extras = {"dev": ["own[more]"], "more": ["first-name>=2", "second"]}
    project = {"name": "own", "dependencies": ["third<3"], "optional-dependencies": extras}
    assert check_lock(project, "first.name==2.1\nsecond==1 ; python_version > '3.11'\nthird==2\n", "list") == 3
    with pytest.raises(CheckError, match=r"first-name>=2 \(pinned: 1\.9\)") as error:
        check_lock(project, "first_name==1.9\nthird==2\n", "list")
    assert "second (pinned: nothing)" in str(error.value)


def test_metadata_that_an_index_would_refuse_are_found() -> None:
    head = "Metadata-Version: 2.4\nName: own\nVersion: 1.0\nSummary: One\n"
    head += "License-Expression: MIT\nRequires-Python: >=3.11\n"
    described = "Description-Content-Type: text/markdown\n\nText"
    assert check_metadata(head + described, "1.0") == "own 1.0"
    with pytest.raises(CheckError, match="not the tag's"):
        check_metadata(head + described, "1.1")
    with pytest.raises(CheckError, match="description"):
        check_metadata(head, "1.0")
    with pytest.raises(CheckError, match="other @ file"):
        check_metadata(head + "Requires-Dist: other @ file:///other.whl\n" + described, None)
    with pytest.raises(CheckError, match="version"):
        check_metadata(head.replace("1.0", "one") + described, None)
