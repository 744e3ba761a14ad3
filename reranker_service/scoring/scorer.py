"""Scorer: scores pairs over a text table, as raw numbers or probabilities."""

from __future__ import annotations

import time

import numpy as np
import structlog
from numpy.typing import NDArray

from ..models import ModelSpec, NoRoomError, PairLayout, TextLayout
from ..observing.metrics import Load
from ..scheduling import EngineDeadError, EngineMemoryError, Scheduler
from .cache import EmbeddingCache, ScoreCache
from .costs import Costs
from .disk import DiskCache
from .embedding import EmbeddingScorer
from .encoding import TextEncoder
from .errors import EngineFailedError, OutOfMemoryError, ScoringError, TooShortLimitError
from .pairwise import PairScorer
from .texts import TextTable
from .types import Cost, OptionRanges, Pairs, Scored

log = structlog.get_logger()


class Scorer:
    """Scores pairs with one model on one engine.

    Attributes:
        scheduler: Feeds the engine.
        cache: Known scores or embeddings; ``None`` if none are kept in memory.
        ranges: Options that the model supports.
        costs: Bytes that texts and pairs take up.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: PairLayout | TextLayout,
        scheduler: Scheduler,
        *,
        cache_bytes: int = 0,
        disk: DiskCache | None = None,
    ) -> None:
        """Set up.

        Args:
            spec: The model.
            layout: Makes the model's inputs.
            scheduler: Runs them on the engine.
            cache_bytes: Size of the cache in memory; 0 for no cache, so that equal pairs are scored again.
            disk: Scores or embeddings of earlier runs; closed with the scorer. ``None`` for none.
        """
        self.scheduler = scheduler
        self.cache: ScoreCache | EmbeddingCache | None = None
        self.ranges = OptionRanges(
            min_length=layout.smallest_length(None),
            max_length=spec.max_length,
            default_length=spec.default_length,
            supports_instruction=layout.default_instruction is not None,
            default_instruction=layout.default_instruction,
            has_probability=spec.normalized,
        )
        self._cosines = isinstance(layout, TextLayout)
        self.costs = Costs(4 * (spec.dimensions or spec.hidden_size) if self._cosines else 0)
        self._finished = 0
        self._disk = disk
        self._texts = TextEncoder(layout, scheduler.metrics, scheduler.bulk_share)
        self._raw: PairScorer | EmbeddingScorer
        if isinstance(layout, TextLayout):
            self.cache = embeddings = EmbeddingCache(cache_bytes) if cache_bytes else None
            self._raw = EmbeddingScorer(
                layout, self._texts, scheduler, cache=embeddings, disk=disk, cosines=spec.normalized
            )
        else:
            self.cache = scores = ScoreCache(cache_bytes) if cache_bytes else None
            self._raw = PairScorer(layout, self._texts, scheduler, cache=scores, disk=disk)

    async def score(self, table: TextTable, pairs: Pairs) -> Scored:
        """Score pairs of texts of ``table``.

        Raises:
            OverLongError: A pair is over-long, and the options say to reject such pairs.
            TooShortLimitError: The length limit leaves no room for the texts beside the template.
            EngineFailedError: The engine is dead.
            OutOfMemoryError: The engine's memory does not suffice for one of the pairs.
            ScoringError: The engine failed, or gave a score that is not finite.
        """
        cost = Cost()
        try:
            raw = await self._raw.score(table, pairs, cost)
        except EngineDeadError as error:
            raise EngineFailedError(f"the engine has died: {error}") from error
        except EngineMemoryError as error:
            log.error("scoring failed", reason=str(error))
            raise OutOfMemoryError(str(error)) from error
        except NoRoomError as error:
            raise TooShortLimitError(str(error)) from error
        except ScoringError:
            raise
        except Exception as error:
            # The RPC layer logs it, with the id that it gives to the client.
            raise ScoringError(f"scoring failed: {type(error).__name__}") from error
        if not np.isfinite(raw).all():
            raise ScoringError("the model gave a score that is not finite; check its weights and its number format")
        # The scheduler has counted the sequences of this reply.
        self._finished += max(len(pairs) - cost.sequences, 0)
        return Scored(raw if table.options.raw else self._probability(raw), cost.usage(len(pairs)))

    def load(self) -> Load:
        """Waiting and running work at this moment; may be called from any thread."""
        since = self.scheduler.waiting_since
        return Load(
            waiting=self.scheduler.waiting,
            oldest_seconds=0.0 if since is None else time.monotonic() - since,
            running=self.scheduler.running,
            cache_bytes=0 if self.cache is None else self.cache.size_bytes,
        )

    @property
    def finished(self) -> int:
        """Pairs that were finished since the start: in the engine (of a bi-encoder its texts), or without it."""
        return self._finished + self.scheduler.finished

    def close(self) -> None:
        """End the threads."""
        self._texts.close()
        if self._disk is not None:
            self._disk.close()

    def _probability(self, raw: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._cosines:
            return (1 + raw) * np.float32(0.5)
        # The logistic function, written so that no exponential overflows.
        small = np.exp(-np.abs(raw))
        probability: NDArray[np.float32] = np.where(raw >= 0, 1 / (1 + small), small / (1 + small))
        return probability
