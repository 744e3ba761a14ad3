"""Reference of the command lines: the ``--help`` of each program and of each of its commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys

#: Programs, as a reader types them.
PROGRAMS = ("reranker-service", "python -m loss_client")
#: Commands that a program's ``--help`` does not list in the form of argparse.
UNLISTED = {"reranker-service": ("check",)}
_LISTED = re.compile(r"^    ([a-z]+)(?:  |$)", re.MULTILINE)


def commands_page() -> str:
    """Return the page of all commands. Raises ``CalledProcessError`` if one of them fails."""
    parts = []
    for program in PROGRAMS:
        own = _help(program)
        parts.append(f"## {program}\n\n```text\n{own}\n```")
        listed = _LISTED.findall(own.partition("\ncommands:\n")[2])
        for command in dict.fromkeys([*listed, *UNLISTED.get(program, ())]):
            parts.append(f"### {program} {command}\n\n```text\n{_help(program, command)}\n```")
    return "\n\n".join(parts) + "\n"


def _help(program: str, *arguments: str) -> str:
    module = "reranker_service" if program == "reranker-service" else program.rpartition(" ")[2]
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments, "--help"],
        env=os.environ | {"COLUMNS": "110"},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.replace("usage: __main__.py", f"usage: {program}").strip()
