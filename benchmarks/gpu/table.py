"""Table of the benchmark on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table


def table(records: Sequence[dict[str, Any]]) -> Table:
    """One row a side of each shape; "of predict" is its speed over that of ``CrossEncoder.predict``."""
    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    made.add_column("shape, side")
    for heading in ("pairs/s", "low", "high", "of predict", "of peak", "GiB", "difference"):
        made.add_column(heading, justify="right", no_wrap=True)
    predict = {
        (record["shape"], record["dtype"]): record["pairs_per_second"]
        for record in records
        if record["side"].startswith("CrossEncoder")
    }
    for record in records:
        peak = record["share_of_peak"]
        made.add_row(
            f"{record['shape']}, {record['side']}",
            *(f"{record[key]:,.0f}" for key in ("pairs_per_second", "low", "high")),
            f"{record['pairs_per_second'] / predict[record['shape'], record['dtype']]:.2f}",
            "" if peak is None else f"{peak:.1%}",
            "" if record["memory_bytes"] is None else f"{record['memory_bytes'] / 2**30:.1f}",
            f"{record['largest_difference']:.2g}",
        )
    return made
