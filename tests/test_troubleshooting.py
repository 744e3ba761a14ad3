"""The page of errors: every quoted message occurs in the source, and has a cause and a remedy."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from functools import cache

import pytest

import loss_client

from .pages import DOCS

PAGE = (DOCS / "troubleshooting.md").read_text()
# Messages after this heading are those of other programs.
OWN, _, OTHER = PAGE.partition("## Messages of gRPC and other libraries")
VALUE = "…"


def tables(text: str) -> Iterator[list[dict[str, str]]]:
    """The tables of a page, each a list of rows by the names of the columns."""
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        names, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines())
        yield [dict(zip(names, row, strict=True)) for row in rows]


def quoted() -> list[str]:
    return [row["message"].strip("`") for table in tables(OWN) for row in table]


def texts(source: str) -> Iterator[str]:
    """The strings of a Python file, with a mark in the place of each value that is put in."""
    tree = ast.parse(source)
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in ast.walk(node)
        if part is not node
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
            yield re.sub(f"{VALUE}+", VALUE, "".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield re.sub(r"%[-.0-9]*[a-z]", VALUE, node.value)


@cache
def source_texts() -> str:
    files = sorted(
        path for package in ("reranker_service", "loss_client") for path in (DOCS.parent / package).rglob("*.py")
    )
    return "\n".join(text for path in files for text in texts(path.read_text()))


def test_strings_of_the_source_have_a_mark_for_each_value() -> None:
    assert list(texts("f'{a}{b} is {c!r}; ' 'it has to be %d'\n'%s of %.3g'\n'one' 'two'")) == [
        "… is …; it has to be %d",
        "… of …",
        "onetwo",
    ]


@pytest.mark.parametrize("message", quoted())
def test_each_message_of_the_page_occurs_in_the_source(message: str) -> None:
    assert len(message.replace(VALUE, "").strip()) > 8, f"{message!r} is too short to search for"
    assert message in source_texts(), (
        f"no string of the source has {message!r}; if the message was changed, change the page"
    )


def test_each_message_has_a_cause_and_a_remedy() -> None:
    rows = [row for table in tables(PAGE) for row in table]
    assert all(row["cause"] and row["remedy"] and row["message"].startswith("`") for row in rows)
    assert len(set(quoted())) == len(quoted()) > 100


def test_the_errors_of_the_client_are_those_that_it_has() -> None:
    named = set(re.findall(r"`(\w+Error)`", OWN))
    assert {name for name in named if name in dir(loss_client)} >= {"RerankerUnavailableError", "ModelChangedError"}
    assert all(name in loss_client.__all__ or hasattr(builtins, name) for name in named)
