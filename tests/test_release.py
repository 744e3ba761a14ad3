"""Tests of the release tools: choice of the last release, comparison of answers, and steps of the checklist."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools import last_release


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
