"""Mined triplets as the reranker judges them: scores of the positives and of the negatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from datasets import Dataset  # type: ignore[import-untyped]

from examples.docstrings import text_key
from loss_client import RerankerClient

# A text is shown if at least this share of its characters are letters and spaces: others are tables and formulas.
_LETTERS_LEAST = 0.93
# Two documents that begin with the same characters are versions of one docstring.
_COMMON_BEGINNING = 30


@dataclass(frozen=True, slots=True)
class Judged:
    """A triplet with the reranker's scores, probabilities in [0, 1].

    Attributes:
        anchor: The query.
        positive: The document that belongs to the anchor.
        negative: The mined document.
        positive_score: Score of the anchor with the positive.
        negative_score: Score of the anchor with the negative.
    """

    anchor: str
    positive: str
    negative: str
    positive_score: float
    negative_score: float

    @property
    def lead(self) -> float:
        """Score of the negative less that of the positive; above 0 if the reranker finds the negative better."""
        return self.negative_score - self.positive_score


def judge(triplets: Dataset, client: RerankerClient, most: int, max_length: int) -> list[Judged]:
    """Have the first ``most`` triplets scored, with inputs of at most ``max_length`` tokens.

    Args:
        triplets: Columns ``anchor``, ``positive`` and ``negative``.
        client: Client of the reranker.
        most: Maximum number of triplets.
        max_length: Longest input of the reranker in tokens.

    Raises:
        RerankerError: The reranker could not be used.
    """
    anchors, positives, negatives = (list(triplets[name][:most]) for name in ("anchor", "positive", "negative"))
    pairs = [*zip(anchors, positives, strict=True), *zip(anchors, negatives, strict=True)]
    scores = [float(score) for score in client.score_pairs(pairs, max_length=max_length)]
    return [
        Judged(*one)
        for one in zip(anchors, positives, negatives, scores[: len(anchors)], scores[len(anchors) :], strict=True)
    ]


def striking(judged: Sequence[Judged], most: int) -> list[Judged]:
    """Choose the triplets whose negative leads by most, at most ``most``.

    Left out are negatives that do not lead, texts with few letters, documents that begin alike, and documents that were
    chosen already.
    """
    shown: list[Judged] = []
    seen: set[str] = set()
    for one in sorted(judged, key=lambda one: one.lead, reverse=True):
        documents = {text_key(one.positive)[:_COMMON_BEGINNING], text_key(one.negative)[:_COMMON_BEGINNING]}
        if one.lead > 0 and len(documents) == 2 and not documents & seen and _is_readable(one):
            shown.append(one)
            seen |= documents
        if len(shown) == most:
            break
    return shown


def lines(one: Judged, width: int) -> Iterator[str]:
    """Yield the lines that show a triplet; each text takes at most two lines of ``width`` characters."""
    for name, text, score in (
        ("anchor", one.anchor, ""),
        ("positive", one.positive, f"{one.positive_score:.3f}"),
        ("negative", one.negative, f"{one.negative_score:.3f}"),
    ):
        first, second = _two_lines(text, width - len("  negative  0.000  "))
        yield f"  {name:8}  {score:5}  {first}"
        if second:
            yield f"  {'':8}  {'':5}  {second}"


def _is_readable(one: Judged) -> bool:
    return all(
        sum(letter.isalpha() or letter.isspace() for letter in text) >= _LETTERS_LEAST * len(text)
        for text in (one.anchor, one.positive, one.negative)
    )


def _two_lines(text: str, width: int) -> tuple[str, str]:
    """Break a text between two words into at most two lines; a text that is cut ends with three dots."""
    if len(text) <= width:
        return text, ""
    first = text[: width + 1].rpartition(" ")[0] or text[:width]
    rest = text[len(first) :].strip()
    if len(rest) <= width:
        return first, rest
    return first, (rest[: width - 2].rpartition(" ")[0] or rest[: width - 3]) + "..."
