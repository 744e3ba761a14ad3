"""RerankerDataCollator: hands the dataset's own texts to the loss, and begins to score them one batch ahead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.modules import Router
from torch import nn

from loss_client.filter.prefetch import TICKET, Ticket, register
from loss_client.filter.step import FilterStep
from loss_client.filter.texts import RAW_TEXT
from loss_client.loss import RerankerCachedGISTEmbedLoss


@dataclass
class RerankerDataCollator(SentenceTransformerDataCollator):
    """Collates like sentence-transformers' own collator, and adds each column's raw texts.

    The batch holds the texts, without any prompt, as a list of strings under ``"{column}_raw_text"``. The trainer
    passes them to the loss.

    A collator with a ``loss`` begins to score each batch when it collates it, which is one batch ahead of training: the
    scores have a whole step to arrive. With loader workers, the scoring begins when the batch arrives in the process
    that trains; a copy of the collator, such as that of a worker, has no loss. The scoring of batches that are never
    trained on is cancelled.

    :class:`RerankerTrainer` makes this collator by itself. Another trainer passes prompts, router mapping and lengths
    of its arguments only to the collator that it makes; :meth:`for_training` passes them to this one.

    Args:
        preprocess_fn: The model's ``preprocess``.
        valid_label_columns: Names of columns that hold labels, not texts; the first one that the dataset has is used.
        router_mapping: As in the training arguments.
        prompts: As in the training arguments. The model reads the prompts, the reranker does not.
        max_length: As in the training arguments, if they have one.
        loss: The trainer's loss, or its losses by dataset name: a ``RerankerCachedGISTEmbedLoss``, or a loss around
            one. Default: none, and no batch is scored ahead.
        instructions: Instructions for the reranker by dataset name. The trainer then needs its losses by dataset name
            too. Default, also for datasets without an instruction: the loss's own instruction.
    """

    loss: nn.Module | Mapping[str, nn.Module] | None = None
    instructions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Copies in loader workers keep the name, and their batches find this object by it.
        self._name = register(self)
        self._holds: bool | dict[str, bool] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the loss, which holds the model: a copy in a loader worker begins no scoring of its own."""
        held: bool | dict[str, bool] | None = self._holds
        if isinstance(self.loss, Mapping):
            held = {name: _reranker_loss_in(loss) is not None for name, loss in self.loss.items()}
        elif self.loss is not None:
            held = _reranker_loss_in(self.loss) is not None
        return {**self.__dict__, "loss": None, "_holds": held}

    @classmethod
    def for_training(
        cls,
        model: SentenceTransformer,
        args: SentenceTransformerTrainingArguments | None = None,
        loss: nn.Module | Mapping[str, nn.Module] | None = None,
        instructions: Mapping[str, str] | None = None,
    ) -> RerankerDataCollator:
        """Make the collator for a trainer with this model, these arguments and this loss.

        Args:
            model: The model to train.
            args: The trainer's arguments; ``None`` if the trainer has none.
            loss: See the class.
            instructions: See the class.

        Raises:
            ValueError: The model has a Router, but the arguments have no ``router_mapping``.
        """
        router_mapping = getattr(args, "router_mapping", None)
        if any(isinstance(module, Router) for module in model.children()) and not router_mapping:
            raise ValueError(
                "A model with a Router needs router_mapping in the training arguments, from column names to routes, "
                "such as {'anchor': 'query', 'positive': 'document'}."
            )
        return cls(
            preprocess_fn=model.preprocess,
            router_mapping=router_mapping,
            prompts=getattr(args, "prompts", None),
            max_length=getattr(args, "max_length", None),
            loss=loss,
            instructions=instructions or {},
        )

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows of the dataset.

        Args:
            features: The rows, each a dict by column name.

        Returns:
            The batch of the base class, with the texts of each column. If the collator has a loss for the dataset that
            is or holds no ``RerankerCachedGISTEmbedLoss``, the batch of the base class alone.

        Raises:
            TypeError: A column that is no label holds a value that is not a string.
            ValueError: There are instructions by dataset, but the rows do not name their dataset.
        """
        if features and self._holds_reranker_loss(features[0].get("dataset_name")) is False:
            collated: dict[str, Any] = super().__call__(features)
            return collated
        texts = {name: self._texts(name, features) for name in self._text_columns(features)}
        # Before the texts are tokenized, so that the reranker works at the same time.
        ticket = self._ticket(texts, features)
        batch: dict[str, Any] = super().__call__(features)
        batch.update({f"{name}_{RAW_TEXT}": column for name, column in texts.items()})
        if ticket is not None:
            batch[f"{next(iter(texts))}_{TICKET}"] = ticket
        return batch

    def _ticket(self, texts: Mapping[str, list[str]], features: list[dict[str, Any]]) -> Ticket | None:
        if not texts or (self.loss is None and self._holds is None and not self.instructions):
            return None
        dataset = features[0].get("dataset_name")
        if self.instructions and dataset is None:
            raise ValueError(
                f"There are instructions for {', '.join(map(repr, self.instructions))}, but the batch does not name "
                "its dataset, so no instruction would be used. The trainer names datasets if it gets them as a "
                "DatasetDict and the losses as a dict by the same names; the values may all be one loss. "
                "For a single dataset, give the instruction to the loss."
            )
        return Ticket(self._name, list(texts.values()), dataset, self.instructions.get(dataset or ""))

    def begin(
        self, columns: Sequence[Sequence[str]], dataset: str | None, instruction: str | None
    ) -> FilterStep | None:
        """Begin to score a batch; return ``None`` if its dataset has no ``RerankerCachedGISTEmbedLoss``.

        Args:
            columns: The texts by column.
            dataset: Name of the batch's dataset, if there are several.
            instruction: The instruction for the reranker. Default: the loss's own.
        """
        loss = self._loss_of(dataset)
        inner = None if loss is None else _reranker_loss_in(loss)
        if inner is None or len(columns) < 2:
            return None
        return inner.begin(columns, instruction)

    def _holds_reranker_loss(self, dataset: str | None) -> bool | None:
        """Whether the dataset's loss is or holds a ``RerankerCachedGISTEmbedLoss``; ``None`` if there is no loss."""
        if self.loss is None:
            return self._holds.get(dataset or "") if isinstance(self._holds, dict) else self._holds
        loss = self._loss_of(dataset)
        return None if loss is None else _reranker_loss_in(loss) is not None

    def _loss_of(self, dataset: str | None) -> nn.Module | None:
        return self.loss.get(dataset or "") if isinstance(self.loss, Mapping) else self.loss

    def _text_columns(self, features: list[dict[str, Any]]) -> list[str]:
        names = [name for name in features[0] if name != "dataset_name"] if features else []
        label = next((name for name in self.valid_label_columns if name in names), None)
        return [name for name in names if name != label]

    @staticmethod
    def _texts(name: str, features: list[dict[str, Any]]) -> list[str]:
        texts = []
        for position, row in enumerate(features):
            text = row[name]
            if not isinstance(text, str):
                raise TypeError(
                    f"A reranker reads texts, but column {name!r} holds a {type(text).__name__} in row {position} of "
                    "the batch. Turn the column into strings, or remove it from the dataset."
                )
            texts.append(text)
        return texts


def _reranker_loss_in(loss: nn.Module) -> RerankerCachedGISTEmbedLoss | None:
    return next((part for part in loss.modules() if isinstance(part, RerankerCachedGISTEmbedLoss)), None)
