"""Library: the input that sentence-transformers makes of a pair or a text, without the model's weights.

It is the reference of every model that the server's own rules do not know. The tokens of pairs are joined from those of
their texts if that gives the library's input for awkward texts too; this is proved when the layout is made. Otherwise
the library makes the input of every pair, in the engine's thread.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
from tokenizers import Tokenizer

from .awkward import AWKWARD
from .bi_encoder import BiEncoderLayout
from .chat import ChatTemplate, find_chat_template
from .cross_encoder import CrossEncoderLayout
from .layout import NoRoomError, PairLayout, TextLayout
from .one_by_one import PairByPairLayout, TextByTextLayout
from .spec import ModelSpec, UnsupportedModelError
from .templated import TemplateLayout
from .tokens import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONG = ("word " * 40, "Another text, which is long: " * 12)

log = structlog.get_logger()


class LibraryInput:
    """The ``Transformer`` module of a model, which makes its input; any number of threads may use it."""

    def __init__(self, spec: ModelSpec) -> None:
        """Load the settings and the tokenizer.

        Raises:
            UnsupportedModelError: sentence-transformers is not installed, or cannot load the model's settings.
        """
        try:
            from sentence_transformers.base.modules import Transformer
        except ImportError as error:
            raise UnsupportedModelError(
                f"{spec.name}: its input is made by sentence-transformers, which is not installed; "
                "pip install sentence-transformers"
            ) from error
        import torch
        from sentence_transformers.base.modules.transformer import TRANSFORMER_TASK_TO_AUTO_MODEL

        class Weightless(Transformer):
            """The module with a model that has shapes and no numbers."""

            def _load_model(
                self,
                model_name_or_path: str,
                transformer_task: Any,
                config: Any,
                backend: str,
                is_peft_model: bool,
                **model_kwargs: Any,
            ) -> Any:
                auto: Any = TRANSFORMER_TASK_TO_AUTO_MODEL[transformer_task]
                with torch.device("meta"):
                    return auto.from_config(config, trust_remote_code=spec.trust_remote_code)

        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": spec.trust_remote_code}
        assert spec.root is not None
        try:
            if (spec.root / "modules.json").is_file():
                folder = str(spec.path.relative_to(spec.root)) if spec.path != spec.root else ""
                self._module: Any = Weightless.load(str(spec.root), subfolder=folder, **options)
            else:
                self._module = Weightless(
                    str(spec.path),
                    transformer_task="sequence-classification",
                    model_kwargs=dict(options),
                    processor_kwargs=dict(options),
                    config_kwargs=dict(options),
                )
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise UnsupportedModelError(
                f"{spec.name}: sentence-transformers cannot load it: {type(error).__name__}: {error}"
            ) from error
        self._lock = threading.Lock()
        self.name = spec.name
        self.has_messages = "message" in self._module.modality_config

    @property
    def module(self) -> Any:
        """The library's module."""
        return self._module

    def tokens(self, text: str | tuple[str, str], prompt: str, max_length: int) -> TokenSequence:
        """The input of a pair or a text, at most ``max_length`` tokens long.

        Raises:
            UnsupportedModelError: The library cannot make it.
        """
        with self._lock:  # a tokenizer keeps its truncation as a state
            try:
                made = self._module.preprocess(
                    [text], prompt=prompt or None, processing_kwargs={"text": {"max_length": max_length}}
                )
            except Exception as error:
                raise UnsupportedModelError(f"{self.name}: sentence-transformers makes no input: {error}") from error
        ids = made["input_ids"][0].numpy().astype(np.int32)
        types = made["token_type_ids"][0].tolist() if "token_type_ids" in made else []
        return TokenSequence(ids, types.index(1) if 1 in types else len(ids))


def library_layout(spec: ModelSpec, hub: PreTrainedTokenizerBase, tokenizer: Tokenizer) -> PairLayout | TextLayout:
    """Make the layout of a model whose input is the library's.

    Raises:
        UnsupportedModelError: The library makes no input of a pair.
    """
    library = LibraryInput(spec)
    if spec.kind == "bi-encoder":
        return _texts_layout(library, spec, hub, tokenizer)
    layout: PairLayout | None = None
    chat: ChatTemplate | None = None
    try:
        if library.has_messages:
            chat = find_chat_template(library.module, hub, tokenizer, spec.query_prompt)
            layout = None if chat is None else TemplateLayout(spec, hub, tokenizer, chat)
        else:
            layout = CrossEncoderLayout(spec, hub, tokenizer)
        if layout is not None and not _is_right(layout, library, spec):
            layout = None
    except (UnsupportedModelError, NoRoomError) as error:
        log.debug("pairs cannot be joined", reason=str(error))
        layout = None
    if layout is not None:
        return layout
    # The library's own error, if it makes no input of a pair at all.
    library.tokens(("a", "b"), spec.query_prompt, spec.max_length)
    log.warning(
        "the input of this model cannot be joined from its texts; sentence-transformers tokenizes pair by pair, slower",
        model=spec.name,
    )
    return PairByPairLayout(spec, library, tokenizer)


def _is_right(layout: PairLayout, library: LibraryInput, spec: ModelSpec) -> bool:
    """Whether joined pairs are those of the library, over-long ones too; tried on awkward texts."""
    prompt = spec.query_prompt
    pairs = [(text, "a b") for text in AWKWARD] + [("a b", text) for text in AWKWARD] + [("", "")]
    long = [("a query", _LONG[1]), (_LONG[0], "a document"), _LONG] if layout.template is None else []
    long += [(query, _LONG[1] + end) for query in ("a", "some query?") for end in ("", "?", "?\n", " ", "1")]
    least = layout.smallest_length(None)
    trials = [(pair, spec.max_length) for pair in pairs]
    trials += [(pair, least + more) for pair in long for more in (12, 23) if least + more <= spec.max_length]
    for (query, document), length in trials:
        encoded = layout.encode_queries([query], None, length), layout.encode_documents([document], length)
        (joined,) = layout.join(*encoded, length)
        wanted = library.tokens((query, document), prompt, length)
        if not np.array_equal(joined.ids, wanted.ids) or joined.first_segment != wanted.first_segment:
            log.debug("a joined pair differs", query=query, document=document, max_length=length)
            return False
    return True


def _texts_layout(
    library: LibraryInput, spec: ModelSpec, hub: PreTrainedTokenizerBase, tokenizer: Tokenizer
) -> TextLayout:
    try:
        layout = BiEncoderLayout(spec, hub, tokenizer)
        right = True
        for text in (*AWKWARD, *_LONG):
            for length in (spec.max_length, layout.smallest_length(None) + 5):
                query, document = layout.encode_queries([text], None), layout.encode_documents([text])
                for one, prompt in ((query, spec.query_prompt), (document, spec.document_prompt)):
                    wanted = library.tokens(text, prompt, length)
                    right = right and np.array_equal(layout.single(one[0], length)[0].ids, wanted.ids)
        if right:
            return layout
    except (UnsupportedModelError, NoRoomError) as error:
        log.debug("texts cannot be encoded by themselves", reason=str(error))
    log.warning("sentence-transformers tokenizes this model's texts one by one, which is slower", model=spec.name)
    return TextByTextLayout(spec, library)
