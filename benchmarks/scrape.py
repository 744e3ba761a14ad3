"""Counters of our server, read from its Prometheus endpoint."""

from __future__ import annotations

import urllib.request
from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families

from examples.processes import Child

FLAGS = ("--metrics-port", "0")
"""Flags of a server whose counters ``read`` can read."""


class Counts:
    """Counters of one server, or the growth of its counters.

    Attributes:
        totals: Sum over all series, by sample name.
        labels: Labels of the last series, by sample name.
    """

    def __init__(self, totals: dict[str, float], labels: dict[str, dict[str, str]]) -> None:
        self.totals = totals
        self.labels = labels

    def since(self, earlier: Counts) -> Counts:
        """Return the growth since ``earlier`` was read."""
        return Counts({name: value - earlier.totals.get(name, 0.0) for name, value in self.totals.items()}, self.labels)


def read(process: Child) -> Counts:
    """Read the counters of a server that was started with ``FLAGS`` and is ready.

    Raises:
        ProcessError: The server's log does not name the address of its metrics.
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
