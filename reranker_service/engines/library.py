"""Library model: sentence-transformers loads and runs the whole model, from token ids to scores or embeddings."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import structlog
import torch
from torch.nn import functional

from ..models import ModelSpec, TokenSequence, UnsupportedModelError
from .formats import in_one_format
from .head import head_in_float32, widen_output

# Largest difference, relative to the largest number, between a padded input and the same without padding.
_TOLERANCE, _TOLERANCE_16_BITS = 1e-4, 0.05
_LOADING_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, ImportError)

log = structlog.get_logger()


def check_weights(spec: ModelSpec, report: dict[str, Any], headless: bool) -> None:
    """Raise ``UnsupportedModelError`` if weights are missing or of another shape than the configuration says.

    Args:
        spec: The model.
        report: What transformers tells about its loading.
        headless: Whether the model's pooler is not used.
    """
    added = _modules_of_adapter(spec)
    missing = sorted(
        key
        for key in report["missing_keys"]
        if not (headless and "pooler." in key) and not any(name in key.split(".") for name in added)
    )
    if missing or report["mismatched_keys"]:
        wrong = missing or sorted(str(key) for key in report["mismatched_keys"])
        raise UnsupportedModelError(
            f"{spec.name}: its weights do not fit its configuration: {', '.join(wrong[:5])} "
            f"{'missing' if missing else 'of another shape'}"
        )


def merge_adapter(spec: ModelSpec, model: Any) -> Any:
    """Merge the adapter of ``spec`` into a model of transformers, if it has one; gives the model.

    Raises:
        UnsupportedModelError: peft is not installed, or the adapter does not fit the model.
    """
    if spec.adapter is None:
        return model
    try:
        return _peft(spec).PeftModel.from_pretrained(model, str(spec.adapter)).merge_and_unload()
    except UnsupportedModelError:
        raise
    except _LOADING_ERRORS as error:
        raise UnsupportedModelError(f"--adapter {spec.adapter.name} does not fit {spec.name}: {error}") from error


def _peft(spec: ModelSpec) -> Any:
    try:
        import peft
    except ImportError as error:
        assert spec.adapter is not None
        raise UnsupportedModelError(
            f"--adapter {spec.adapter.name}: adapters are merged by peft, which is not installed; pip install peft"
        ) from error
    return peft


def _modules_of_adapter(spec: ModelSpec) -> Sequence[str]:
    """Modules whose weights an adapter brings along as a whole, such as a new head."""
    if spec.adapter is None:
        return ()
    return list(getattr(_peft(spec).PeftConfig.from_pretrained(str(spec.adapter)), "modules_to_save", None) or ())


class LibraryModel:
    """Runs a model of sentence-transformers on batches of token ids."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        """Load the model.

        Raises:
            UnsupportedModelError: The library cannot load it, its weights do not fit, or it gives more than one number.
        """
        try:
            self._model = _load(spec, dtype)
        except pickle.UnpicklingError as error:
            raise UnsupportedModelError(
                f"{spec.name}: its weights in pytorch_model.bin hold Python objects other than tensors, which could "
                "run code; save the model as safetensors"
            ) from error
        except UnsupportedModelError:
            raise
        except _LOADING_ERRORS as error:
            raise UnsupportedModelError(
                f"{spec.name}: sentence-transformers cannot load it: {type(error).__name__}: {error}"
            ) from error
        self._model.to(device).eval().requires_grad_(False)
        head_in_float32(self._model[0].model)
        widen_output(self._model[0])
        for behind in list(self._model)[1:]:
            behind.float()
        self._spec = spec
        self._device = device
        module: Any = self._model[0]
        self._tokenizer = module.tokenizer
        has_messages = "message" in module.modality_config
        self._constants: dict[str, Any] = {"modality": "message" if has_messages else "text"}
        if module.transformer_task in ("text-generation", "any-to-any"):
            self._constants["logits_to_keep"] = 1
        # Models that find the last token by the padding's id refuse batches without one. Classifiers of encoder and
        # decoder refuse batches whose texts have different numbers of end tokens in them.
        pads = getattr(module.config.get_text_config(), "pad_token_id", None) is not None
        pads = pads and not getattr(module.config, "is_encoder_decoder", False)
        self._pads = self._tokenizer.pad_token_id is not None and pads
        # The input in place of one without tokens; None if it is padded like any other, as by the library.
        self._empty = None if self._pads else _one_token(self._tokenizer)
        self._pads_rightly = True
        self._dtype = dtype
        try:
            self._try(module)
        except _LOADING_ERRORS as error:
            if isinstance(error, UnsupportedModelError):
                raise
            raise UnsupportedModelError(
                f"{spec.name}: sentence-transformers cannot run it: {type(error).__name__}: {error}"
            ) from error

    def _try(self, module: Any) -> None:
        """Run the model, so that one that gives no number a pair is refused at start, and see what padding does.

        Decoders with absolute positions give other numbers if their tokenizer pads at the left.
        """
        made = module.preprocess(["a"] if self._spec.kind == "bi-encoder" else [("a", "b")])
        short = made["input_ids"][0].numpy().astype(np.int32)
        inputs = [TokenSequence(ids, len(ids)) for ids in (short, np.concatenate((short[:1], short)))]
        with torch.inference_mode():
            alone = torch.cat([self([one]) for one in inputs]).float()
            if self._pads:
                together = self(inputs).float()
                tolerance = _TOLERANCE if self._dtype == torch.float32 else _TOLERANCE_16_BITS
                scale = alone.abs().max().clamp(min=1)
                self._pads_rightly = bool((alone - together).abs().max() <= tolerance * scale)
                nothing = TokenSequence(np.empty(0, dtype=np.int32), 0)
                try:
                    computes_nothing = bool(self([inputs[1], nothing])[1].isfinite().all())
                except _LOADING_ERRORS:
                    computes_nothing = False
                if not computes_nothing:
                    self._empty = _one_token(self._tokenizer)
        if not self._pads_rightly:
            log.info("padding changes this model's numbers: a batch has inputs of one length", model=self._spec.name)

    @property
    def transformer(self) -> torch.nn.Module:
        """The model of transformers in it."""
        return cast(torch.nn.Module, self._model[0].model)

    def __call__(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        """Scores, shape ``(n,)``, or embeddings, shape ``(n, dim)``, on the device."""
        if not self._pads and len(sequences) > 1:
            return torch.cat([self([sequence]) for sequence in sequences])
        if self._empty is not None:
            sequences = [sequence if len(sequence.ids) else self._empty for sequence in sequences]
        lengths = np.array([len(sequence.ids) for sequence in sequences])
        if not self._pads_rightly and len(set(lengths.tolist())) > 1:
            order = np.argsort(lengths, kind="stable")
            groups = np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1)
            values = torch.cat([self([sequences[one] for one in group]) for group in groups])
            return values[torch.from_numpy(np.argsort(order)).to(values.device)]
        rows: dict[str, Any] = {"input_ids": [sequence.ids.tolist() for sequence in sequences]}
        if "token_type_ids" in self._tokenizer.model_input_names:
            rows["token_type_ids"] = [
                (np.arange(len(sequence.ids)) >= sequence.first_segment).astype(int).tolist() for sequence in sequences
            ]
        if self._pads:
            # A pair of empty texts has no tokens if the tokenizer adds none.
            longest = max(1, int(lengths.max()))
            features = dict(self._tokenizer.pad(rows, padding="max_length", max_length=longest, return_tensors="pt"))
        else:
            features = {name: torch.tensor(values) for name, values in rows.items()}
            features["attention_mask"] = torch.ones_like(features["input_ids"])
        features = {name: tensor.to(self._device) for name, tensor in features.items()}
        outputs = self._model({**features, **self._constants})
        wanted = "sentence_embedding" if self._spec.kind == "bi-encoder" else "scores"
        if wanted not in outputs:
            raise UnsupportedModelError(f"{self._spec.name}: its modules give no {wanted}")
        if self._spec.kind == "bi-encoder":
            used = outputs["sentence_embedding"].float()[:, : self._spec.dimensions]
            return functional.normalize(used, dim=1) if self._spec.normalized else used
        scores = outputs["scores"]
        if scores.ndim != 2 or scores.shape[1] != 1:
            raise UnsupportedModelError(
                f"{self._spec.name} gives {scores.shape[1:]} numbers a pair; a reranker gives one"
            )
        return cast(torch.Tensor, scores[:, 0])


def _one_token(tokenizer: Any) -> TokenSequence:
    """The input of a pair or a text without tokens: one token that is no padding."""
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0, 1)
    token = next(one for one in named if one is not None and one != tokenizer.pad_token_id)
    return TokenSequence(np.array([token], dtype=np.int32), 1)


def _load(spec: ModelSpec, dtype: torch.dtype) -> Any:
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.base.modules.transformer import TRANSFORMER_TASK_TO_AUTO_MODEL

    class Checked(Transformer):
        """The module of the library, whose weights are checked and merged with the adapter."""

        def _load_model(
            self,
            model_name_or_path: str,
            transformer_task: Any,
            config: Any,
            backend: str,
            is_peft_model: bool,
            **model_kwargs: Any,
        ) -> Any:
            options = {**model_kwargs, "dtype": dtype}
            encodes = transformer_task == "feature-extraction"
            options |= {"output_loading_info": True, "weights_only": True}
            # Of an encoder-decoder such as T5 the library loads the encoder alone.
            loaded: Any = self._load_encoder_only_model(model_name_or_path, config, **options) if encodes else None
            if loaded is None:
                auto: Any = TRANSFORMER_TASK_TO_AUTO_MODEL[transformer_task]
                loaded = auto.from_pretrained(model_name_or_path, config=config, **options)
            model, report = loaded
            check_weights(spec, report, headless=encodes)
            in_one_format(model, dtype)
            return merge_adapter(spec, model)

    def with_checks(base: type) -> type:
        class Served(base):  # type: ignore[misc]
            def _load_module_class_from_ref(self, *arguments: Any, **options: Any) -> Any:
                found = super()._load_module_class_from_ref(*arguments, **options)
                return Checked if found is Transformer else found

        return Served

    base = SentenceTransformer if spec.kind == "bi-encoder" else CrossEncoder
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": spec.trust_remote_code}
    assert spec.root is not None
    if (spec.root / "modules.json").is_file():
        return with_checks(base)(str(spec.root), device="cpu", **options)
    module = Checked(
        str(spec.path),
        transformer_task="sequence-classification",
        model_kwargs=dict(options),
        processor_kwargs=dict(options),
        config_kwargs=dict(options),
    )
    return CrossEncoder(modules=[module], device="cpu")
