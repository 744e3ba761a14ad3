"""RerankerCachedGISTEmbedLoss: in-batch negatives filtered by a remote reranker, with gradient caching.

One step:

    (1) the texts of the batch go to the reranker, which begins to score every anchor with every document;
    (2) at the same time the model embeds the batch without gradients;
    (3) for each mini-batch of anchors, the loss waits for the anchors' rows of scores, masks their false negatives,
        and back-propagates to the embeddings, whose gradients are cached;
    (4) ``loss.backward()`` embeds again with gradients, and back-propagates the cached gradients to the model.

``CachedLossMixin`` does (2) and (4); the step with the scores travels through it as ``labels``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin, has_static_embedding_input
from torch import Tensor, nn

from loss_client.arguments import (
    CITATION,
    accept_mass,
    check_arguments,
    check_margin,
    describe_reranker,
    in_card,
)
from loss_client.client.client import RerankerClient
from loss_client.client.scores import ScoreType
from loss_client.filter.candidates import Candidates
from loss_client.filter.contrast import Hardness, HardnessMode
from loss_client.filter.distillation import Distillation
from loss_client.filter.distiller import Distiller
from loss_client.filter.jobs import ScoringClient
from loss_client.filter.masking import MarginStrategy
from loss_client.filter.nearest.nearest import PerAnchor
from loss_client.filter.nearest.preselector import GivenPreselector, make_preselector
from loss_client.filter.prefetch import next_step
from loss_client.filter.scale import ModelScale, probabilities
from loss_client.filter.scoring import Scoring, ScoringSettings
from loss_client.filter.statistics import LossStatistics
from loss_client.filter.step import ContrastFilter, FilterSettings, FilterStep, OnError
from loss_client.filter.step_loss import StepLoss
from loss_client.filter.unfiltered import UnfilteredWarning
from loss_client.former_names import accept_former_names, former_attribute


class RerankerCachedGISTEmbedLoss(CachedLossMixin, nn.Module):
    """Contrastive loss over in-batch negatives, without those that a reranker finds relevant to the anchor.

    In-batch and mined negatives are often false: relevant to the anchor, though not labelled so. Like
    :class:`CachedGISTEmbedLoss`, this loss drops a negative if a guide scores it above the anchor's own positive, less
    a margin. Like that loss, it caches gradients, so that memory does not limit the batch size. Here the guide is a
    reranker behind a gRPC service, on another GPU or machine: a cross-encoder or an instructed causal reranker, which
    reads query and document together and judges better than an embedding model can. Scores arrive while the model
    embeds the batch.

    Two strategies decide which negatives are dropped:

        - "absolute": those that score above ``positive_score - margin``.
        - "relative": those that score above ``positive_score - abs(positive_score) * margin``.

    A document with the same text as the positive is always dropped, and so is the positive of another row with the same
    anchor. The anchor's own positive is never dropped.

    The scores say more than which negatives are false. With ``distillation`` the loss also teaches the model the scores
    themselves; see :class:`Distillation`. The other options change the contrastive term only.

    Args:
        model: The SentenceTransformer to train.
        reranker: Address of the reranker, such as ``"localhost:50051"`` or ``"grpcs://rerank.example:443"``,
            a list of addresses, or a ``RerankerClient``, which losses may share.
        temperature: Divisor of the cosine similarities.
        mini_batch_size: Number of texts that are embedded at a time, and number of anchors whose loss is computed at a
            time. Larger mini-batches are faster and need more memory. The result does not depend on it.
        mini_batch_num_tokens: If set, texts are embedded in mini-batches of at most this many tokens instead.
        show_progress_bar: Whether to show progress bars over mini-batches.
        margin_strategy: ``"absolute"`` or ``"relative"``.
        margin: The margin: in units of the score (absolute) or as a share of the positive's score (relative). A larger
            margin drops more negatives.
        chunk_pairs: Most pairs of one message to the reranker. With fewer the first scores arrive sooner; with
            more there is less overhead. The result does not depend on it. Default: the number that the server prefers,
            or 128 for the first and the last rows and up to 4,096 between them.
        instruction: The task in words, for rerankers that take an instruction. Default: the served model's own.
        reranker_max_length: Longest input of the reranker, in its tokens. Default: the server's.
        score_type: ``"probability"``: scores in [0, 1]. ``"raw"``: the reranker's own number, a logit or, from a
            bi-encoder, a cosine. The margin is in units of these scores.
        timeout: Seconds that a batch may go without finished work of the server, reconnecting included, before the step
            fails. Default: the client's, 60.
        contrast_anchors: Whether the other anchors are negatives of an anchor too.
        contrast_positives: Whether the other positives are negatives of the anchor's positive too.
        contrast_filter: The pairs of anchors, and of positives, that are dropped. ``"known"``: pairs of rows i and j if
            the positive of one row is relevant to the anchor of the other; this needs no further scores. ``"scores"``:
            pairs whose own score, with the text of row i as query, is above row i's threshold, as in
            :class:`CachedGISTEmbedLoss`. Pairs of equal texts, and a row's pair with itself, are always dropped.
        gather_across_devices: Whether the documents of all devices are candidates for each device's anchors. Texts and
            embeddings are gathered; each device has its own anchors scored.
        candidates: ``"all"``: every pair is scored. ``"nearest"``: each anchor's own documents, and the pairs whose
            document the ``preselector`` finds nearest to the anchor, compared with the anchor's own positive; with
            ``top_p`` further ones. A candidate without a score stays a negative. ``docs/training.md`` says which to
            take.
        top_p: With ``candidates="nearest"``, such as 0.999: further candidates are scored, in the order of the model's
            own similarities, until those with a score hold this share of each anchor's softmax denominator. The loss is
            then above the full one by at most ``-log(top_p)``. Default: no further candidates.
        max_candidates: The most candidates of an anchor that are scored because of ``top_p``, beside the documents of
            its own row. The bound does not hold for anchors that would need more; they are counted. Default: no limit.
        on_error: ``"raise"``: a step fails if its scores do not arrive. ``"unfiltered"``: the step trains without the
            filter, is counted, and leads to a warning. A server with another contract, or one that refuses the
            client's credentials, always ends training.
        distillation: Adds a term that teaches the model the reranker's scores. The loss then asks for raw scores,
            because probabilities saturate, and computes the probabilities for the margin by itself. It keeps raw scores
            in float32 until the step ends: anchors x distinct documents. Its distributions are over the documents that
            have a score.
        hardness_mode: Adds ``hardness_strength * cosine``, without gradient, to the logits of negatives, so that
            similar negatives count more; as in :class:`CachedMultipleNegativesRankingLoss`.
            ``"in_batch_negatives"``: those of other rows. ``"hard_negatives"``: those of the anchor's own row.
            ``"all_negatives"``: both. Negatives that are dropped stay dropped. The logits of ``contrast_anchors`` and
            ``contrast_positives`` get no penalty.
        hardness_strength: See ``hardness_mode``.
        preselector: With ``candidates="nearest"``, a fast model that judges somewhat like the reranker: the address of
            a served bi-encoder (or a list of addresses, or a ``RerankerClient``), a SentenceTransformer, which embeds
            in a background thread, or a function from a list of texts to their embeddings, shape ``(texts, dim)``. Each
            text is embedded once; the embeddings of the last 131,072 texts are remembered. Not needed with ``top_p``.
        per_anchor: With a ``preselector``, the number of preselected pairs of an anchor: a mean over the batch
            and, with ``gather_across_devices``, for the documents of each device. ``"auto"``: as many as the servers
            can score while a step trains, as measured; pairs that are late are not waited for.
        max_wait: Most seconds that a step waits for scores. Pairs whose scores are late stay negatives and are counted,
            and the rest of the job is cancelled. Default: no limit.

    Raises:
        ValueError: An argument or a batch cannot work. The message says why.

    References:
        - GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning:
          https://huggingface.co/papers/2402.16829
        - Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup:
          https://huggingface.co/papers/2101.06983
        - Distillation beside a contrastive term whose false negatives are masked:
          https://huggingface.co/papers/2505.19274
        - Hardness: https://huggingface.co/papers/2503.04812

    Requirements:
        1. A running reranker service.
        2. A :class:`RerankerTrainer`, or a :class:`RerankerDataCollator` in another trainer, so that the reranker reads
           the dataset's own texts, one batch ahead. Without it the texts are decoded from token ids, which loses a part
           of them, and each step waits for its own scores.
        3. Large batches, for the best results.

    Inputs:
        +-------------------------------------------------+--------+
        | Inputs                                          | Labels |
        +=================================================+========+
        | (anchor, positive) pairs                        | none   |
        +-------------------------------------------------+--------+
        | (anchor, positive, negative) triplets           | none   |
        +-------------------------------------------------+--------+
        | (anchor, positive, negative_1, ..., negative_n) | none   |
        +-------------------------------------------------+--------+

    Recommendations:
        - Use it with hard negatives that were mined without a margin: among these most false negatives are found.
        - Use ``BatchSamplers.NO_DUPLICATES``
          (:class:`docs <sentence_transformers.base.sampler.BatchSamplers>`) to fill batches with distinct texts.

    Relations:
        - With a bi-encoder behind the service, ``score_type="raw"`` and distinct texts it equals
          :class:`CachedGISTEmbedLoss` with that model as guide and both contrast terms off.
        - Without any negative above its threshold it equals :class:`CachedMultipleNegativesRankingLoss`.

    Example:
        ::

            from datasets import Dataset
            from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
            from loss_client import RerankerCachedGISTEmbedLoss, RerankerTrainer

            model = SentenceTransformer("microsoft/mpnet-base")
            train_dataset = Dataset.from_dict({
                "anchor": ["It's nice weather outside today.", "He drove to work."],
                "positive": ["It's so sunny.", "He took the car to the office."],
            })
            args = SentenceTransformerTrainingArguments("output", per_device_train_batch_size=512)
            loss = RerankerCachedGISTEmbedLoss(model, "localhost:50051", mini_batch_size=64, margin=0.05)
            trainer = RerankerTrainer(model=model, args=args, train_dataset=train_dataset, loss=loss)
            trainer.train()

    Attributes:
        statistics: Counts of the filter and sums of the distillation term since the last ``statistics.reset()``.
    """

    max_length = former_attribute("max_length", "reranker_max_length")
    epsilon = former_attribute("epsilon", "top_p", complement=True)

    @accept_former_names(reranker_url="reranker", reranker_batch_size="chunk_pairs", max_length="reranker_max_length")
    @accept_mass
    def __init__(
        self,
        model: SentenceTransformer,
        reranker: str | Sequence[str] | ScoringClient,
        temperature: float = 0.01,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        margin_strategy: MarginStrategy = "absolute",
        margin: float = 0.0,
        chunk_pairs: int | None = None,
        instruction: str | None = None,
        reranker_max_length: int | None = None,
        score_type: ScoreType = "probability",
        timeout: float | None = None,
        contrast_anchors: bool = False,
        contrast_positives: bool = False,
        contrast_filter: ContrastFilter = "known",
        gather_across_devices: bool = False,
        candidates: Candidates = "all",
        top_p: float | None = None,
        max_candidates: int | None = None,
        on_error: OnError = "raise",
        distillation: Distillation | None = None,
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
        preselector: str | Sequence[str] | GivenPreselector | None = None,
        per_anchor: PerAnchor = "auto",
        max_wait: float | None = None,
    ) -> None:
        super().__init__()
        if has_static_embedding_input(model):
            raise ValueError(
                f"{type(self).__name__} does not work with a model based on StaticEmbedding, whose inputs cannot be "
                "split into mini-batches. Use a model with a Transformer."
            )
        self.model = model
        self.temperature = temperature
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar
        self.margin_strategy = margin_strategy
        self.margin = margin
        self.chunk_pairs = chunk_pairs
        self.instruction = instruction
        self.reranker_max_length = reranker_max_length
        self.score_type = score_type
        self.timeout = timeout
        self.contrast_anchors = contrast_anchors
        self.contrast_positives = contrast_positives
        self.contrast_filter = contrast_filter
        self.gather_across_devices = gather_across_devices
        self.candidates = candidates
        self.top_p = top_p
        self.max_candidates = max_candidates
        self.per_anchor = per_anchor
        self.max_wait = max_wait
        self.on_error = on_error
        self.distillation = distillation
        self.hardness_mode = hardness_mode
        self.hardness_strength = hardness_strength
        check_arguments({**vars(self), "preselector": preselector})
        self.statistics = LossStatistics()
        # Connects at first use; a copy or a pickle makes its own connections.
        self._client = reranker if isinstance(reranker, ScoringClient) else RerankerClient(reranker)
        given: Any = preselector
        if isinstance(preselector, (str, list, tuple)):
            given = RerankerClient(preselector)
        self._scoring = Scoring(self._client, None if given is None else make_preselector(given, model))
        self._scale = ModelScale(self._client)
        self._distiller = Distiller()
        self._unfiltered = UnfilteredWarning()
        self._served: dict[str, str] | None = None

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Compute the loss of one batch.

        Args:
            sentence_features: Features by column: anchors, positives, then any number of columns of negatives. The
                features of a column hold its texts under ``"raw_text"``, where ``RerankerDataCollator`` puts them.
            labels: Not used.

        Returns:
            The mean loss over the anchors, a float32 scalar.

        Raises:
            ValueError: Fewer than two columns, columns of different lengths, or columns without text.
            RerankerError: Scores did not arrive, or one of them is not a finite number.
        """
        # Copies, because the texts are removed for the model but have to stay in the caller's batch.
        features = [dict(column) for column in sentence_features]
        step = self._scoring.take(features, self._scoring_settings(), self.model)
        try:
            step.settle(self._settings(), next_step() if self.gather_across_devices else None)
            loss: Tensor = self.forward_cached(features, step)  # type: ignore[arg-type]
        except BaseException:
            step.cancel()
            raise
        self.statistics.add(step.statistics())
        self._scoring.record(step, self.model.training)
        if self.distillation is not None:
            self._distiller.check_underflow(step, type(self).__name__)
        if step.error is not None:
            self._unfiltered.check(step.error, self.statistics)
        return loss

    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:
        """Compute the loss from the embeddings, one mini-batch at a time as the scores arrive.

        Args:
            reps: Embeddings by column and mini-batch, each of shape ``(mini_batch_size, dim)``.
            labels: The step's :class:`FilterStep`.
            with_backward: Whether to back-propagate to ``reps`` and return the loss detached.

        Returns:
            The mean loss over the anchors, a scalar. With ``gather_across_devices`` the mean is scaled so that the
            average over devices is the mean over all anchors, even if devices have different numbers of them.
        """
        step = labels
        if not isinstance(step, FilterStep):
            raise TypeError(f"calculate_loss needs the FilterStep that forward made, not {type(step).__name__}.")
        return self._step_loss().calculate(reps, step, with_backward and self.model.training, with_backward)

    def _step_loss(self) -> StepLoss:
        return StepLoss(
            temperature=self.temperature,
            mini_batch_size=self.mini_batch_size,
            contrast_anchors=self.contrast_anchors,
            contrast_positives=self.contrast_positives,
            hardness=Hardness.of(self.hardness_mode, self.hardness_strength),
            distillation=self.distillation,
            distiller=self._distiller,
            show_progress_bar=self.show_progress_bar,
        )

    def begin(self, columns: Sequence[Sequence[str]], instruction: str | None = None) -> FilterStep:
        """Begin to score a batch for a later ``forward``; the data collator calls this one batch ahead.

        Args:
            columns: The texts by column, anchors first, then positives, then any number of negatives.
            instruction: The task in words. Default: the loss's own.

        Returns:
            The step, which has to be given to ``forward`` in a ticket, or cancelled with ``cancel()``.
        """
        return self._scoring.begin(columns, self._scoring_settings(), instruction)

    def _scoring_settings(self) -> ScoringSettings:
        return ScoringSettings(
            instruction=self.instruction,
            max_length=self.reranker_max_length,
            # Targets need raw scores, from which the loss computes probabilities by itself.
            score_type=self.score_type if self.distillation is None else "raw",
            candidates=self.candidates,
            top_p=self.top_p,
            max_candidates=self.max_candidates,
            per_anchor=self.per_anchor,
            contrast_anchors=self.contrast_anchors,
            contrast_positives=self.contrast_positives,
            contrast_filter=self.contrast_filter,
            gather=self.gather_across_devices,
            chunk_pairs=self.chunk_pairs,
            timeout=self.timeout,
        )

    def _settings(self) -> FilterSettings:
        check_margin(self.margin, self.margin_strategy, self.score_type)  # a schedule may have changed the margin
        return FilterSettings(
            margin_strategy=self.margin_strategy,
            margin=self.margin,
            contrast_anchors=self.contrast_anchors,
            contrast_positives=self.contrast_positives,
            contrast_filter=self.contrast_filter,
            gather=self.gather_across_devices,
            on_error=self.on_error,
            convert=None if self.distillation is None else self._in_units,
            max_wait=self.max_wait,
        )

    def _in_units(self, raw: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return raw scores in the margin's units."""
        if self.score_type == "raw":
            return raw
        return probabilities(raw, self._scale.read(self.timeout))

    def get_config_dict(self) -> dict[str, Any]:
        """Return the loss's settings for the model card, with the name and the fingerprint of the reranker's model.

        The first call asks the reranker for them, for a few seconds at most. If it does not answer, the settings have
        no ``"reranker"``. Addresses are left out, because they are internal and may hold credentials.
        """
        if self._served is None:
            self._served = describe_reranker(self._client) or {}
        return {**({"reranker": self._served} if self._served else {}), **in_card(self)}

    @property
    def distill_temperature(self) -> float | None:
        """The guide's temperature; ``None`` without distillation, and before ``"auto"`` has set it."""
        return None if self.distillation is None else self._distiller.temperature(self.distillation)

    def resume_state(self) -> dict[str, Any]:
        """Return the state of ``temperature="auto"``, a small dict that can be written as JSON; empty without it.

        :class:`RerankerTrainer` saves it in checkpoints. With another trainer, save it yourself and give it to
        :meth:`load_resume_state` before training resumes: otherwise the temperature is set anew. All ranks have the
        same state.
        """
        return self._distiller.state() if self.distillation is not None and self.distillation.calibrates else {}

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Continue with a state that :meth:`resume_state` returned.

        Raises:
            ValueError: The state has another form.
        """
        self._distiller.load(state)

    @property
    def citation(self) -> str:
        """BibTeX entries of the papers that the loss builds on."""
        return CITATION
