"""Reference of the contract: each RPC, message, field and enum value of a .proto file with its comment.

The parser reads the part of the language that the file uses, as `buf format` writes it, and refuses any other line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tools.reference.tables import row

_RPC = re.compile(r"rpc (\w+)\((stream )?(\w+)\) returns \((stream )?(\w+)\);")
_FIELD = re.compile(r"(optional |repeated )?(map<\w+, \w+>|[\w.]+) (\w+) = (\d+);")
_VALUE = re.compile(r"(\w+) = (\d+);")
_BLOCK = re.compile(r"(message|enum|service|oneof) (\w+) \{(\})?")


def contract_page(source: str) -> str:
    """Return the page of a .proto file.

    Raises:
        ValueError: A line is of a form that the parser does not know.
    """
    messages = set(re.findall(r"^(?:message|enum) (\w+)", source, flags=re.MULTILINE))
    return "\n".join(_lines(source, messages)).replace("\n\n\n", "\n\n").strip() + "\n"


def _lines(source: str, messages: set[str]) -> Iterator[str]:
    comment: list[str] = []
    blocks: list[str] = []
    choice = ""
    for number, line in enumerate(source.splitlines(), 1):
        text = line.strip()
        if text.startswith("//"):
            comment.append(text.removeprefix("//").removeprefix(" "))
        elif not text:
            comment = []
        elif text == "}":
            choice = "" if blocks.pop() == "oneof" else choice
        elif found := _BLOCK.fullmatch(text):
            if found[1] == "oneof":
                choice = f"one of `{found[2]}`"
            else:
                yield from (
                    "",
                    f"## {found[2]}",
                    "",
                    *_paragraph(comment),
                    "",
                    *_header(found[1], empty=bool(found[3])),
                )
            if not found[3]:
                blocks.append(found[1])
            comment = []
        elif blocks == ["service"] and (found := _RPC.fullmatch(text)):
            ends = (f"{stream or ''}{_type(name, messages)}" for stream, name in (found.group(2, 3), found.group(4, 5)))
            yield from ("", f"### {found[1]}", "", " to ".join(ends), "", *_paragraph(comment))
            comment = []
        elif blocks and (row := _row(text, blocks, choice, comment, messages)):
            yield row
            comment = []
        elif text.startswith("package "):
            yield from _paragraph(comment)
            comment = []
        elif not text.startswith(("syntax ", "import ")):
            raise ValueError(f"line {number} of the contract is not understood: {text}")


def _header(kind: str, *, empty: bool) -> list[str]:
    if empty or kind == "service":
        return []
    names = ["value", "number", "meaning"] if kind == "enum" else ["field", "number", "type", "meaning"]
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]


def _row(text: str, blocks: list[str], choice: str, comment: list[str], messages: set[str]) -> str | None:
    meaning = " ".join(line.strip() for line in comment)
    if blocks[-1] == "enum":
        found = _VALUE.fullmatch(text)
        cells = found and [f"`{found[1]}`", found[2], meaning]
    else:
        found = _FIELD.fullmatch(text)
        label = "" if found is None else (found[1] or "")
        cells = found and [
            f"`{found[3]}`",
            found[4],
            f"{label}{_type(found[2], messages)}",
            f"{choice}{': ' * bool(choice)}{meaning}",
        ]
    return row(cells) if cells else None


def _type(name: str, messages: set[str]) -> str:
    return f"[`{name}`](#{name.lower()})" if name in messages else f"`{name}`"


def _paragraph(comment: list[str]) -> list[str]:
    """Return a comment as Markdown, with an empty line before and after each list."""
    lines: list[str] = []
    for line in comment:
        item = re.match(r" *(-|\d+\.|  ) ?", line) is not None
        if lines and item != (re.match(r" *(-|\d+\.|  ) ?", lines[-1]) is not None):
            lines.append("")
        lines.append(line.removeprefix("  ") if item and re.match(r"  \d+\.", line) else line)
    return lines
