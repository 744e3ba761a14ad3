"""CandidateStep: a batch with scores for a part of its pairs.

With ``candidates="nearest"`` a preselector has chosen the pairs a batch ahead. With an ``epsilon``, the candidates that
hold nearly all of the softmax's mass are scored, once the model's similarities are known.

``mass`` tells which candidates these are and bounds the error of the loss. Masking shrinks the denominator, so that
candidates that sufficed before their scores arrived may not suffice afterwards. The first round assumes that none of
its candidates will be masked. The second assumes that all of its candidates will be, so that no third is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loss_client.client.errors import RerankerError, ScoreError
from loss_client.filter.interning import intern
from loss_client.filter.jobs import AskForPairs
from loss_client.filter.masking import same_id, thresholds
from loss_client.filter.mass import choose, unscored_share
from loss_client.filter.nearest.preselection import Preselected, Preselection
from loss_client.filter.pair_scores import PairScores
from loss_client.filter.statistics import LossStatistics
from loss_client.filter.step import FilterStep
from loss_client.filter.targets import Places, Targets

Candidates = Literal["all", "nearest", "mass"]
"""Rule for the pairs of a batch that are scored; see ``RerankerCachedGISTEmbedLoss``."""

Preselect = Callable[[Sequence[Sequence[str]], Sequence[Sequence[str]]], Preselection]
"""Begins to choose pairs, from this rank's columns and those of all ranks; see ``Nearest.begin``."""

MASS_EPSILON = 1e-3
"""Largest share of the denominator without a score, with ``candidates="mass"`` and no other number."""

# Logits that are computed twice, to choose candidates and for the loss, may differ by rounding.
_ROUNDING = 1 + 1e-6


class CandidateStep(FilterStep):
    """See :class:`FilterStep`. Before the model has embedded the batch, each anchor's own documents are scored, and the
    pairs that a preselector chooses.

    An anchor's own documents are the positive and the negatives of its row. They are the most likely to matter, and
    they come again every epoch.

    Args:
        columns: This rank's texts by column.
        epsilon: Largest share of a row's denominator that may stay without a score; ``None`` for no limit.
        most: Most candidates of a row to have scored, beside its own documents; ``None`` for no limit. The bound does
            not hold for rows that would need more.
        ask: Begins a scoring job. The constructor calls it for each anchor's own documents.
        preselect: Begins the choice of further pairs. Default: there are none.
    """

    def __init__(
        self,
        columns: Sequence[Sequence[str]],
        epsilon: float | None,
        most: int | None,
        ask: AskForPairs,
        preselect: Preselect | None = None,
    ) -> None:
        super().__init__(columns)
        self._epsilon = epsilon
        self._most = most
        self._ask = ask
        documents = list(chain.from_iterable(columns[1:]))
        every = np.arange(len(documents))
        self._jobs.append(ask(columns[0], documents, every % len(columns[0]), every, recurring=True))
        self._preselect = preselect
        self._preselections: list[Preselection] = []
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
        self._all_pairs = len(np.unique(self._anchor_queries)) * len(documents.texts)
        if by_scores and settings.contrast_positives:
            distinct = len(np.unique(self._document_ids[0]))
            self._all_pairs += len(np.unique(self._positive_queries)) * distinct
        if len(self._anchor_ids) > len(self._columns[0]):
            self._begin_preselection(merged)

    def select(self, size: int, logits: Callable[[int, int], Tensor]) -> None:
        """See :meth:`FilterStep.select`."""
        if self.error is not None:
            return
        scored = self._chosen
        try:
            if self._epsilon is None and not self._own_arrived:
                self._fetch(np.unique(np.concatenate([np.empty(0, dtype=np.int64), *self._first_wanted()])))
            epsilon = self._epsilon or 1.0
            for assume_masked in (False, True) if self._epsilon is not None else ():
                wanted = [] if self._own_arrived else self._first_wanted()
                for begin in range(0, len(scored), size):
                    end = min(begin + size, len(scored))
                    similar = logits(begin, end)
                    decided, masked = (torch.from_numpy(flags).to(similar.device) for flags in self._state(begin, end))
                    most = None if self._most is None else np.maximum(self._most - scored[begin:end], 0)
                    chosen = choose(similar, decided, masked, epsilon, assume_masked=assume_masked, most=most)
                    found = chosen.cpu().numpy()
                    scored[begin:end] += found.sum(axis=1)
                    wanted.append(self._codes(begin, end, found))
                self._fetch(np.unique(np.concatenate(wanted)))
            self._count_missed()
        except RerankerError as error:
            self._failed(error)
            self._clear()

    def _clear(self) -> None:
        """Begin without scores: those in the margin's units, and with distillation the raw ones."""
        shape = len(self._query_texts), len(self._document_texts)
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
            own = self._limits(self._anchor_queries * documents + self._own_documents)
            np.fmin.at(limits, self._anchor_queries, own)
            missed = np.isnan(self._scores.pairs(codes)) & (scores > limits[codes // documents])
            self._counts.probed_pairs += len(codes)
            self._counts.missed_masks += found.choice.pairs * float(missed.mean())

    def _fetch(self, codes: NDArray[np.int64]) -> None:
        missing = self._scores.missing(codes)
        if not len(missing) or self._waiting.left == 0:
            return
        documents = len(self._document_texts)
        # The job gets only the texts of missing pairs.
        queries, query_ids = np.unique(missing // documents, return_inverse=True)
        named, document_ids = np.unique(missing % documents, return_inverse=True)
        job = self._ask(
            [self._query_texts[query] for query in queries],
            [self._document_texts[document] for document in named],
            query_ids.reshape(-1),
            document_ids.reshape(-1),
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

    def _limits(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        scores = self._scores.pairs(codes)
        return thresholds(scores, self._settings.margin, self._settings.margin_strategy)

    def _state(self, begin: int, end: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return (decided, masked) for the candidates of some rows, each of shape ``(end - begin, candidates)``."""
        settings, documents, lines = self._settings, len(self._document_texts), np.arange(end - begin)
        own, own_documents = self._own[begin:end], self._own_documents[begin:end]
        queries = self._anchor_queries[begin:end]
        limits = self._limits(queries * documents + own_documents)[:, None]
        scores = self._scores.rows(queries)  # (end - begin, distinct documents)
        known, relevant = ~np.isnan(scores), scores > limits  # a comparison with NaN is false
        known[lines, own_documents] = relevant[lines, own_documents] = True
        if self._waiting.late_pairs:  # without the positive's score there is no threshold
            known &= ~np.isnan(limits)
        for flags in (known, relevant):
            self._equal_anchors.mark(flags, own)

        decided = [known[:, ids] for ids in self._document_ids]
        masked = [relevant[:, ids] for ids in self._document_ids]
        masked[0][lines, own] = False
        between: list[tuple[NDArray[np.bool_], NDArray[np.bool_]]] = []
        if self._by_known:
            same = same_id(self._anchor_ids[own], self._anchor_ids)
            found = self._known_between(begin, end, known, relevant)
            repeats = settings.contrast_anchors + settings.contrast_positives
            between = [(found[0] | same, found[1] | same)] * repeats
        else:
            if settings.contrast_anchors:
                same = same_id(self._anchor_ids[own], self._anchor_ids)
                ids = self._anchor_documents
                between.append((known[:, ids] | same, relevant[:, ids] | same))
            if settings.contrast_positives:
                ids = self._document_ids[0]
                others = self._scores.rows(self._positive_queries[begin:end])[:, ids]
                same = same_id(ids[own], ids)
                between.append((~np.isnan(others) | same, (others > limits) | same))
        return (
            np.concatenate([decided[0], *(one for one, _ in between), *decided[1:]], axis=1),
            np.concatenate([masked[0], *(one for _, one in between), *masked[1:]], axis=1),
        )

    def _known_between(
        self, begin: int, end: int, known: NDArray[np.bool_], relevant: NDArray[np.bool_]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return (relation is known, rows are related), each of shape ``(end - begin, rows of all ranks)``."""
        documents, positives = len(self._document_texts), self._document_ids[0]
        own_documents = self._own_documents[begin:end]
        # Scores of these rows' positives with the other rows' anchors, compared with the other rows' thresholds.
        back = self._scores.columns(own_documents)[self._all_anchor_queries].T  # (end - begin, rows of all ranks)
        limits = self._limits(self._all_anchor_queries * documents + positives)
        same = same_id(own_documents, positives) | self._equal_anchors.holders(own_documents)
        back_known = (~np.isnan(back) & ~np.isnan(limits)) | same
        related = relevant[:, positives] | (back > limits) | same
        return related | (known[:, positives] & back_known), related

    def _codes(self, begin: int, end: int, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the codes of the pairs whose scores decide the chosen candidates, distinct, shape ``(pairs,)``."""
        settings, documents = self._settings, len(self._document_texts)
        queries, positives = self._anchor_queries[begin:end], self._document_ids[0]
        blocks = [(queries, positives)]
        if settings.contrast_anchors:
            blocks.append((queries, positives if self._by_known else self._anchor_documents))
        if settings.contrast_positives:
            blocks.append((queries if self._by_known else self._positive_queries[begin:end], positives))
        blocks += [(queries, ids) for ids in self._document_ids[1:]]
        codes, column = [], 0
        contrast = settings.contrast_anchors + settings.contrast_positives
        for number, (asking, ids) in enumerate(blocks):
            lines, places = np.nonzero(chosen[:, column : column + len(ids)])
            column += len(ids)
            codes.append(asking[lines] * documents + ids[places])
            if self._by_known and 0 < number <= contrast:
                codes.append(self._all_anchor_queries[places] * documents + self._own_documents[begin:end][lines])
        return np.unique(np.concatenate(codes))

    def mask(self, begin: int, end: int) -> NDArray[np.bool_]:
        """See :meth:`FilterStep.mask`."""
        return self._state(begin, end)[1]

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
        decided, masked = self._state(begin, end)
        counts, rows = self._counts, end - begin
        scores = self._scores.rows(self._anchor_queries[begin:end])
        own_scores = scores[np.arange(rows), self._own_documents[begin:end]]
        filtered = ~np.isnan(own_scores)  # rows with a threshold
        if self.error is None:
            shares = unscored_share(
                logits, torch.from_numpy(decided).to(logits.device), torch.from_numpy(masked).to(logits.device)
            )
            counts.unscored_share += float(shares[torch.from_numpy(filtered).to(shares.device)].sum())
            if self._epsilon is not None:
                counts.capped_anchors += int((shares > self._epsilon * _ROUNDING).sum())
        contrast = len(self._anchor_ids) * self._settings.contrast_blocks
        every, others = len(self._anchor_ids), masked[:, len(self._anchor_ids) + contrast :]
        counts.negatives += rows * (int(self._repeats.sum()) - 1)
        counts.masked_negatives += int(masked[:, :every].sum() + others.sum())
        if self.error is None:
            known, scored = ~np.isnan(scores), int(filtered.sum())
            counts.scored_anchors += scored
            counts.scored_negatives += int((known @ self._repeats).sum()) - scored
            above_own = (scores > own_scores[:, None]) & (self._repeats > 0)  # 0 repeats: an anchor
            counts.outscored_positives += int(above_own.any(axis=1).sum())
            positives = float(own_scores[filtered].sum(dtype=np.float64))
            counts.positive_scores += positives
            counts.negative_scores += float((np.nan_to_num(scores) @ self._repeats).sum()) - positives

    def statistics(self) -> LossStatistics:
        """See :meth:`FilterStep.statistics`."""
        counts = super().statistics()
        counts.pairs = len(self._scores)
        counts.skipped_pairs = max(0, self._all_pairs - counts.pairs)
        return counts
