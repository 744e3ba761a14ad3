"""Pairs over a text table become scores: the model's raw numbers, checked, and expressed as the client asked."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import structlog
from numpy.typing import NDArray

from reranker.v1 import reranker_pb2 as pb

from ..engines.base import Engine, EngineDeadError
from ..models.encoding import Encoder, NoRoomError
from ..models.spec import ModelSpec
from ..observing.metrics import Load, Metrics
from ..rpc.errors import EngineFailedError, RerankError, ScoringError, invalid
from ..rpc.validation import ModelFacts
from ..scheduling.scheduler import Scheduler
from .cache import EmbeddingCache, ScoreCache
from .cost import Cost
from .disk import DiskCache
from .embedding import EmbeddingScorer
from .pairwise import PairScorer
from .texts import TextEncoder, TextTable
from .types import Pairs

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of some pairs and what they cost.

    Attributes:
        scores: float32, finite, shape ``(len(pairs),)``; a grid's are row-major.
        usage: The counts and times of the contract's ``Usage``.
    """

    scores: NDArray[np.float32]
    usage: pb.Usage


class Scorer:
    """Scores pairs with one model on one engine.

    Attributes:
        scheduler: Feeds the engine.
        cache: What is known already; ``None`` if nothing is kept.
    """

    def __init__(
        self,
        spec: ModelSpec,
        encoder: Encoder,
        engine: Engine,
        *,
        cache_bytes: int = 0,
        disk: DiskCache | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """Set up.

        Args:
            spec: The model.
            encoder: Makes its inputs.
            engine: Runs it; started.
            cache_bytes: What the cache in memory may take up; 0 keeps nothing and scores equal pairs anew.
            disk: What is known from earlier; closed with this.
            metrics: Is told of the work.
        """
        self._spec = spec
        self._encoder = encoder
        self._disk = disk
        metrics = metrics or Metrics()
        self._texts = TextEncoder(encoder, metrics)
        self.scheduler = Scheduler(engine, metrics)
        self.cache: ScoreCache | EmbeddingCache | None = None
        self._raw: PairScorer | EmbeddingScorer
        if spec.kind == "bi-encoder":
            self.cache = embeddings = EmbeddingCache(cache_bytes) if cache_bytes else None
            self._raw = EmbeddingScorer(encoder, self._texts, self.scheduler, cache=embeddings, disk=disk)
        else:
            self.cache = scores = ScoreCache(cache_bytes) if cache_bytes else None
            self._raw = PairScorer(encoder, self._texts, self.scheduler, cache=scores, disk=disk)

    @property
    def facts(self) -> ModelFacts:
        """What requests may ask of the model."""
        return ModelFacts(
            min_length=self._encoder.min_length,
            max_length=self._spec.max_length,
            default_length=self._spec.default_length,
            supports_instruction=self._encoder.supports_instruction,
            default_instruction=self._encoder.default_instruction,
        )

    async def score(self, table: TextTable, pairs: Pairs) -> Scored:
        """Score pairs of texts of ``table``.

        Raises:
            InvalidRequestError: A pair is over-long and the options say to reject such pairs, or the instruction
                leaves no room for the texts.
            EngineFailedError: The engine is gone.
            ScoringError: The engine gave something that is no score.
        """
        cost = Cost()
        try:
            raw = await self._raw.score(table, pairs, cost)
        except EngineDeadError as error:
            raise EngineFailedError(f"the engine has died: {error}") from error
        except NoRoomError as error:
            raise invalid("options.max_length", str(error)) from error
        except RerankError:
            raise
        except Exception as error:
            log.error("scoring failed", exc_info=error)
            raise ScoringError(f"scoring failed: {type(error).__name__}: {error}") from error
        if not np.isfinite(raw).all():
            raise ScoringError("the model gave a score that is not finite; check its weights and its number format")
        return Scored(raw if table.options.raw else self._probability(raw), cost.usage(len(pairs)))

    def load(self) -> Load:
        """What waits and what is kept at this moment; may be called from any thread."""
        since = self.scheduler.waiting_since
        return Load(
            waiting=self.scheduler.waiting,
            oldest_seconds=0.0 if since is None else time.monotonic() - since,
            running=self.scheduler.running,
            cache_bytes=0 if self.cache is None else self.cache.size_bytes,
        )

    def close(self) -> None:
        """End what works beside the event loop."""
        self._texts.close()
        if self._disk is not None:
            self._disk.close()

    def _probability(self, raw: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._spec.kind == "bi-encoder":
            return (1 + raw) * np.float32(0.5)
        # The logistic function, written so that no exponential overflows.
        small = np.exp(-np.abs(raw))
        probability: NDArray[np.float32] = np.where(raw >= 0, 1 / (1 + small), small / (1 + small))
        return probability
