"""Advice: one sentence that names the mode to take and the number of servers."""

from __future__ import annotations

from collections.abc import Collection

from loss_client.plan.arithmetic import Candidates, Cost, Plan


def advise(plan: Plan, candidates: Collection[Candidates], per_anchor: float) -> str:
    """Return the advice for a plan.

    The first mode without a wait, with the servers of the plan, is taken: all pairs, because the distillation term
    learns from every score; then the nearest ones, first with ``per_anchor`` and then with as many as fit into a step.
    With a bi-encoder, which embeds each text once, no mode takes less time than all pairs.

    Args:
        plan: The plan.
        candidates: Modes to choose from, at least one.
        per_anchor: Pairs an anchor beyond its own documents that are wanted.
    """
    everything = plan.cost(plan.all_pairs())
    if "all" in candidates and everything.servers_without_wait <= plan.servers:
        needed = everything.servers_without_wait
        return f'Take candidates="all" with {_servers(needed)}: all pairs are scored while a step trains.'
    if "nearest" in candidates and not (plan.speed.by_text and "all" in candidates):
        return (
            f"{_nearest(plan, per_anchor)}; all pairs without a wait take {_servers(everything.servers_without_wait)}."
        )
    return (
        f'Take {_servers(everything.servers_without_wait)} for candidates="all": with {_servers(plan.servers)} '
        f"{_slow(plan, everything)}."
    )


def _nearest(plan: Plan, per_anchor: float) -> str:
    wanted, own = plan.cost(plan.nearest(per_anchor)), plan.cost(plan.own_documents())
    if wanted.servers_without_wait <= plan.servers:
        return (
            f'Take candidates="nearest" with per_anchor={per_anchor:g} and {_servers(wanted.servers_without_wait)}: '
            "its pairs are scored while a step trains"
        )
    more = f"per_anchor={per_anchor:g} without a wait takes {_servers(wanted.servers_without_wait)}"
    if own.servers_without_wait <= plan.servers:
        extra = plan.nearest_auto().per_anchor or 0.0
        return (
            f'Take candidates="nearest" with per_anchor="auto" and {_servers(plan.servers)}: {extra:.3g} pairs an '
            f"anchor beyond its own documents are scored while a step trains; {more}"
        )
    return (
        f'Take {_servers(own.servers_without_wait)} or more for candidates="nearest" with per_anchor="auto": with '
        f"{_servers(plan.servers)} the anchors' own documents alone make a step of {own.step_seconds:.3g} s out of one "
        f"of {plan.train_seconds:.3g} s; {more}"
    )


def _slow(plan: Plan, cost: Cost) -> str:
    return f"a step takes {cost.step_seconds:.3g} s in place of {plan.train_seconds:.3g} s"


def _servers(count: int) -> str:
    return f"{count:,} server" if count == 1 else f"{count:,} servers"
