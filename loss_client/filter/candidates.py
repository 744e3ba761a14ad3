"""CandidateStep: a batch with scores for a part of its pairs.

A preselector, if there is one, has chosen pairs a batch ahead. With ``top_p``, the candidates that hold this share of
the softmax denominator are scored, once the model's similarities are known.

``nucleus`` tells which candidates these are and bounds the error of the loss. Masking shrinks the denominator, so that
candidates that sufficed before their scores arrived may not suffice afterwards. Each round assumes that none of its
candidates will be masked, and rounds follow until every row's share without a score is at most epsilon, which is
``1 - top_p``. After a few of them, a row has at least as many candidates scored as in all rounds before, so that the
rounds come to an end soon.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, count
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loss_client.client.errors import RerankerError, ScoreError
from loss_client.filter.interning import intern
from loss_client.filter.jobs import AskForPairs
from loss_client.filter.layout import Block, Layout, Thresholds
from loss_client.filter.masking import thresholds
from loss_client.filter.nearest.preselection import Preselected, Preselection
from loss_client.filter.nucleus import Shortlist, split, unscored_fraction
from loss_client.filter.pair_scores import PairScores, QuerySums
from loss_client.filter.statistics import LossStatistics
from loss_client.filter.step import FilterStep
from loss_client.filter.targets import Places, Targets

Candidates = Literal["all", "nearest"]
"""Rule for the pairs of a batch that are scored; see ``RerankerCachedGISTEmbedLoss``."""

Preselect = Callable[[Sequence[Sequence[str]], Sequence[Sequence[str]]], Preselection]
"""Begins to choose pairs, from this rank's columns and those of all ranks; see ``Nearest.begin``."""

# The weight of the many candidates that hold least of the denominator is summed up in float32.
_ROUNDING = 1 + 1e-6
# Rounds in which a row has no more candidates scored than it needs if none of them is masked. A pair saved is worth
# more than a round: of 1,024 docstrings at temperature 0.01, two such rounds and then doubling score 4.5% of the
# pairs, and rounds without doubling 3.3%.
_EXACT_ROUNDS = 5


class CandidateStep(FilterStep):
    """See :class:`FilterStep`. Before the model has embedded the batch, each anchor's own documents are scored, and the
    pairs that a preselector chooses.

    An anchor's own documents are the positive and the negatives of its row. They are the most likely to matter, and
    they come again every epoch.

    Args:
        columns: This rank's texts by column.
        top_p: Least share of a row's denominator that has to have a score, in (0, 1); ``None`` for no limit.
        most: Most candidates of a row to have scored, beside its own documents; ``None`` for no limit. The bound does
            not hold for rows that would need more.
        ask: Begins a scoring job. The constructor calls it for each anchor's own documents.
        preselect: Begins the choice of further pairs. Default: there are none.
    """

    def __init__(
        self,
        columns: Sequence[Sequence[str]],
        top_p: float | None,
        most: int | None,
        ask: AskForPairs,
        preselect: Preselect | None = None,
    ) -> None:
        super().__init__(columns)
        self._epsilon = None if top_p is None else 1 - top_p  # largest share without a score
        self._most = most
        self._ask = ask
        documents = list(chain.from_iterable(columns[1:]))
        every = np.arange(len(documents))
        self._jobs.append(ask(columns[0], documents, every % len(columns[0]), every, recurring=True))
        self._preselect = preselect
        self._preselections: list[Preselection] = []
        self._foreseen: list[list[str]] = []
        self._drawn: list[Preselected] = []
        self._begin_preselection(columns)

    def _begin_preselection(self, merged: Sequence[Sequence[str]]) -> None:
        """Begin to choose pairs of this rank's anchors; ``merged`` has the columns of this rank or of all ranks."""
        if self._preselect is None:
            return
        try:
            begun = self._preselect(self._columns, merged)
        except BaseException:
            self.cancel()
            raise
        self._preselections.append(begun)
        self._jobs.append(begun)

    def _begin_ahead(self, merged: Sequence[Sequence[str]]) -> None:
        self._foreseen = [list(column) for column in merged]
        self._begin_preselection(merged)

    def _has_foreseen(self, merged: Sequence[Sequence[str]]) -> bool:
        """Whether pairs of these texts have been chosen ahead; a choice among other texts is dropped."""
        if not self._foreseen or self._preselect is None:
            return False
        if self._foreseen == [list(column) for column in merged]:
            return True
        begun = self._preselections.pop()
        self._jobs.remove(begun)
        begun.cancel()
        return False

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
        if len(self._anchor_ids) > len(self._columns[0]) and not self._has_foreseen(merged):
            self._begin_preselection(merged)

    def select(self, size: int, logits: Callable[[int, int], Tensor]) -> None:
        """See :meth:`FilterStep.select`."""
        if self.error is not None:
            return
        try:
            wanted = [] if self._own_arrived else self._first_wanted()
            if self._epsilon is None:
                self._fetch(np.concatenate([np.empty(0, dtype=np.int64), *wanted]))
            else:
                self._shares = self._choose(self._epsilon, size, logits, wanted)
            self._count_missed()
        except RerankerError as error:
            self._failed(error)
            self._clear()

    def _clear(self) -> None:
        """Begin without scores: those in the margin's units, and with distillation the raw ones."""
        shape = len(self._query_texts), len(self._document_texts)
        self._masked_codes: NDArray[np.int64] | None = None
        self._kept_codes: NDArray[np.int64] | None = None
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
        self._arrived(codes, self._waiting.rows(job, 0, len(own))[first, 0])
        job.release(0, len(own))
        self._read_preselected()
        if not self._by_known:
            return []
        # ``contrast_filter="known"`` compares other rows' positives with each row's threshold: these scores give it.
        return [self._all_anchor_queries * documents + self._document_ids[0]]

    def _read_preselected(self) -> None:
        """Read the scores of preselected pairs, as far as they have arrived in time."""
        for preselection in self._preselections:
            found = preselection.read(self._waiting)
            if found is None:
                self._counts.late_choices += 1
                continue
            chosen = len(found.choice.leads)
            self._counts.preselected_pairs += chosen
            codes = found.codes(self._query_texts, self._document_texts)[:chosen]
            self._arrived(codes, found.scores[:chosen])
            self._drawn.append(found)

    def _count_missed(self) -> None:
        """Estimate the masks of pairs without a score, from those of the random pairs that have no score otherwise."""
        drawn, self._drawn = self._drawn, []
        for found in drawn:
            chosen = len(found.choice.leads)
            codes, raw = found.codes(self._query_texts, self._document_texts)[chosen:], found.scores[chosen:]
            codes, raw = codes[~np.isnan(raw)], raw[~np.isnan(raw)]
            if not len(codes):
                continue
            scores = raw if self._settings.convert is None else self._settings.convert(raw)
            documents = len(self._document_texts)
            limits = np.full(len(self._query_texts), np.inf, dtype=np.float32)
            np.fmin.at(limits, self._anchor_queries, self._thresholds.lines)
            missed = np.isnan(self._scores.pairs(codes)) & (scores > limits[codes // documents])
            self._counts.probed_pairs += len(codes)
            self._counts.missed_masks += found.choice.pairs * float(missed.mean())

    def _fetch(self, codes: NDArray[np.int64]) -> None:
        missing = self._scores.missing(codes)
        if not len(missing) or self._waiting.left == 0:
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
        self._arrived(missing, self._waiting.rows(job, 0, len(missing))[:, 0])
        job.release(0, len(missing))

    def _arrived(self, codes: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        if self._waiting.late_pairs:
            codes, scores = codes[~np.isnan(scores)], scores[~np.isnan(scores)]
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
        self._masked_codes = self._kept_codes = self._query_sums = None  # of fewer scores

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
        splits = []
        for begin in range(0, rows, size):
            end = min(begin + size, rows)
            known, dropped = (_between(codes, begin, end, layout.columns) for codes in (self._kept, self._masked))
            splits.append(split(logits(begin, end), known, dropped, epsilon))
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

    @property
    def _kept(self) -> NDArray[np.int64]:
        """Codes of all candidates that are known to be kept, sorted and distinct."""
        if self._kept_codes is None:
            self._kept_codes = self._candidates.kept(self._scores, self._thresholds, self._masked)
        return self._kept_codes

    def mask(self, begin: int, end: int) -> NDArray[np.bool_]:
        """See :meth:`FilterStep.mask`."""
        return self._flags(self._masked, begin, end)

    def _flags(self, codes: NDArray[np.int64], begin: int, end: int) -> NDArray[np.bool_]:
        """Return which candidates of rows ``begin`` to ``end`` are listed, shape ``(end - begin, candidates)``."""
        columns = self._candidates.columns
        found = np.zeros((end - begin, columns), dtype=np.bool_)
        found.reshape(-1)[_between(codes, begin, end, columns)] = True
        return found

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
        blocks = _between(self._masked, begin, end, self._candidates.columns) % self._candidates.columns // every
        counts.negatives += rows * (int(self._repeats.sum()) - 1)
        counts.masked_negatives += int(((blocks < 1) | (blocks > self._settings.contrast_blocks)).sum())
        if self.error is not None:
            return
        sums, queries = self._sums, self._anchor_queries[begin:end]
        own_scores = self._scores.pairs(queries * len(self._document_texts) + self._own_documents[begin:end])
        filtered = ~np.isnan(own_scores)  # rows with a threshold
        if self._epsilon is None:
            flags = (self._flags(codes, begin, end) for codes in (self._kept, self._masked))
            kept, masked = (torch.from_numpy(one).to(logits.device) for one in flags)
            shares = unscored_fraction(logits, kept | masked, masked).cpu().numpy()
        else:
            shares = self._shares[begin:end]
            counts.capped_anchors += int((shares > self._epsilon * _ROUNDING).sum())
        scored, positives = int(filtered.sum()), float(own_scores[filtered].sum(dtype=np.float64))
        counts.unscored_fraction += float(shares[filtered].sum())
        counts.scored_anchors += scored
        counts.scored_negatives += int(sums.documents[queries].sum()) - scored
        counts.outscored_positives += int((sums.highest[queries] > own_scores).sum())
        counts.positive_scores += positives
        counts.negative_scores += float(sums.scores[queries].sum()) - positives

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


def _between(codes: NDArray[np.int64], begin: int, end: int, columns: int) -> NDArray[np.int64]:
    """Return the codes of the candidates of rows ``begin`` to ``end``, counted from the first of these rows."""
    first, last = np.searchsorted(codes, [begin * columns, end * columns]).tolist()
    return codes[first:last] - begin * columns
