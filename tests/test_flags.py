"""The reference of flags: the page lists each flag of the program, with variable, default and meaning, and no other."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo
from pydantic_settings import CliApp

from reranker_service.rpc.limits import Limits
from reranker_service.settings import Settings

from . import forked

PAGE = Path(__file__).parent.parent / "docs" / "flags.md"
ROW = re.compile(r"\| `(--[a-z.-]+)` \| `(RERANKER_\w+)` \| (.*?) \| (.*) \|")


def row(flag: str, variable: str, field: FieldInfo) -> tuple[str, str, str, str]:
    """Flag, variable, default and meaning of a setting, as its row on the page has them."""
    default = field.get_default(call_default_factory=True)
    shown = "" if default is None else {True: "on", False: "off"}[default] if type(default) is bool else f"`{default}`"
    meaning = str(field.description).replace("|", "\\|")
    return f"--{flag}", f"RERANKER_{variable}".upper(), shown, meaning


def expected() -> Iterator[tuple[str, str, str, str]]:
    for name, field in Settings.model_fields.items():
        if name != "limits":
            yield row(name.replace("_", "-"), name, field)
    for name, field in Limits.model_fields.items():
        yield row(f"limits.{name.replace('_', '-')}", f"limits__{name}", field)


def test_the_page_and_the_program_have_the_same_flags() -> None:
    result = forked.run([sys.executable, "-m", "reranker_service", "--help"], timeout=240)
    listed = re.findall(r"^  (--[a-z.-]+)", result.stdout, flags=re.MULTILINE)
    assert len(listed) > 30
    assert [one for one, *_ in ROW.findall(PAGE.read_text())] == listed


def test_the_page_has_variable_default_and_meaning_of_each_flag() -> None:
    rows = list(expected())
    table = "\n".join(
        f"| `{flag}` | `{variable}` | {default} | {meaning} |" for flag, variable, default, meaning in rows
    )
    assert ROW.findall(PAGE.read_text()) == rows, f"the table of docs/flags.md should be:\n{table}"


@pytest.mark.parametrize(
    "page",
    [
        "caches.md",
        "flags.md",
        "limits.md",
        "metrics.md",
        "security.md",
        "serving.md",
        "start-up.md",
        "troubleshooting.md",
    ],
)
def test_other_pages_name_no_flag_that_the_server_does_not_have(page: str) -> None:
    named = set(re.findall(r"`(--[a-z][a-z.-]+[a-z])\b", (PAGE.parent / page).read_text()))
    assert named
    off = {f"--no-{flag.removeprefix('--')}" for flag, _, default, _ in expected() if default in ("on", "off")}
    assert named - {"--limits"} <= {flag for flag, *_ in expected()} | off


def test_typical_uses_are_settings_that_the_server_takes() -> None:
    uses = [line.split("|")[2] for line in PAGE.read_text().partition("## Typical use")[2].splitlines()[4:]]
    assert len(uses) > 10
    for use in uses:
        for flags in re.findall(r"`(--[^`]+)`", use):
            if " " in flags:  # others are named without their value
                CliApp.run(Settings, cli_args=shlex.split(flags))
