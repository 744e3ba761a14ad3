"""RerankerTrainer: sentence-transformers' trainer, set up for the losses of this package."""

from __future__ import annotations

from functools import wraps
from typing import Any

from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.data_collator import BaseDataCollator

from loss_client.callbacks import RerankerMetricsCallback, RerankerResumeCallback, find_reranker_losses
from loss_client.collator import RerankerDataCollator


class RerankerTrainer(SentenceTransformerTrainer):
    """
    RerankerTrainer is the :class:`~sentence_transformers.sentence_transformer.trainer.SentenceTransformerTrainer`, with
    all that a :class:`RerankerCachedGISTEmbedLoss` needs:

    - A :class:`RerankerDataCollator` with the trainer's loss. The reranker reads the dataset's own texts, and scores
      each batch while the batch before it trains. Prompts and router mapping of the training arguments are kept.
    - A :class:`RerankerMetricsCallback`, before the callbacks of TensorBoard, W&B and the like.
    - A :class:`RerankerResumeCallback`.
    - Over several ranks, each rank reads its own part of an ``IterableDataset``: accelerate's dispatcher, the default
      for such data, cannot join lists of texts. ``accelerator_config={"dispatch_batches": True}`` is refused.

    The loss may be any that sentence-transformers' trainer takes: a loss, one inside another such as
    :class:`MatryoshkaLoss`, several by dataset name, or functions that make them. For losses without a
    :class:`RerankerCachedGISTEmbedLoss` the trainer does the same as its base class.

    Args:
        *args: Those of :class:`~sentence_transformers.sentence_transformer.trainer.SentenceTransformerTrainer`. A given
            ``data_collator`` is used as it is, and a :class:`RerankerMetricsCallback` among ``callbacks`` takes the
            place of the trainer's own.
        **kwargs: As above.

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
    """

    data_collator_class = RerankerDataCollator
    _own_collator: RerankerDataCollator | None = None

    @wraps(SentenceTransformerTrainer.__init__, assigned=())  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The base class makes the collator before it makes the losses.
        if self._own_collator is not None:
            self._own_collator.loss = self.loss
        if find_reranker_losses(self.loss):
            self._refuse_dispatcher()
            given = self.callback_handler.pop_callback(RerankerMetricsCallback)  # type: ignore[no-untyped-call]
            (given or RerankerMetricsCallback(self.loss)).attach(self)
            self.add_callback(RerankerResumeCallback(self.loss))

    def _refuse_dispatcher(self) -> None:
        """Have each rank make its own batches, with texts.

        Raises:
            ValueError: The training arguments ask for accelerate's dispatcher, and several ranks train.
        """
        if self.accelerator.num_processes == 1 or not isinstance(self.data_collator, RerankerDataCollator):
            return
        config = self.accelerator.dataloader_config
        if config.dispatch_batches:
            raise ValueError(
                "accelerator_config has dispatch_batches=True, but the batches hold texts for the reranker, which "
                "accelerate cannot send from rank 0 to the others. Set accelerator_config={'dispatch_batches': False} "
                "in the training arguments: each rank then reads its own part of the data."
            )
        config.dispatch_batches = False

    def get_data_collator(self, *args: Any, **kwargs: Any) -> BaseDataCollator:
        """Make the data collator, if none is given; for the arguments see the base class."""
        collator = super().get_data_collator(*args, **kwargs)
        if isinstance(collator, RerankerDataCollator):
            self._own_collator = collator
        return collator
