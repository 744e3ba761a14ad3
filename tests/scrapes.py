"""Reads a server's metrics page as Prometheus does."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterable

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from .servers import ServerProcess

Key = tuple[str, tuple[tuple[str, str], ...]]


class Scrape:
    """The samples of one scrape of a page, or the difference between two scrapes.

    ``scrape["name"]`` or ``scrape["name", "value of a label", ...]`` is the sum of all samples with that name and those
    values among their labels.
    """

    def __init__(self, samples: dict[Key, float]) -> None:
        self.samples = samples

    def __sub__(self, before: Scrape) -> Scrape:
        return Scrape({key: value - before.samples.get(key, 0.0) for key, value in self.samples.items()})

    def __getitem__(self, asked: str | tuple[str, ...]) -> float:
        name, *values = (asked,) if isinstance(asked, str) else asked
        found = [
            value
            for (one, labels), value in self.samples.items()
            if one == name and set(values) <= {text for _, text in labels}
        ]
        assert found, f"no {asked}"
        return sum(found)

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Values of ``name`` that are not 0, by the values of ``labels``."""
        assert name in self.names(), f"no {name}"
        return {
            tuple(dict(found)[label] for label in labels): value
            for (one, found), value in self.samples.items()
            if one == name and value
        }

    def names(self) -> set[str]:
        return {name for name, _ in self.samples}

    def labels(self, name: str) -> set[str]:
        """Every label that any sample of ``name`` has."""
        return {label for (one, labels), _ in self.samples.items() if one == name for label, _ in labels}


def scraped(text: str) -> Scrape:
    """Parse a page."""
    samples: Iterable[Sample] = (one for family in text_string_to_metric_families(text) for one in family.samples)
    return Scrape({(one.name, tuple(sorted(one.labels.items()))): one.value for one in samples})


def scrape_text(server: ServerProcess, accept: str = "text/plain") -> str:
    """The page of a server with ``--metrics-port``."""
    address = re.search(r"metrics=(\S+)", server.line("metrics="))[1]
    request = urllib.request.Request(f"http://{address}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.read().decode()


def scrape(server: ServerProcess) -> Scrape:
    """Scrape a server's page."""
    return scraped(scrape_text(server))
