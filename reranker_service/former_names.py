"""Former names of settings: flags and variables that go on working under the names of earlier releases."""

from __future__ import annotations

from collections.abc import MutableMapping

_PRESENT = {"grace": "graceful-timeout", "max-calls": "max-concurrent-rpcs"}
"""Present flag by former flag, without dashes at the front."""


def take_former_names(arguments: list[str], environment: MutableMapping[str, str]) -> dict[str, str]:
    """Replace former names by the present ones, in place. A variable under its present name wins over its former name.

    Args:
        arguments: The command line.
        environment: The variables.

    Returns:
        The present name by the former name of each flag and variable that was found.
    """
    found = {}
    for former, present in _PRESENT.items():
        for place, argument in enumerate(arguments):
            flag, equals, value = argument.partition("=")
            if flag == f"--{former}":
                arguments[place] = f"--{present}{equals}{value}"
                found[flag] = f"--{present}"
        old, new = _variable(former), _variable(present)
        for name in [name for name in environment if name.upper() == old]:
            environment.setdefault(new, environment.pop(name))
            found[name] = new
    return found


def _variable(flag: str) -> str:
    return f"RERANKER_{flag.replace('-', '_').upper()}"
