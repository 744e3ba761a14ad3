"""Awkward texts: those that a tokenizer might join with the text beside them, for proofs that parts are exact."""

from __future__ import annotations

_SPACES = ("", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200b", "\ufeff", "\x00", "\x7f")
_SPACED = ("a", " a", "  a", "a ", "a  ", "\na", "a\n", "a\n\n", " \n a \n ", "\ta", "A" * 40, "a-b_c", "ÀB c")
_SIGNS = ("?", "?\n", "a?\n", "...", "'s", "'S it", "1", "12 3", " 1", "٣", ":", ": a", "<", ">", "▁a", "Ġa")
_COMBINING = (
    "\u0301",
    "\u0301a",
    "e\u0301",
    "a \u0338",
    "\u0338",
    "\u1112\u1161\u11ab",
    "नि",
    "👩‍👧",
    "😀",
    "Ａ",
    "ﬁ",
    "日本",
)
_TEMPLATE = ("<|im_end|>", " <|im_end|> ", "<Document>:", "\n<Document>: a")

AWKWARD = (*_SPACES, *_SPACED, *_SIGNS, *_COMBINING, *_TEMPLATE)
"""The texts."""
