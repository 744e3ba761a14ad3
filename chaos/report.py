"""Report of a chaos run: one line for each fault, as a table and as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from chaos.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Outcome:
    """Counts of one fault.

    Attributes:
        fault: Name of the fault.
        wanted: Number of times that it had to be injected, at least.
        injected: Number of times that it was injected.
        ledger: Counts of what callers asked for and got.
        scored: Pairs that the servers scored; 0 if these were not counted.
        seconds: Time that it took.
        skipped: Why the fault was not injected at all; ``None`` if it was.
    """

    fault: str
    wanted: int = 0
    injected: int = 0
    ledger: Ledger | None = None
    scored: int = 0
    seconds: float = 0.0
    skipped: str | None = None

    @property
    def clean(self) -> bool:
        """Whether the fault was skipped, or was injected often enough without any harm to a caller."""
        ledger = self.ledger
        if ledger is None:
            return self.skipped is not None
        harmless = not (ledger.wrong or ledger.missing or ledger.twice or ledger.errors)
        return harmless and ledger.asked > 0 and self.injected >= self.wanted

    @property
    def done_twice(self) -> float | None:
        """Pairs that servers scored over pairs that callers asked for, less 1; ``None`` if they were not counted."""
        return self.scored / self.ledger.asked - 1 if self.ledger is not None and self.scored else None

    def record(self) -> dict[str, Any]:
        """Return the outcome as a JSON object."""
        if self.ledger is None:
            return {"fault": self.fault, "skipped": self.skipped}
        return {
            "fault": self.fault,
            "wanted": self.wanted,
            "injected": self.injected,
            **self.ledger.record(),
            "scored": self.scored,
            "done_twice": self.done_twice,
            "seconds": self.seconds,
            "clean": self.clean,
        }


def append(path: Path, outcome: Outcome) -> None:
    """Append an outcome to a file, as a line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(outcome.record()) + "\n")


def table(outcomes: Sequence[Outcome]) -> Table:
    """Make a table of the outcomes."""
    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    made.add_column("fault")
    for heading in ("times", "pairs asked", "wrong", "missing", "twice", "errors", "longest pause", "done twice", ""):
        made.add_column(heading, justify="right", no_wrap=True)
    for one in outcomes:
        ledger = one.ledger
        if ledger is None:
            made.add_row(one.fault, *[""] * 8, "skipped")
            continue
        made.add_row(
            one.fault,
            f"{one.injected}",
            f"{ledger.asked:,}",
            *(f"{count:,}" for count in (ledger.wrong, ledger.missing, ledger.twice, len(ledger.errors))),
            f"{ledger.longest_pause:.1f} s",
            "" if one.done_twice is None else f"{one.done_twice:.1%}",
            "[green]ok[/]" if one.clean else "[red]failed[/]",
        )
    return made


def explanations(outcomes: Sequence[Outcome]) -> list[str]:
    """Say why outcomes are not clean, or were skipped."""
    lines = []
    for one in outcomes:
        if one.skipped is not None:
            lines.append(f"{one.fault}: skipped, because {one.skipped}")
        elif one.ledger is not None and not one.clean:
            if one.injected < one.wanted:
                lines.append(
                    f"{one.fault}: injected {one.injected} times, and not {one.wanted}, in {one.seconds:.0f} s"
                )
            lines += [f"{one.fault}: {error}" for error in one.ledger.errors[:5]]
    return lines
