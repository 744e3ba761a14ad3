"""Prefix: tokenizes only as much of a long text as its used tokens need, and gives exactly the whole text's tokens.

A tokenizer normalizes a text, splits it into words, and makes tokens of each word by itself. A long text is cut at a
border that the steps before the last one cannot see across: the tokens of the part before the border are then the first
tokens of the whole text. Two kinds of border are used.

Before a space that stands between a letter or digit and a letter or digit:
- Normalizers: no grapheme and no canonical composition spans the border, because a space begins a grapheme after a
  letter and composes with nothing before it. All other normalizers that are accepted change single characters, runs of
  spaces (which lie behind the border), or the text's beginning.
- Splits: the word before ends there, whether a space follows or the text ends. The patterns that are accepted match
  runs of one class of characters; none looks ahead past a letter or digit at the end of its run.
- Added tokens: those that are accepted contain no white space after another character, so that none spans the border.

Before a full-width mark such as "。" after a Chinese, Japanese or Korean letter, only for tokenizers that split at
punctuation: the run of letters ends there for the same reason. It serves texts without spaces.

Tokenizers with any other part, such as one that makes tokens across words, get the whole text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .tokens import EncodedText, Ids
from .truncation import Side, keep_used

# Text that is tokenized at first, for each token that is used; English has four to five characters a token.
_CHARACTERS_PER_TOKEN = 6
_LEAST_CHARACTERS = 1024
_GROWTH = 4

_LETTERS = "A-Za-z0-9\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0391-\u03a1\u03a3-\u03c9\u0410-\u044f\u05d0-\u05ea"
_LETTERS += "\u0621-\u063a\u0641-\u064a\u0905-\u0939"
_IDEOGRAPHS = "\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3"
_SPACE = f"[{_LETTERS}](?= [{_LETTERS}])"
_MARK = f"[{_IDEOGRAPHS}](?=[。，、！？；：])"

# Strings that could stand on both sides of a border; "▁" is a space that was replaced.
_SPANNING = re.compile(rf"\S[\s▁]|[{_IDEOGRAPHS}]\W")

_NORMALIZERS = {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Precompiled", "Prepend", "StripAccents"}
_NORMALIZERS |= {"Strip", "Nmt"}
_SPLITTERS = {"BertPreTokenizer", "ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "Whitespace"}
_SPLITTERS |= {"WhitespaceSplit"}
_AT_PUNCTUATION = {"BertPreTokenizer", "Whitespace"}
_REPLACED = {" {2,}", r"\s+", r" +"}
# Of GPT-2, Llama 3, and Qwen: runs of letters, of digits, of other characters and of white space.
_ENDINGS = "'s|'t|'re|'ve|'m|'ll|'d"
_PATTERNS = {
    rf"{_ENDINGS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+",
    *(
        rf"(?i:{_ENDINGS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        for digits in (r"\p{N}{1,3}", r"\p{N}")
    ),
}


class PrefixTokenizer:
    """Tokenizes the first part of long texts. Any number of threads may use it at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Find out where texts may be cut.

        Args:
            tokenizer: The tokenizer, without truncation and padding.
        """
        self._tokenizer = tokenizer
        border = _border(json.loads(tokenizer.to_str()))
        self._border = None if border is None else re.compile(border)

    def encode(
        self, texts: Sequence[str], limit: int | None, before: str = "", side: Side = "right"
    ) -> list[EncodedText]:
        """Tokenize texts and keep the token ids that truncation at a side can leave, at most ``limit`` of each text.

        Args:
            texts: The texts.
            limit: Most token ids of a text that are kept; ``None`` for all of them.
            before: Text in front of each text.
            side: Side at which texts are truncated. Truncation at the left needs the tokens of whole texts.
        """
        found = self.tokenize(texts, limit if side == "right" else None, before)
        return [keep_used(ids, exact, limit, side) for ids, exact in found]

    def tokenize(
        self, texts: Sequence[str], limit: int | None, before: str = "", after: str = ""
    ) -> list[tuple[Ids, bool]]:
        """Token ids of each text with ``before`` and ``after`` around it, without special tokens.

        Args:
            texts: The texts.
            limit: Tokens of a text that are used, counted from its beginning; ``None`` for all of them.
            before: Text in front of each text.
            after: Text behind each text.

        Returns:
            For each text its token ids, int32, and whether they are all; if not, they are the first ones, at least
            ``limit``.
        """
        found: list[tuple[Ids, bool]] = [(np.empty(0, dtype=np.int32), False)] * len(texts)
        left = list(range(len(texts)))
        characters = 0 if limit is None else max(_LEAST_CHARACTERS, _CHARACTERS_PER_TOKEN * limit)
        while left:
            cuts = [self._cut(texts[one], characters) for one in left]
            parts = [
                before + (texts[one] + after if cut is None else texts[one][:cut])
                for one, cut in zip(left, cuts, strict=True)
            ]
            again = []
            encodings = self._tokenizer.encode_batch_fast(parts, add_special_tokens=False)
            for one, cut, encoding in zip(left, cuts, encodings, strict=True):
                ids = np.array(encoding.ids, dtype=np.int32)
                if cut is None or (limit is not None and len(ids) >= limit):
                    found[one] = (ids, cut is None)
                else:
                    again.append(one)
            left = again
            characters *= _GROWTH
        return found

    def _cut(self, text: str, characters: int) -> int | None:
        """The first border after some characters; ``None`` if the whole text is to be tokenized."""
        if self._border is None or not characters or len(text) <= 2 * characters:
            return None
        found = self._border.search(text, characters)
        return None if found is None else found.end()


def _border(description: Mapping[str, Any]) -> str | None:
    """Pattern of the characters before a border; ``None`` if texts must not be cut.

    Args:
        description: The tokenizer, as in ``tokenizer.json``.
    """
    if any(_SPANNING.search(token["content"]) for token in description["added_tokens"]):
        return None
    if description["model"].get("dropout") or not all(map(_is_local, _parts(description["normalizer"], "normalizers"))):
        return None
    splitters = list(_parts(description["pre_tokenizer"], "pretokenizers"))
    if not splitters or not all(map(_splits_locally, splitters)):
        return None
    # Byte-level tokens span words unless a pattern splits them; Metaspace alone splits at spaces.
    if not any(map(_splits_at_spaces, splitters)):
        return None
    at_punctuation = any(part["type"] in _AT_PUNCTUATION or _has_pattern(part) for part in splitters)
    return f"{_SPACE}|{_MARK}" if at_punctuation else _SPACE


def _parts(part: Mapping[str, Any] | None, name: str) -> Iterator[Mapping[str, Any]]:
    if part is None:
        return
    if part["type"] == "Sequence":
        for one in part[name]:
            yield from _parts(one, name)
    else:
        yield part


def _is_local(part: Mapping[str, Any]) -> bool:
    """Whether a normalizer changes nothing before a border because of what comes after it."""
    if part["type"] != "Replace":
        return part["type"] in _NORMALIZERS
    pattern = part["pattern"]
    if "Regex" in pattern:
        return pattern["Regex"] in _REPLACED
    return _SPANNING.search(pattern["String"]) is None


def _splits_locally(part: Mapping[str, Any]) -> bool:
    if part["type"] == "Split":
        return _has_pattern(part) or part["pattern"].get("String") == " "
    return part["type"] in _SPLITTERS


def _splits_at_spaces(part: Mapping[str, Any]) -> bool:
    if part["type"] == "Metaspace":
        return bool(part.get("split", True))
    if part["type"] == "Split":
        return _has_pattern(part) and part["behavior"] == "Isolated"
    return part["type"] in {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"} or _has_pattern(part)


def _has_pattern(part: Mapping[str, Any]) -> bool:
    """Whether a part splits texts by one of the patterns that are known."""
    if part["type"] == "ByteLevel":
        return bool(part.get("use_regex", True))
    return part["type"] == "Split" and part["pattern"].get("Regex") in _PATTERNS and not part.get("invert")
