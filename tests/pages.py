"""Code blocks of the documentation's pages, as tests read them."""

from __future__ import annotations

import re
import shlex
from itertools import dropwhile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
ADDRESS = "127.0.0.1:50051"  # of the server, on every page
_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


class Block(NamedTuple):
    """A fenced block; ``reason`` says why it is not run, from a comment ``<!-- not run: ... -->`` before it."""

    language: str
    text: str
    reason: str | None


def blocks(page: Path, *languages: str) -> list[Block]:
    """Blocks of a page in these languages, in their order."""
    found = [Block(one["language"], one["text"], one["reason"]) for one in _BLOCK.finditer(page.read_text())]
    return [one for one in found if one.language in languages]


def after_diff(text: str) -> str:
    """The program that a block in the language "diff" leads to."""
    return "".join(line[1:] for line in text.splitlines(keepends=True) if not line.startswith("-") and line[1:])


def before_diff(text: str) -> str:
    """The program that a block in the language "diff" begins with."""
    return "".join(line[1:] for line in text.splitlines(keepends=True) if not line.startswith("+") and line[1:])


def commands(text: str) -> list[list[str]]:
    """Words of the commands of a shell block, without comments and the variables before a command.

    Lines that end in a backslash, and those inside quotes, are joined.
    """
    found, command = [], ""
    for line in text.replace("\\\n", " ").splitlines():
        command += line.removeprefix("$ ") + "\n"
        try:
            words = shlex.split(command, comments=True)
        except ValueError:  # an open quote
            continue
        command = ""
        found.append(list(dropwhile(re.compile(r"\w+=").match, words)))
    return [words for words in found if words]


def shell_blocks(page: str, containing: str) -> list[str]:
    """The blocks of shell commands on a page of docs/ that contain a text."""
    return [block.text for block in blocks(DOCS / page, "sh") if containing in block.text]
