"""Promotion: mined negatives that a reranker finds more relevant than the positive become positives.

The recipe of RLHN (https://huggingface.co/papers/2505.16967), with a reranker as judge. From a row with an anchor, a
positive and n mined negatives it makes

    (1) a row with the anchor, its positive, and the negatives that are left;
    (2) for each negative whose score is above the positive's by more than the margin, a row with the anchor, that
        negative as positive, and the same negatives as in (1). A promoted negative is no negative any more.

Negatives with the text of a positive of the same row are left out, and a promoted text gets one row.

Every row has n negatives, because losses take whole columns. If k of them are left, with 0 < k < n, they are repeated
in their order until there are n. If none is left, all n are positives of other rows, drawn at random from the same
4,096 rows of the file: other anchors' documents, as in-batch negatives are. If there is no such row, the row is left
out and counted.

Rows of one anchor are next to each other in the result. Train with ``BatchSamplers.NO_DUPLICATES``: two rows of one
anchor in a batch would make each one's positive a negative of the other.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from loss_client.rows import Row, Rows
from loss_client.score.pairs import NegativesColumns

_WINDOW_ROWS = 4096


@dataclass(slots=True)
class Counts:
    """Counts of a promotion.

    Attributes:
        rows: Rows that were read.
        rows_with_promotion: Of these, rows with at least one promoted negative.
        promoted: Promoted negatives, which are rows of their own in the result.
        repeated: Rows of the result whose negatives were repeated.
        drawn: Rows of the result whose negatives are other rows' positives.
        left_out: Rows that are not in the result, because there was no negative for them.
        written: Rows of the result.
    """

    rows: int = 0
    rows_with_promotion: int = 0
    promoted: int = 0
    repeated: int = 0
    drawn: int = 0
    left_out: int = 0
    written: int = 0


def promote(rows: Iterator[Row], columns: NegativesColumns, margin: float, counts: Counts) -> Iterator[dict[str, str]]:
    """Yield the rows of the result; see the module.

    Args:
        rows: Rows with scores in ``columns.score``.
        columns: Their columns.
        margin: Margin in units of the scores, 0 or more.
        counts: Counts to add to.
    """
    draw = random.Random(0)
    for window in _windows(rows):
        for row in window:
            counts.rows += 1
            for one in _rows_of(row, columns, margin, counts, window, draw):
                counts.written += 1
                yield one


def save(scored: Path, output: Path, columns: NegativesColumns, margin: float) -> Counts:
    """Promote the rows of a file of scored rows, and save the result as a directory of ``datasets``.

    Args:
        scored: The file.
        output: The directory; it must not exist.
        columns: Columns of the file. The result has the same ones for anchor, positive and negatives, and no others.
        margin: See ``promote``.

    Returns:
        Counts of the promotion.
    """
    import datasets  # type: ignore[import-untyped]

    names = (columns.anchor, columns.positive, *columns.negatives)
    features = datasets.Features({name: datasets.Value("string") for name in names})
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as directory:
        # The rows go through a file of datasets' cache, so that memory does not grow with their number.
        report = Path(directory) / "counts.json"
        made = datasets.Dataset.from_generator(
            _generate,
            features=features,
            cache_dir=directory,
            gen_kwargs={
                "scored": str(scored),
                "columns": asdict(columns),
                "margin": margin,
                "report": str(report),
            },
        )
        finished = Path(directory) / "finished"
        made.save_to_disk(str(finished))
        shutil.move(finished, output)
        return Counts(**json.loads(report.read_text()))


def _generate(scored: str, columns: dict[str, Any], margin: float, report: str) -> Iterator[dict[str, str]]:
    counts = Counts()
    found = NegativesColumns(**{**columns, "negatives": tuple(columns["negatives"])})
    yield from promote(Rows(Path(scored)).read(), found, margin, counts)
    Path(report).write_text(json.dumps(asdict(counts)))


def _windows(rows: Iterator[Row]) -> Iterator[Sequence[Row]]:
    while window := list(islice(rows, _WINDOW_ROWS)):
        yield window


def _rows_of(
    row: Row, columns: NegativesColumns, margin: float, counts: Counts, window: Sequence[Row], draw: random.Random
) -> Iterator[dict[str, str]]:
    first, *others = row[columns.score]
    texts = [row[name] for name in columns.present(row)]
    promoted = dict.fromkeys(text for text, score in zip(texts, others, strict=True) if score > first + margin)
    promoted.pop(row[columns.positive], None)
    positives = [row[columns.positive], *promoted]
    left = [text for text in texts if text not in positives]
    count = len(columns.negatives)
    counts.rows_with_promotion += bool(promoted)
    counts.promoted += len(promoted)
    if left:
        negatives = [left[place % len(left)] for place in range(count)]
        counts.repeated += len(positives) * (len(left) < count)
    else:
        negatives = _drawn(row, columns, positives, count, window, draw)
        if not negatives:
            counts.left_out += 1
            return
        counts.drawn += len(positives)
    for positive in positives:
        yield {
            columns.anchor: row[columns.anchor],
            columns.positive: positive,
            **dict(zip(columns.negatives, negatives, strict=True)),
        }


def _drawn(
    row: Row,
    columns: NegativesColumns,
    positives: Sequence[str],
    count: int,
    window: Sequence[Row],
    draw: random.Random,
) -> list[str]:
    """Return ``count`` positives of other anchors in the window, distinct if there are as many; none without any."""
    found: dict[str, None] = {}
    for place in draw.sample(range(len(window)), len(window)):
        other = window[place]
        if other[columns.anchor] != row[columns.anchor] and other[columns.positive] not in positives:
            found[other[columns.positive]] = None
            if len(found) == count:
                break
    distinct = list(found)
    return [distinct[place % len(distinct)] for place in range(count)] if distinct else []
