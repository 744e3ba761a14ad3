"""What our server counts, read where Prometheus would read it."""

from __future__ import annotations

import urllib.request
from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.processes import Child

FLAGS = ("--metrics-port", "0")
"""Flags of a server whose counts are to be read."""


class Counts:
    """The counters of one server, or how much they have grown.

    Attributes:
        totals: By sample name, the sum over all labels.
        labels: By sample name, the labels of its last series.
    """

    def __init__(self, totals: dict[str, float], labels: dict[str, dict[str, str]]) -> None:
        self.totals = totals
        self.labels = labels

    def since(self, earlier: Counts) -> Counts:
        """What was added after ``earlier`` was read."""
        return Counts({name: value - earlier.totals.get(name, 0.0) for name, value in self.totals.items()}, self.labels)


def read(process: Child) -> Counts:
    """Read the counts of a server that was started with ``FLAGS`` and is ready.

    Raises:
        ProcessError: The server does not say where its counts are.
    """
    address = process.wait_for(r"event=metrics\b.*\bmetrics=(\S+)")[1]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as response:
        page = response.read().decode()
    totals: defaultdict[str, float] = defaultdict(float)
    labels: dict[str, dict[str, str]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            totals[sample.name] += sample.value
            labels[sample.name] = dict(sample.labels)
    return Counts(dict(totals), labels)
