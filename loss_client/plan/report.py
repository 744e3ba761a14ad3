"""Report of a plan: aligned text for people, or one JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from loss_client.plan.arithmetic import TOP_P_WAIT, Cost, Plan
from loss_client.plan.measure import Measurement

_UNSTEADY = 0.8
_TRUNCATED = 0.05


def as_text(plan: Plan, costs: Sequence[Cost], measured: Measurement | None, address: str | None, advice: str) -> str:
    """Return the report as lines of text.

    Args:
        plan: The plan.
        costs: The modes' costs, in the order of the table.
        measured: The measurement; None if the speed was given.
        address: Address of the server that was measured.
        advice: The sentence at the end.
    """
    lines = [] if measured is None else _server(measured, address)
    batch, unit = plan.batch, "texts" if plan.speed.by_text else "pairs"
    if measured is None:
        lines.append(f"speed     {plan.speed.rate:,.0f} {unit}/s, as given")
    ranks = f" on each of {batch.ranks} ranks" if batch.ranks > 1 else ""
    gathered = ", documents gathered across ranks" if batch.gather else ""
    epoch = "" if plan.steps is None else f", {plan.steps:,} steps an epoch"
    sizes = plan.texts
    lines += [
        f"training  batch {batch.rows:,}{ranks}, {batch.columns} columns{gathered}: {plan.train_seconds:g} s a step "
        f"without a reranker{epoch}",
        f"texts     queries of {sizes.query_bytes:,.0f} bytes, documents of {sizes.document_bytes:,.0f}, in the mean",
        "",
        *_table(plan, costs),
        "",
        *_notes(plan, costs, measured),
        "",
        advice,
    ]
    return "\n".join(lines)


def as_json(plan: Plan, costs: Sequence[Cost], measured: Measurement | None, address: str | None, advice: str) -> str:
    """Return the report as a JSON object; for arguments see ``as_text``."""
    server = None
    if measured is not None:
        server = {"address": address, **asdict(measured)}
        del server["speed"]
    batch = plan.batch
    modes = [{**asdict(cost.mode), "pairs": cost.mode.pairs, **_without_mode(cost)} for cost in costs]
    return json.dumps(
        {
            "server": server,
            "speed": {"rate": plan.speed.rate, "unit": "texts/s" if plan.speed.by_text else "pairs/s"},
            "servers": plan.servers,
            "batch": asdict(batch),
            "step_seconds": plan.train_seconds,
            "steps_per_epoch": plan.steps,
            "texts": asdict(plan.texts),
            "modes": modes,
            "advice": advice,
        },
        indent=2,
    )


def _without_mode(cost: Cost) -> dict[str, object]:
    values: dict[str, object] = asdict(cost)
    del values["mode"]
    return values


def _server(measured: Measurement, address: str | None) -> list[str]:
    unit = "text" if measured.speed.by_text else "pair"
    return [
        f"server    {address}: {measured.model}, a {measured.kind}, on {measured.engine}",
        f"model     fingerprint {measured.fingerprint}",
        f"speed     {measured.speed.rate:,.0f} {unit}s/s: {measured.pairs:,} pairs in {measured.seconds:.1f} s, "
        f"{measured.tokens:.0f} tokens a {unit}",
    ]


def _table(plan: Plan, costs: Sequence[Cost]) -> list[str]:
    of = f"{plan.servers:,} server" if plan.servers == 1 else f"{plan.servers:,} servers"
    heads = [
        ("", "mode"),
        ("pairs", "a step"),
        ("scoring by", "one server"),
        ("a step with", of),
        ("servers", "for no wait"),
        ("wire", "a step"),
    ]
    rows = [
        [
            cost.mode.name + (" (estimate)" if cost.mode.estimated else ""),
            f"{cost.mode.pairs:,}",
            f"{three(cost.scoring_seconds)} s",
            f"{three(cost.step_seconds)} s",
            f"{cost.servers_without_wait:,}",
            _size(cost.bytes),
        ]
        for cost in costs
    ]
    if plan.steps is not None:
        heads.append(("GPU hours", "an epoch"))
        for row, cost in zip(rows, costs, strict=True):
            row.append(three(cost.gpu_hours or 0.0))
    lines = [[upper for upper, _ in heads], [lower for _, lower in heads], *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _notes(plan: Plan, costs: Sequence[Cost], measured: Measurement | None) -> list[str]:
    notes = ["Pairs known a batch ahead are scored while a step trains: a step takes the longer one of both times."]
    if any(cost.mode.late for cost in costs):
        notes.append(
            'A step with top_p waits for its rounds; "no wait" means a step of at most '
            f"{TOP_P_WAIT:g} times the one without a reranker."
        )
    if any(cost.mode.estimated for cost in costs):
        notes.append("Estimates use shares that were measured with docstrings and MiniLM (docs/loss-performance.md).")
    if any(cost.mode.per_anchor is not None for cost in costs):
        notes.append('The time of the preselector of candidates="nearest" is not included.')
    if plan.speed.by_text:
        notes.append("A bi-encoder embeds each text of a step once, so that all modes take it the same time.")
    if plan.steps is not None:
        notes.append("GPU hours are those of the rerankers: servers times the time of an epoch.")
    if measured is not None and measured.ratio < _UNSTEADY:
        notes.append(
            f"The speed is uncertain: of two equal jobs, one had {measured.ratio:.0%} of the other's. Other work may "
            "run on the server; measure for longer with --seconds."
        )
    if measured is not None and measured.truncated > _TRUNCATED:
        notes.append(f"{measured.truncated:.0%} of the pairs were truncated to the length limit.")
    return notes


def three(number: float) -> str:
    """Write a number with three significant digits, or with all digits before the decimal point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{three(size)} {unit}"
        size /= 1000
    return f"{three(size)} GB"
