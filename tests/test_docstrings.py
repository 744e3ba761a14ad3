"""Tests of the demo's data set: which docstrings become pairs, and the split into training and held-out pairs."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from examples.docstrings import Pair, collect, pairs_of_source, repeated_share, split_by_module

BODY = "The body explains at some length what the function does, and what it does not do."


def source(text: str) -> bytes:
    return textwrap.dedent(text).encode()


def package(folder: Path, name: str, files: dict[str, str]) -> None:
    for path, content in {"__init__.py": "", **files}.items():
        (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / path).write_text(content)


def function(summary: str, body: str = BODY) -> str:
    return f'def f():\n    """{summary}\n\n    {body}\n    """\n'


def test_modules_classes_and_functions_give_pairs_in_the_order_of_the_file() -> None:
    pairs = pairs_of_source(
        source(f'''
        """Summary of the whole module.

        {BODY}
        """
        class A:
            """Summary of the class A here.

            {BODY}
            """
            async def m(self):
                """Summary of a method
                on two lines.

                {BODY}
                """
        '''),
        "a/b.py",
    )
    assert pairs == [
        Pair("Summary of the whole module.", BODY, "a/b.py"),
        Pair("Summary of the class A here.", BODY, "a/b.py"),
        Pair("Summary of a method on two lines.", BODY, "a/b.py"),
    ]


@pytest.mark.parametrize(
    ("summary", "body"),
    [
        ("Too short.", BODY),
        ("Too long, " * 21, BODY),
        ("No body to speak of here.", "See above."),
        ("Only a session of the interpreter.", ">>> " + "f(1, 2, 3) + " * 20),
    ],
)
def test_docstrings_without_a_usable_summary_or_body_are_left_out(summary: str, body: str) -> None:
    assert pairs_of_source(function(summary, body).encode(), "m.py") == []
    assert len(pairs_of_source(function("Summary of a fitting length.").encode(), "m.py")) == 1


def test_bodies_lose_underlines_sessions_and_version_notes() -> None:
    (pair,) = pairs_of_source(
        source('''
        def f():
            """Give back the number it is given.

            .. versionadded:: 3.2

            Parameters
            ----------
            x : int
                The number that is given back, and that may be of any size at all.

            Examples
            --------
            >>> f(1)
            1

            That was all.
            """
        '''),
        "m.py",
    )
    assert pair.body == (
        "Parameters x : int The number that is given back, and that may be of any size at all. Examples That was all."
    )


def test_long_bodies_end_at_a_word() -> None:
    (pair,) = pairs_of_source(function("Summary of a fitting length.", "seventy " * 100).encode(), "m.py")
    assert pair.body == " ".join(["seventy"] * 40)


def test_no_package_takes_more_than_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package(tmp_path, "small_one", {"a.py": function("The one pair of the small package.")})
    for name in ("large_one", "large_two"):
        files = {f"sub/m{number}.py": function(f"Summary {number} of {name}.") for number in range(30)}
        package(tmp_path, name, files | {"tests/t.py": function("A test, which is left out."), "bad.py": "def ("})
    pairs = collect(21, ["small_one", "large_one", "not_installed_at_all", "large_two"])
    assert [pair.module.partition("/")[0] for pair in pairs] == ["small_one"] + ["large_one"] * 10 + ["large_two"] * 10
    assert collect(21, ["small_one", "large_one", "large_two"]) == pairs
    everything = collect(1000, ["large_one"])
    assert len(everything) == 30
    assert not any("test" in pair.summary for pair in everything)


def test_code_is_read_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package(tmp_path, "explosive", {"__init__.py": "raise SystemExit\n" + function("Read without being imported.")})
    assert [pair.summary for pair in collect(5, ["explosive"])] == ["Read without being imported."]


def test_the_installed_packages_give_real_pairs() -> None:
    pairs = collect(300)
    assert len(pairs) == 300
    assert {"stdlib", "numpy", "torch"} <= {pair.module.partition("/")[0] for pair in pairs}
    assert all(20 <= len(pair.summary) <= 200 and 60 <= len(pair.body) <= 320 for pair in pairs)


def test_held_out_modules_share_no_text_with_training() -> None:
    copied = [Pair(f"Copied summary {number}", f"Copied body {number % 5}", f"p/m{number}.py") for number in range(200)]
    unique = [Pair(f"Summary {number}", f"Body {number}", f"p/m{number % 50}.py") for number in range(400)]
    upper = [Pair(pair.summary.upper(), pair.body, f"q/{pair.module}") for pair in unique[:100]]
    split = split_by_module([*copied, *unique, *upper], 0.2, seed=3)
    assert {pair.module for pair in split.train}.isdisjoint(pair.module for pair in split.held_out)
    held_out_texts = {text.lower() for pair in split.held_out for text in (pair.summary, pair.body)}
    assert all({pair.summary.lower(), pair.body.lower()}.isdisjoint(held_out_texts) for pair in split.train)
    assert 200 < len(split.train) < 600
    assert 60 < len(split.held_out) < 240
    assert split_by_module([*copied, *unique, *upper], 0.2, seed=3) == split
    assert split_by_module([*copied, *unique, *upper], 0.2, seed=4) != split


def test_repeated_share_counts_pairs_with_a_text_of_another() -> None:
    pairs = [
        Pair("One", "Alpha", "m"),
        Pair("Two", "alpha", "m"),
        Pair("two", "Beta", "m"),
        Pair("Three", "Gamma", "m"),
    ]
    assert repeated_share(pairs) == 0.75
    assert repeated_share([]) == 0.0


def test_invalid_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        collect(0)
    with pytest.raises(ValueError, match="none of these packages is installed: not_there"):
        collect(1, ["not_there"])
    with pytest.raises(ValueError, match=r"between 0 and 1, not 1\.0"):
        split_by_module([], 1.0, seed=0)
