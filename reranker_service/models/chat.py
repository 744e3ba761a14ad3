"""Chat template: the parts of the template with which sentence-transformers renders a pair, found by rendering.

The template is a program. It is rendered once with marks in place of query and document, and cut at the marks. The
places at which each part may be tokenized by itself are searched, and proved on awkward texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from .awkward import AWKWARD
from .template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "chat-template"
"""Name of the template, for clients."""

_QUERY, _DOCUMENT = "\ue000query\ue001", "\ue000document\ue001"
_TRIALS = 16

Render = Callable[[str | None], tuple[str, str, str]]
"""Gives the text before the query, between the texts and after the document for an instruction."""


@dataclass(frozen=True)
class ChatTemplate(Template):
    """A template that is rendered anew for each instruction.

    Attributes:
        render: Renders the template.
    """

    render: Render | None = field(default=None, compare=False)

    def opening(self, instruction: str | None) -> str:
        """See ``Template.opening``."""
        assert self.render is not None
        before, _, _ = self.render(self.default_instruction if instruction is None else instruction)
        return before[: len(before) - len(self.query[0])]


def find_chat_template(
    module: Any, hub: PreTrainedTokenizerBase, tokenizer: Tokenizer, default_prompt: str
) -> ChatTemplate | None:
    """Find the parts of a model's chat template.

    Args:
        module: The ``Transformer`` module of sentence-transformers.
        hub: The model's tokenizer, with the template.
        tokenizer: The same without truncation and padding.
        default_prompt: The system message of pairs without an instruction; empty for none.

    Returns:
        The template; ``None`` if texts cannot be cut out of it, or their tokens depend on the text beside them.
    """

    @lru_cache(maxsize=8)
    def render(instruction: str | None) -> tuple[str, str, str]:
        messages = [module.input_formatter.pair_to_messages((_QUERY, _DOCUMENT))]
        if instruction:
            messages = module.input_formatter.prepend_prompt_to_messages(messages, instruction)
        options = dict(module.processing_kwargs.get("chat_template", {}))
        options.pop("restore_suffix", None)
        rendered = str(hub.apply_chat_template(messages[0], tokenize=False, **options))
        before, query, rest = rendered.partition(_QUERY)
        between, document, after = rest.partition(_DOCUMENT)
        if not query or not document or _QUERY in rest or _DOCUMENT in after:
            raise ValueError("the template does not render query and document once, and in this order")
        return before, between, after

    try:
        before, between, after = render(default_prompt)
        other, *rest = render("An instruction in words.")
        plain = render("")
    except Exception:
        return None
    if rest != [between, after] or plain[1:] != (between, after):
        return None  # the text behind the query depends on the instruction
    takes_instruction = other != plain[0]
    # Each search varies the texts on both sides of one place.
    first = _place(tokenizer, before, "", lambda text: text + between + "a" + after)
    second = _place(tokenizer, between, before, lambda text: text + after, also_before=True)
    third = _place_after(tokenizer, before + "a" + between, after)
    if first is None or second is None or third is None:
        return None
    if not all(one.endswith(before[first:]) for one in (other, plain[0])):
        return None
    return ChatTemplate(
        name=NAME,
        query=(before[first:], between[:second]),
        document=(between[second:], after[:third]),
        suffix=(after[third:],),
        default_instruction=default_prompt if takes_instruction else None,
        render=render if takes_instruction else lambda _: render(default_prompt),
    )


def _places(text: str) -> Iterator[int]:
    """Places at which a text may be cut, the last ones first: before white space, beside other signs, and its end."""
    found = {
        len(text),
        *(match.start() for match in re.finditer(r"\s+|(?<=\w)(?=\W)|(?<=\W)(?=\w)|(?<=>)|(?=<)", text)),
    }
    # In a run of white space every place counts: tokenizers keep the last space for the next word.
    found |= {at for at in range(len(text)) if text[at].isspace()}
    yield from sorted(found, reverse=True)


def _place(
    tokenizer: Tokenizer, part: str, before: str, finish: Callable[[str], str], also_before: bool = False
) -> int | None:
    """The last place of ``part`` at which tokens do not depend on the text that follows it, or on that before it."""
    texts = ["a b", *AWKWARD]
    for at in list(_places(part))[:_TRIALS]:
        if also_before:
            # Both texts stand beside the part: the query before it, the document after it.
            lefts = [before + text + part[:at] for text in texts] + [before + "a b" + part[:at]] * len(texts)
            rights = [finish(part[at:] + "a b")] * len(texts) + [finish(part[at:] + text) for text in texts]
        else:
            lefts = [before + part[:at]] * len(texts)
            rights = [finish(part[at:] + text) for text in texts]
        if _exact(tokenizer, lefts, rights):
            return at
    return None


def _place_after(tokenizer: Tokenizer, before: str, part: str) -> int | None:
    """The first place of ``part`` at which tokens do not depend on the text before it."""
    texts = ["a b", *AWKWARD]
    places = sorted({0, *_places(part)})
    for at in [*places[:_TRIALS], len(part)]:
        if _exact(tokenizer, [before + text + part[:at] for text in texts], [part[at:]] * len(texts)):
            return at
    return None


def _exact(tokenizer: Tokenizer, lefts: Sequence[str], rights: Sequence[str]) -> bool:
    wholes = [left + right for left, right in zip(lefts, rights, strict=True)]
    parts = [
        [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        for texts in (lefts, rights, wholes)
    ]
    return all(left + right == whole for left, right, whole in zip(*parts, strict=True))
