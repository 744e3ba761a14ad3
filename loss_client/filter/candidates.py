"""CandidateStep: a batch with scores only for the candidates that hold nearly all of the softmax's mass.

``mass`` tells which candidates these are and bounds the error of the loss. Masking shrinks the denominator, so that
candidates that sufficed before their scores arrived may not suffice afterwards. Each round assumes that none of its
candidates will be masked, and rounds follow until every row's share without a score is at most epsilon. After a few of
them, a row has at least as many candidates scored as in all rounds before, so that the rounds come to an end soon.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, count
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from loss_client.client.errors import RerankerError, ScoreError
from loss_client.filter.interning import intern
from loss_client.filter.jobs import AskForPairs
from loss_client.filter.layout import Block, Layout, Thresholds
from loss_client.filter.masking import thresholds
from loss_client.filter.mass import Shortlist, split
from loss_client.filter.pair_scores import PairScores, QuerySums
from loss_client.filter.statistics import LossStatistics
from loss_client.filter.step import FilterStep
from loss_client.filter.targets import Places, Targets

Candidates = Literal["all", "mass"]
"""Rule for the pairs of a batch that are scored; see ``RerankerCachedGISTEmbedLoss``."""

# The mass of the many candidates that hold least of it is summed up in float32.
_ROUNDING = 1 + 1e-6
# Rounds in which a row has no more candidates scored than it needs if none of them is masked. A pair saved is worth
# more than a round: of 1,024 docstrings at temperature 0.01, two such rounds and then doubling score 4.5% of the
# pairs, and rounds without doubling 3.3%.
_EXACT_ROUNDS = 5


class CandidateStep(FilterStep):
    """See :class:`FilterStep`. Before the model has embedded the batch, only each anchor's own documents are scored.

    An anchor's own documents are the positive and the negatives of its row. They are the most likely to matter, and
    they come again every epoch.

    Args:
        columns: This rank's texts by column.
        epsilon: Largest share of a row's denominator that may stay without a score.
        most: Most candidates of a row to have scored, beside its own documents; ``None`` for no limit. The bound does
            not hold for rows that would need more.
        ask: Begins a scoring job. The constructor calls it for each anchor's own documents.
    """

    def __init__(self, columns: Sequence[Sequence[str]], epsilon: float, most: int | None, ask: AskForPairs) -> None:
        super().__init__(columns)
        self._epsilon = epsilon
        self._most = most
        self._ask = ask
        documents = list(chain.from_iterable(columns[1:]))
        every = np.arange(len(documents))
        self._jobs.append(ask(columns[0], documents, every % len(columns[0]), every, recurring=True))

    def _lay_out(self, merged: Sequence[Sequence[str]]) -> None:
        settings, anchors = self._settings, merged[0]
        by_scores = settings.contrast_filter == "scores"
        self._by_known = not by_scores and (settings.contrast_anchors or settings.contrast_positives)
        documents = intern([*merged[1:], anchors] if by_scores and settings.contrast_anchors else merged[1:])
        asking = [self._columns[0]]
        if by_scores and settings.contrast_positives:
            asking.append(self._columns[1])
        queries = intern([*asking, anchors] if self._by_known else asking)
        self._query_texts, self._document_texts = queries.texts, documents.texts
        self._anchor_queries, self._positive_queries = queries.ids[0], queries.ids[len(asking) - 1]
        self._all_anchor_queries = queries.ids[-1]
        self._document_ids = documents.ids[: len(merged) - 1]
        self._anchor_documents = documents.ids[-1]
        self._clear()
        self._places = Places(self._document_ids, len(documents.texts), settings.contrast_blocks)
        self._repeats = np.bincount(np.concatenate(self._document_ids), minlength=len(documents.texts))
        self._rows_counted = 0
        # Candidates of each row chosen so far, over all calls: MatryoshkaLoss calls ``select`` for each dimension.
        self._chosen = np.zeros(len(self._columns[0]), dtype=np.int64)
        self._own = np.arange(len(self._columns[0])) + self.rows.offset
        self._own_documents = self._document_ids[0][self._own]
        self._own_arrived = False
        self._shares = np.zeros(len(self._columns[0]))  # of each row, what has no score
        self._layout: Layout | None = None
        self._all_pairs = len(np.unique(self._anchor_queries)) * len(documents.texts)
        if by_scores and settings.contrast_positives:
            distinct = len(np.unique(self._document_ids[0]))
            self._all_pairs += len(np.unique(self._positive_queries)) * distinct

    def select(self, size: int, logits: Callable[[int, int], Tensor]) -> None:
        """See :meth:`FilterStep.select`."""
        if self.error is not None:
            return
        try:
            wanted = [] if self._own_arrived else self._first_wanted()
            self._shares = self._choose(self._epsilon, size, logits, wanted)
        except RerankerError as error:
            self._failed(error)
            self._clear()

    def _clear(self) -> None:
        """Begin without scores: those in the margin's units, and with distillation the raw ones."""
        shape = len(self._query_texts), len(self._document_texts)
        self._masked_codes: NDArray[np.int64] | None = None
        self._query_sums: QuerySums | None = None
        self._scores = self._raw = PairScores(*shape)
        if self._settings.convert is not None:
            self._raw = PairScores(*shape)

    def _first_wanted(self) -> list[NDArray[np.int64]]:
        """Read the scores of the anchors' own documents; return the codes of further pairs that every choice needs."""
        documents, job = len(self._document_texts), self._jobs[0]
        own = np.concatenate([self._anchor_queries * documents + ids[self._own] for ids in self._document_ids])
        codes, first = np.unique(own, return_index=True)
        self._own_arrived = True
        self._arrived(codes, job.rows(0, len(own))[first, 0])
        job.release(0, len(own))
        if not self._by_known:
            return []
        # ``contrast_filter="known"`` compares other rows' positives with each row's threshold: these scores give it.
        return [self._all_anchor_queries * documents + self._document_ids[0]]

    def _fetch(self, codes: NDArray[np.int64]) -> None:
        missing = self._scores.missing(codes)
        if not len(missing):
            return
        documents = len(self._document_texts)
        # The job gets only the texts of missing pairs.
        queries, query_ids = _compact(missing // documents, len(self._query_texts))
        named, document_ids = _compact(missing % documents, documents)
        job = self._ask(
            [self._query_texts[query] for query in queries],
            [self._document_texts[document] for document in named],
            query_ids,
            document_ids,
            recurring=False,
        )
        self._jobs.append(job)
        self._arrived(missing, job.rows(0, len(missing))[:, 0])
        job.release(0, len(missing))

    def _arrived(self, codes: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        if not np.isfinite(scores).all():
            wrong = scores[~np.isfinite(scores)]
            raise ScoreError(
                f"{len(wrong)} of {len(scores)} scores are not finite, the first one {wrong[0]}. The filter needs "
                "finite scores: check the model that the reranker serves and its number format."
            )
        if self._settings.convert is not None:
            self._raw.add(codes, scores)
            scores = self._settings.convert(scores)
        self._scores.add(codes, scores)
        self._masked_codes = self._query_sums = None  # of fewer scores

    def _choose(
        self, epsilon: float, size: int, logits: Callable[[int, int], Tensor], wanted: list[NDArray[np.int64]]
    ) -> NDArray[np.float64]:
        """Have candidates scored until those without a score hold at most epsilon of each row's denominator.

        Args:
            epsilon: The largest share.
            size: See ``select``.
            logits: See ``select``.
            wanted: Codes of further pairs that the first round has to score.

        Returns:
            The share of each row, shape ``(rows,)``.
        """
        layout, rows = self._candidates, len(self._chosen)
        masked, kept = self._masked, layout.kept(self._scores, self._thresholds, self._masked)
        splits = []
        for begin in range(0, rows, size):
            bounds = np.array([begin, min(begin + size, rows)]) * layout.columns
            known, dropped = (
                codes[slice(*np.searchsorted(codes, bounds).tolist())] - bounds[0] for codes in (kept, masked)
            )
            splits.append(split(logits(begin, min(begin + size, rows)), known, dropped, epsilon))
        shortlist = Shortlist(splits, layout.columns)
        before = np.zeros(rows, dtype=np.int64)
        for number in count():
            most = None if self._most is None else np.maximum(self._most - self._chosen, 0)
            least = before if number >= _EXACT_ROUNDS else np.zeros_like(before)
            chosen = shortlist.choose(epsilon, least, most)
            if not len(chosen) and not wanted:
                return shortlist.shares
            # In the order of the pairs, in which their scores are found fastest.
            asked = layout.pairs(shortlist.rows[chosen], shortlist.codes[chosen] % layout.columns)
            order = np.argsort(asked)
            chosen = chosen[order]
            lines, columns = shortlist.rows[chosen], shortlist.codes[chosen] % layout.columns
            found = np.bincount(lines, minlength=rows)
            self._chosen += found
            before += found
            self._fetch(np.concatenate([asked[order], layout.back_pairs(lines, columns)[2], *wanted]))
            wanted = []
            shortlist.settle(chosen, *layout.look_up(lines, columns, self._scores, self._thresholds))
        raise AssertionError("the rounds end, because each of them chooses a candidate for the first time")

    @property
    def _candidates(self) -> Layout:
        """Layout of the candidates. Made at first use, because equal anchors are known once the texts are laid out."""
        if self._layout is None:
            settings, anchors = self._settings, self._anchor_queries
            positives, *negatives = self._document_ids
            blocks = [Block(positives, anchors)]
            if settings.contrast_anchors:
                known = Block(positives, None, anchors=True)
                blocks.append(known if self._by_known else Block(self._anchor_documents, anchors, anchors=True))
            if settings.contrast_positives:
                blocks.append(Block(positives, None if self._by_known else self._positive_queries))
            self._layout = Layout(
                [*blocks, *(Block(ids, anchors) for ids in negatives)],
                self._all_anchor_queries if self._by_known else None,
                self._anchor_ids,
                self._equal_anchors,
                self._own,
                (len(self._query_texts), len(self._document_texts)),
            )
        return self._layout

    @property
    def _thresholds(self) -> Thresholds:
        """The rows' thresholds, as far as their positives have scores."""
        documents, settings = len(self._document_texts), self._settings

        def limits(queries: NDArray[np.intp], positives: NDArray[np.intp]) -> NDArray[np.float32]:
            scores = self._scores.pairs(queries * documents + positives)
            return thresholds(scores, settings.margin, settings.margin_strategy)

        every = limits(self._all_anchor_queries, self._document_ids[0]) if self._by_known else None
        return Thresholds(limits(self._anchor_queries, self._own_documents), every)

    @property
    def _masked(self) -> NDArray[np.int64]:
        """Codes of all masked candidates, sorted and distinct; see ``Layout``."""
        if self._masked_codes is None:
            self._masked_codes = self._candidates.masked(self._scores, self._thresholds)
        return self._masked_codes

    def mask(self, begin: int, end: int) -> NDArray[np.bool_]:
        """See :meth:`FilterStep.mask`."""
        columns = self._candidates.columns
        found = np.zeros((end - begin, columns), dtype=np.bool_)
        found.reshape(-1)[self._masked_between(begin, end) - begin * columns] = True
        return found

    def _masked_between(self, begin: int, end: int) -> NDArray[np.int64]:
        """Return the codes of the masked candidates of the local rows from begin to end."""
        bounds = np.array([begin, end]) * self._candidates.columns
        return self._masked[slice(*np.searchsorted(self._masked, bounds).tolist())]

    def targets(self, begin: int, end: int) -> Targets:
        """See :meth:`FilterStep.targets`."""
        own = self._own[begin:end]
        return self._places.targets(own, self._raw.rows(self._anchor_queries[begin:end]))

    def observe(self, begin: int, end: int, logits: Tensor) -> None:
        """See :meth:`FilterStep.observe`."""
        # MatryoshkaLoss computes the loss of the same rows once for each of its dimensions.
        if begin < self._rows_counted:
            return
        self._rows_counted = end
        counts, rows, every = self._counts, end - begin, len(self._anchor_ids)
        blocks = self._masked_between(begin, end) % self._candidates.columns // every
        counts.negatives += rows * (int(self._repeats.sum()) - 1)
        counts.masked_negatives += int(((blocks < 1) | (blocks > self._settings.contrast_blocks)).sum())
        if self.error is not None:
            return
        shares, sums, queries = self._shares[begin:end], self._sums, self._anchor_queries[begin:end]
        own_scores = self._scores.pairs(queries * len(self._document_texts) + self._own_documents[begin:end])
        counts.unscored_share += float(shares.sum())
        counts.capped_anchors += int((shares > self._epsilon * _ROUNDING).sum())
        counts.scored_anchors += rows
        counts.scored_negatives += int(sums.documents[queries].sum()) - rows
        counts.outscored_positives += int((sums.highest[queries] > own_scores).sum())
        counts.positive_scores += float(own_scores.sum(dtype=np.float64))
        counts.negative_scores += float(sums.scores[queries].sum() - own_scores.sum())

    @property
    def _sums(self) -> QuerySums:
        """Sums over the documents of the batch, each as often as it occurs."""
        if self._query_sums is None:
            self._query_sums = self._scores.sums(self._repeats)
        return self._query_sums

    def statistics(self) -> LossStatistics:
        """See :meth:`FilterStep.statistics`."""
        counts = super().statistics()
        counts.pairs = len(self._scores)
        counts.skipped_pairs = max(0, self._all_pairs - counts.pairs)
        return counts


def _compact(ids: NDArray[np.int64], count: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return (the distinct ids in order, the position of each of ``ids`` among them); all ids are below ``count``."""
    used = np.zeros(count, dtype=np.bool_)
    used[ids] = True
    return np.flatnonzero(used), (np.cumsum(used) - 1)[ids]
