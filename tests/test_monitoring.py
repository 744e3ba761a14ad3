"""The page of healthy ranges: it has a row for each metric of training and server, and no other."""

from __future__ import annotations

import inspect
import re

from loss_client.callbacks import _metrics
from loss_client.filter.statistics import LossStatistics

from .pages import DOCS

PAGE = (DOCS / "monitoring.md").read_text()


def first_cells(page: str) -> str:
    """The first cells of a page's tables."""
    return "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))


def test_each_metric_of_training_has_a_row() -> None:
    shown = set(re.findall(r"`reranker/(\w+)`", first_cells(PAGE)))
    counts = LossStatistics(**dict.fromkeys(inspect.signature(LossStatistics).parameters, 2))
    counts.scored_anchors = 1
    logged = {name.removeprefix("reranker/") for name in _metrics(counts)}
    assert len(logged) > 15
    assert shown == logged


def test_each_metric_of_the_server_has_a_row() -> None:
    shown = set(re.findall(r"`(reranker_\w+)`", first_cells(PAGE)))
    assert shown == set(re.findall(r"`(reranker_\w+)`", first_cells((DOCS / "metrics.md").read_text())))
