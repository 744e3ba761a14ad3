"""Docstrings in Google style as Markdown: arguments as a table with types and defaults, the rest as text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from tools.reference.tables import row

_SECTION = re.compile(r"^([A-Z][A-Za-z ]+):$")
_ENTRY = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)$")
#: Sections that list names with a meaning.
_LISTS = {"Args", "Attributes", "Raises"}


@dataclass(frozen=True, slots=True)
class Parameter:
    """Type and default of a parameter, as the source has them.

    Attributes:
        annotation: Type; empty if there is none.
        default: Default; None if the parameter is required.
    """

    annotation: str
    default: str | None


def to_markdown(docstring: str, parameters: Mapping[str, Parameter], *, inherits: bool = False) -> str:
    """Return a docstring as Markdown.

    Args:
        docstring: The docstring, without indentation.
        parameters: The parameters by name, for the section "Args" and, of data classes, "Attributes". Parameters that
            the docstring does not describe are listed without a meaning.
        inherits: Whether the docstring may describe further parameters, which a base class has.

    Raises:
        ValueError: The docstring describes a parameter that there is not.
    """
    parts = _sections(docstring)
    described = {name for title, text in parts if title in ("Args", "Attributes") for name, _ in _entries(text)}
    # Data classes have their fields as attributes.
    place = "Args" if any(title == "Args" for title, _ in parts) else "Attributes"
    if parameters and not described & parameters.keys():
        place = "Args"
        parts.insert(1, ("Args", ""))
    found = []
    for title, text in parts:
        if title == "":
            found.append(_text(text))
        elif title == place and parameters:
            found.append(_table(_entries(text), parameters, inherits))
        elif title in _LISTS:
            lines = (f"- `{name}`: {_text(' '.join(meaning.split()))}" for name, meaning in _entries(text))
            found.append(f"*{'Attributes' if title == 'Attributes' else title}*\n\n" + "\n".join(lines))
        else:
            found.append(f"*{title}*\n\n{_text(text)}")
    return "\n\n".join(part.strip() for part in found if part.strip())


def _sections(docstring: str) -> list[tuple[str, str]]:
    """Return (title, text) of each section; the first one has no title."""
    parts: list[tuple[str, list[str]]] = [("", [])]
    for line in docstring.splitlines():
        title = _SECTION.match(line)
        if title:
            parts.append((title[1], []))
        else:
            parts[-1][1].append(line)
    return [(title, textwrap.dedent("\n".join(lines)).strip("\n")) for title, lines in parts]


def _entries(text: str) -> list[tuple[str, str]]:
    """Return (name, meaning) of each entry of a section such as "Args"."""
    entries: list[tuple[str, str]] = []
    for line in text.splitlines():
        entry = _ENTRY.match(line)
        if entry:
            entries.append((entry[1], entry[2]))
        elif entries:
            name, meaning = entries[-1]
            entries[-1] = name, f"{meaning}\n{line.strip()}"
    return entries


def _table(entries: list[tuple[str, str]], parameters: Mapping[str, Parameter], inherits: bool) -> str:
    meanings = dict(entries)
    lines = ["| parameter | type | default | meaning |", "|---|---|---|---|"]
    for name, parameter in parameters.items():
        default = "required" if parameter.default is None else f"`{parameter.default}`"
        meaning = _text(" ".join(meanings.pop(name, "").split()))
        annotation = f"`{parameter.annotation}`" if parameter.annotation else ""
        cells = (f"`{name}`", annotation, "" if name.startswith("*") else default, meaning)
        lines.append(row(cells))
    for name in [*meanings] if inherits else []:
        lines.append(f"| `{name}` | | that of the base class | {_text(' '.join(meanings.pop(name).split()))} |")
    if meanings:
        raise ValueError(f"the docstring describes {', '.join(meanings)}, but the parameters are {list(parameters)}")
    return "\n".join(lines)


def _text(text: str) -> str:
    """Return text of a docstring as Markdown: code, roles of Sphinx, blocks of code, and tables."""
    text = re.sub(r":\w+:`(?:([^`<]+) <[^`>]+>|~?([^`]+))`", lambda found: f"`{found[1] or found[2]}`", text)
    text = text.replace("``", "`")
    lines, fence = [], None
    for line in text.splitlines():
        if fence is not None and line.strip() and not line.startswith(fence):
            lines[-1:] = ["```", ""] if not lines[-1].strip() else [lines[-1], "```", ""]
            fence = None
        if fence is None and line.startswith("+--"):
            lines += ["```text", line]
            fence = ""
            continue
        if fence is None and line.rstrip().endswith("::"):
            before = line.rstrip()[:-2].rstrip()
            lines += [*([f"{before}:", ""] if before else []), "```python"]
            fence = "    "
            continue
        if line.strip() or lines[-1:] != ["```python"]:
            lines.append(line.removeprefix(fence) if fence else line)
    if fence is not None:
        lines.append("```")
    return "\n".join(lines)
