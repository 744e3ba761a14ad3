"""RemoteCrossEncoder: a served reranker in place of a sentence-transformers ``CrossEncoder``.

sentence-transformers uses ``predict``, ``rank`` and a few attributes of a cross-encoder that it does not train. This
class has them with the same arguments, defaults and return types, and gets the scores from a reranker service.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.cross_encoder.model_card import CrossEncoderModelCardData
from torch import Tensor
from tqdm.autonotebook import tqdm  # type: ignore[import-untyped]

from loss_client.client.client import RerankerClient
from loss_client.client.errors import RerankerRequestError, ScoreError
from loss_client.client.kinds import ModelInfo, kind_name
from loss_client.client.options import Priority
from loss_client.client.scores import ScoreType
from loss_client.former_names import accept_former_names

logger = logging.getLogger(__name__)

# Most documents of a unary call. Measured: with one document a unary call takes half the time of a stream, with 128 the
# same time.
_UNARY_DOCUMENTS = 128
_CHUNK_PAIRS = 1024
_CHAT_TEMPLATE = "chat-template"
_WATCHED_CHUNK_PAIRS = 128  # with a progress bar, which advances by chunk


class RemoteCrossEncoder:
    """A reranker service as a ``CrossEncoder`` of one label, for code that calls ``predict`` or ``rank``.

    It takes the place of a local model in ``mine_hard_negatives``, in the cross-encoder evaluators of
    sentence-transformers and in other code. The service may serve any kind of model. It cannot be trained or saved.

    Args:
        address: Address of the service, such as ``"localhost:50051"`` or ``"grpcs://rerank.example:443"``, a list of
            addresses, or a ``RerankerClient``, which the caller has to close.
        activation_fn: Applied to the model's own score (a logit or, from a bi-encoder, a cosine), as in
            ``CrossEncoder``. Default: the function that the served model's own files name, which the service reports
            (the ms-marco models name ``torch.nn.Identity()``), and else the service's probability, which for a
            cross-encoder is the sigmoid, the default of ``CrossEncoder`` as well.
        prompts: Prompts by name, for ``prompt_name``. Default: those of the served model's own files.
        default_prompt_name: Name of the prompt for calls without ``prompt`` and ``prompt_name``.
        instruction: The task in words, for models that take an instruction. Default: the served model's own.
        max_length: Longest input in tokens. Default: the server's.
        priority: ``"interactive"`` or ``"bulk"``, for all calls. Default: calls with one query and at most 128
            documents are interactive and overtake bulk work, such as that of training; other calls are bulk.
        timeout: Seconds that a call may go without a score, reconnecting included. Default: the client's, 60.

    Attributes:
        num_labels: 1.
        device: Device of the returned tensors: the CPU.
        activation_fn: See ``Args``; may be set.
        prompts: See ``Args``; may be changed.
        default_prompt_name: See ``Args``; may be set.
        model_card_data: Takes the results of evaluators.

    Raises:
        ValueError: An address has none of the right forms, or an argument is out of range.

    Example:
        ::

            from sentence_transformers.util import mine_hard_negatives
            from loss_client import RemoteCrossEncoder

            with RemoteCrossEncoder("localhost:50051") as cross_encoder:
                dataset = mine_hard_negatives(
                    dataset, model, cross_encoder=cross_encoder, relative_margin=0.05, num_negatives=3
                )
    """

    num_labels = 1

    @accept_former_names(target="address")
    def __init__(
        self,
        address: str | Sequence[str] | RerankerClient,
        *,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        instruction: str | None = None,
        max_length: int | None = None,
        priority: Priority | None = None,
        timeout: float | None = None,
    ) -> None:
        if priority not in (None, "bulk", "interactive"):
            raise ValueError(f"priority must be None, 'bulk' or 'interactive', not {priority!r}.")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be greater than 0, not {timeout!r}.")
        self.prompts = dict(prompts or {})
        if default_prompt_name is not None and default_prompt_name not in self.prompts:
            raise ValueError(
                f"default_prompt_name is {default_prompt_name!r}; it has to be one of {list(self.prompts)}."
            )
        self.default_prompt_name = default_prompt_name
        self.activation_fn = activation_fn
        self.device = torch.device("cpu")
        self.model_card_data = CrossEncoderModelCardData()
        self._instruction = instruction
        self._max_length = max_length
        self._priority = priority
        self._timeout = timeout
        self._info: ModelInfo | None = None  # asked for when it first matters
        self._owns_client = not isinstance(address, RerankerClient)
        self._client = address if isinstance(address, RerankerClient) else RerankerClient(address)

    def predict(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | Sequence[str | torch.device] | None = None,
        pool: Mapping[str, Any] | None = None,
        chunk_size: int | None = None,
    ) -> Any:
        """Score pairs of a query and a document, as ``CrossEncoder.predict`` does.

        Args:
            inputs: One pair, or a sequence or array of pairs, each a list or tuple of two strings.
            prompt_name: Name of one of ``prompts``. Default: ``default_prompt_name``.
            prompt: The instruction, if the served model takes one. Otherwise it is put before every query, as
                ``CrossEncoder`` does.
            batch_size: Checked, but without effect: the service makes its own batches.
            show_progress_bar: Whether to show the number of scored pairs. Default: if the log level is info or debug.
            activation_fn: Takes all raw scores at once, shape ``(n, 1)``. Default: the object's ``activation_fn``.
            apply_softmax: Has an effect only if ``activation_fn`` returns more than one column.
            convert_to_numpy: Whether to return an array rather than a list of tensors.
            convert_to_tensor: Whether to return one tensor; takes precedence over ``convert_to_numpy``.
            device: Device of the returned tensors. Default: the CPU.
            pool: Without effect; see ``start_multi_process_pool``.
            chunk_size: Without effect.

        Returns:
            The scores of n pairs: an array of shape ``(n,)``, float32, or a tensor of that shape, or a list of n
            tensors without dimensions. For one pair that is not in a list: its score alone.

        Raises:
            TypeError: An input is not a pair of strings.
            ValueError: ``batch_size`` is not positive, there is no prompt of that name, the service puts another prompt
                before each query, or a text cannot be written as UTF-8.
            RerankerError: The service could not be reached in time, refused the request, or sent a wrong answer.
        """
        if batch_size <= 0:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size}.")
        if show_progress_bar is None:
            show_progress_bar = logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
        pairs, is_one_pair = _pairs(inputs)
        prompt = self._resolve_prompt(prompt, prompt_name)
        if activation_fn is None:
            activation_fn = self.activation_fn
        scores = torch.empty(0)
        if pairs:
            score_type: ScoreType = "raw"
            if activation_fn is None and self._served.activation != "identity":
                score_type = "probability"
            scores = torch.from_numpy(self._scores(pairs, prompt, score_type, show_progress_bar))
        scores = scores.to(device if isinstance(device, (str, torch.device)) else self.device)
        if activation_fn is not None and pairs:
            with torch.no_grad():
                scores = activation_fn(scores[:, None]).squeeze(-1)
                if apply_softmax and scores.ndim > 1:
                    scores = torch.softmax(scores, dim=1)

        predictions: Any
        if convert_to_tensor:
            predictions = scores
        elif convert_to_numpy:
            # Without pairs, CrossEncoder returns np.array([]), which is float64.
            predictions = scores.float().cpu().numpy() if pairs else np.array([])
        else:
            predictions = list(scores)
        return predictions[0] if is_one_pair else predictions

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        device: str | torch.device | Sequence[str | torch.device] | None = None,
        pool: Mapping[str, Any] | None = None,
        chunk_size: int | None = None,
    ) -> list[dict[str, int | float | str]]:
        """Rank documents by relevance to a query, best first, as ``CrossEncoder.rank`` does.

        Args:
            query: The query.
            documents: The documents.
            top_k: Most documents to return. Default: all.
            return_documents: Whether to return the texts as well.
            prompt_name: See ``predict``.
            prompt: See ``predict``.
            batch_size: See ``predict``.
            show_progress_bar: See ``predict``.
            activation_fn: See ``predict``.
            device: See ``predict``.
            pool: See ``predict``.
            chunk_size: See ``predict``.

        Returns:
            For each document ``"corpus_id"``, its position, ``"score"`` and, if asked for, ``"text"``.

        Raises:
            TypeError: ``documents`` is a single string, or a text is not a string.
            ValueError: See ``predict``.
            RerankerError: See ``predict``.
        """
        if isinstance(documents, str):
            raise TypeError("documents is a single str; it has to be a sequence of strings")
        _check_text(query, "query")
        for position, document in enumerate(documents):
            _check_text(document, f"documents[{position}]")
        scores = self.predict(
            [(query, document) for document in documents],
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            activation_fn=activation_fn,
            convert_to_tensor=True,
            device=device,
            pool=pool,
            chunk_size=chunk_size,
        ).tolist()
        results: list[dict[str, int | float | str]] = []
        for position in sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:top_k]:
            results.append({"corpus_id": position, "score": scores[position]})
            if return_documents:
                results[-1]["text"] = documents[position]
        return results

    def start_multi_process_pool(self, target_devices: Sequence[str] | None = None) -> dict[str, Any]:
        """Return a pool without processes, because this process has no model to put on several devices."""
        return {"input": None, "output": None, "processes": []}

    def stop_multi_process_pool(self, pool: Mapping[str, Any]) -> None:
        """Return at once, because the pool has no processes."""

    def close(self) -> None:
        """Close the client, unless the caller passed it as ``address``."""
        if self._owns_client:
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _resolve_prompt(self, prompt: str | None, prompt_name: str | None) -> str | None:
        if prompt is not None:
            if prompt_name is not None:
                logger.warning("Both prompt and prompt_name are given; prompt_name is ignored.")
            return prompt
        name = prompt_name if prompt_name is not None else self.default_prompt_name
        if name is None:
            return None
        if name in self.prompts:
            return self.prompts[name]
        if name in self._served.prompts:
            return str(self._served.prompts[name])
        known = [*self.prompts, *sorted(set(self._served.prompts) - set(self.prompts))]
        raise ValueError(f"prompt_name is {name!r}; it has to be one of {known}.")

    @property
    def _served(self) -> ModelInfo:
        """The service's description of its model; asked for once."""
        if self._info is None:
            self._info = self._client.model_info(self._timeout)
        return self._info

    def _before_queries(self, prompt: str) -> str:
        """The text to put before every query, for a model that takes no instruction.

        Raises:
            ValueError: The service puts another prompt there by itself.
        """
        served = str(self._served.prompts.get(self._served.default_prompt_name, ""))
        if kind_name(self._served) != "cross-encoder" or not served:
            return prompt
        if prompt == served:
            return ""
        raise ValueError(
            f"the prompt is {prompt!r}, but the service puts the model's own prompt {served!r} before every query; "
            "start it with --prompts to use another one"
        )

    def _scores(
        self, pairs: list[tuple[str, str]], prompt: str | None, score_type: ScoreType, show_progress_bar: bool
    ) -> NDArray[np.float32]:
        """Score at least one pair; returns scores of shape ``(len(pairs),)``."""
        queries, documents = [query for query, _ in pairs], [document for _, document in pairs]
        instruction = self._instruction
        if prompt is not None:
            if not self._served.supports_instruction:
                before = self._before_queries(prompt)
                queries = [before + query for query in queries]
            elif prompt or self._served.template == _CHAT_TEMPLATE:
                # An empty prompt is no system message; other templates have no place without an instruction.
                instruction = prompt
        options: dict[str, Any] = {
            "instruction": instruction,
            "max_length": self._max_length,
            "score_type": score_type,
            "timeout": self._timeout,
        }
        with tqdm(total=len(pairs), desc="Pairs", unit="pair", disable=not show_progress_bar) as bar:
            if self._priority != "bulk" and len(pairs) <= _UNARY_DOCUMENTS and len(set(queries)) == 1:
                try:
                    scores = self._scores_of_one_query(queries[0], documents, options)
                except RerankerRequestError:
                    pass  # beyond the limits of one request a stream still works; other errors come again
                else:
                    bar.update(len(scores))
                    return scores
            return self._scores_of_a_stream(queries, documents, options, bar, show_progress_bar)

    def _scores_of_one_query(self, query: str, documents: list[str], options: dict[str, Any]) -> NDArray[np.float32]:
        scores = np.full(len(documents), np.nan, dtype=np.float32)
        for each in self._client.rerank(query, documents, **options):
            scores[each.index] = each.score
        missing = int(np.count_nonzero(np.isnan(scores)))
        if missing:
            raise ScoreError(f"the server sent no score for {missing} of {len(documents)} documents")
        return scores

    def _scores_of_a_stream(
        self, queries: list[str], documents: list[str], options: dict[str, Any], bar: Any, watched: bool
    ) -> NDArray[np.float32]:
        every = range(len(queries))
        step = _WATCHED_CHUNK_PAIRS if watched else _CHUNK_PAIRS
        matrix = self._client.stream_pairs(
            queries, documents, every, every, chunk_pairs=step, priority=self._priority or "bulk", **options
        )
        parts: list[NDArray[np.float32]] = []
        try:
            for begin in range(0, len(queries), step):
                parts.append(matrix.rows(begin, min(begin + step, len(queries)))[:, 0])
                bar.update(len(parts[-1]))
        except BaseException:  # an interrupt as well: the matrix has no other reader
            matrix.cancel()
            raise
        return np.concatenate(parts)


def _pairs(inputs: Any) -> tuple[list[tuple[str, str]], bool]:
    """Return the pairs of ``predict``'s inputs, and whether the input was one pair that is not in a list."""
    if isinstance(inputs, np.ndarray):
        inputs = inputs.tolist()
    if isinstance(inputs, (str, bytes, Mapping)):
        raise TypeError(f"inputs is a single {type(inputs).__name__}; it has to be pairs of a query and a document")
    rows = list(inputs)
    is_one_pair = len(rows) > 0 and not isinstance(rows[0], (list, tuple))
    if is_one_pair:
        rows = [rows]
    for position, row in enumerate(rows):
        name = "inputs" if is_one_pair else f"inputs[{position}]"
        if not isinstance(row, (list, tuple)):
            raise TypeError(f"{name} is not a pair of a query and a document but {type(row).__name__}")
        if len(row) != 2:
            raise ValueError(f"{name} has {len(row)} elements; it has to be a pair of a query and a document")
        _check_text(row[0], f"{name}[0]")
        _check_text(row[1], f"{name}[1]")
    return rows, is_one_pair


def _check_text(text: object, name: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{name} is not a string but {type(text).__name__}")
