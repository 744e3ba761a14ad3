"""The data collator that hands the dataset's own texts to the loss, and has them scored a batch ahead."""

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

    The texts, before any prompt, are in the batch as a list of strings under ``"{column}_raw_text"``, from where the
    trainer passes them to the loss. They travel from loader workers as they are.

    A collator that is given the loss begins to have each batch scored while it is made, which is one batch ahead of
    training: the scores have a whole step to arrive. With loader workers that begins where the batch arrives in the
    process that trains. Batches that are never trained on have their scoring cancelled.

    A trainer fills in prompts, router mapping and lengths for its own collator only, so that one made by hand must be
    given those of the training arguments. :meth:`for_training` does that.

    Args:
        preprocess_fn: The model's ``preprocess``.
        valid_label_columns: Names of columns that hold labels, not texts; the first that the dataset has is used.
        router_mapping: As in the training arguments.
        prompts: As in the training arguments. They go before what the model reads, not what the reranker reads.
        max_length: As in the training arguments, where they have one.
        loss: The loss that the batches are for, or several by dataset name, as the trainer has them: a
            ``RerankerCachedGISTEmbedLoss``, or a loss around one. Default: nothing is scored ahead.
        instructions: What the reranker is told, by dataset name, where datasets differ in that; the trainer has to
            get losses by dataset name, too. Default, and for datasets that are not named: the loss's own instruction.
    """

    loss: nn.Module | Mapping[str, nn.Module] | None = None
    instructions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Copies, in a loader's workers, keep the name, by which their batches find this one.
        self._name = register(self)

    @classmethod
    def for_training(
        cls,
        model: SentenceTransformer,
        args: SentenceTransformerTrainingArguments | None = None,
        loss: nn.Module | Mapping[str, nn.Module] | None = None,
        instructions: Mapping[str, str] | None = None,
    ) -> RerankerDataCollator:
        """Make the collator that a trainer with this model, these arguments and this loss needs.

        Args:
            model: The model to train.
            args: The trainer's arguments; ``None`` if the trainer gets none.
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
            The batch: what the base class makes of it, and the texts of each column.

        Raises:
            TypeError: A column that is not a label holds something else than strings.
            ValueError: There are instructions by dataset, but the rows do not say which dataset they are from.
        """
        texts = {name: self._texts(name, features) for name in self._text_columns(features)}
        # Before the texts are tokenized: the reranker works meanwhile.
        ticket = self._ticket(texts, features)
        batch: dict[str, Any] = super().__call__(features)
        batch.update({f"{name}_{RAW_TEXT}": column for name, column in texts.items()})
        if ticket is not None:
            batch[f"{next(iter(texts))}_{TICKET}"] = ticket
        return batch

    def _ticket(self, texts: Mapping[str, list[str]], features: list[dict[str, Any]]) -> Ticket | None:
        if not texts or (self.loss is None and not self.instructions):
            return None
        dataset = features[0].get("dataset_name")
        if self.instructions and dataset is None:
            raise ValueError(
                f"There are instructions for {', '.join(map(repr, self.instructions))}, but the batch does not say "
                "which dataset it is from, so none of them would be used. The trainer names datasets where it gets "
                "them as a DatasetDict and the losses as a dict by the same names, which may hold one loss for all. "
                "For a single dataset give the loss itself the instruction."
            )
        return Ticket(self._name, list(texts.values()), dataset, self.instructions.get(dataset or ""))

    def begin(
        self, columns: Sequence[Sequence[str]], dataset: str | None, instruction: str | None
    ) -> FilterStep | None:
        """Begin to have a batch scored; ``None`` if there is no loss for it that would need it.

        Args:
            columns: The texts by column.
            dataset: Name of the dataset that the batch is from, where there are several.
            instruction: What the reranker is told. Default: the loss's own.
        """
        loss = self.loss.get(dataset or "") if isinstance(self.loss, Mapping) else self.loss
        parts = loss.modules() if loss is not None else ()
        inner = next((part for part in parts if isinstance(part, RerankerCachedGISTEmbedLoss)), None)
        if inner is None or len(columns) < 2:
            return None
        return inner.begin(columns, instruction)

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
