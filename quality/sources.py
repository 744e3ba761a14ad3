"""The study's two data sets, each split in three: for the cross-encoder, for the students, for the examination.

Both are read from installed packages. ``docstrings``: a docstring's summary is the query, the rest of it the document.
``code``: code search in the manner of CodeSearchNet (https://arxiv.org/abs/1909.09436); a function's summary is the
query, its source without the docstring the document.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from examples.docstrings import (
    Pair,
    collect,
    nodes_of_source,
    one_line_summary,
    pairs_of_source,
    shortened,
    split_by_module,
)

_CODE_LEAST = 80


@dataclass(frozen=True, slots=True)
class Parts:
    """One data set in three parts that have no module and no text in common.

    Attributes:
        guide: Pairs that the cross-encoder is made with.
        train: Pairs that the students are trained with.
        held_out: Pairs for the examination.
    """

    guide: list[Pair]
    train: list[Pair]
    held_out: list[Pair]


def code_pairs_of_source(source: bytes, module: str) -> list[Pair]:
    """Take the functions out of one file: summary and source.

    Args:
        source: The file's bytes.
        module: Becomes :attr:`Pair.module`.

    Returns:
        One pair for each function that has a docstring with a summary of fitting length and code of 80 characters or
        more. The code is without docstring, comments and decorators, on one line, cut to 320 characters.

    Raises:
        SyntaxError, ValueError: The file is not valid Python.
    """
    functions = (node for node in nodes_of_source(source) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    pairs = []
    for function in functions:
        docstring = ast.get_docstring(function)
        summary = one_line_summary(docstring) if docstring else None
        if summary is None:
            continue
        # The docstring is the first statement of the body; what is left may be nothing.
        bare = ast.FunctionDef(function.name, function.args, function.body[1:] or [ast.Pass()], [])
        code = shortened(ast.unparse(ast.fix_missing_locations(bare)))
        if len(code) >= _CODE_LEAST:
            pairs.append(Pair(summary, code, module))
    return pairs


#: The data sets by name, and what takes their pairs out of a file.
SOURCES: Mapping[str, Callable[[bytes, str], list[Pair]]] = {
    "docstrings": pairs_of_source,
    "code": code_pairs_of_source,
}


def read(name: str, limit: int, packages: Sequence[str]) -> list[Pair]:
    """Read at most ``limit`` pairs of the data set ``name`` from ``packages``; see ``examples.docstrings.collect``."""
    return collect(limit, packages, SOURCES[name])


def split(pairs: Sequence[Pair], guide_share: float, held_out_share: float) -> Parts:
    """Split by module; a pair whose text stands in two parts is left out of one of them.

    Args:
        pairs: All pairs.
        guide_share: Share of the modules for the cross-encoder.
        held_out_share: Share of the other modules for the examination.
    """
    for_guide = split_by_module(pairs, guide_share, seed=0)
    for_students = split_by_module(for_guide.train, held_out_share, seed=1)
    return Parts(guide=for_guide.held_out, train=for_students.train, held_out=for_students.held_out)


def same_words(text: str) -> str:
    """What two texts have in common that differ only in case, spaces and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


class KnownRelevance:
    """Which documents are known to answer a query although another one is labelled so in a batch.

    Known is what the data itself says: a document is relevant to a query if some pair of the data set has this query
    with this document, up to case, spaces and punctuation. So the known false negatives of an anchor are the documents
    that stand beside the same summary elsewhere (an overload, another implementation, an interface and what implements
    it), and copies of its own positive.

    Args:
        pairs: Everything that is known.
    """

    def __init__(self, pairs: Iterable[Pair]) -> None:
        self._documents: defaultdict[str, set[str]] = defaultdict(set)
        for pair in pairs:
            self._documents[same_words(pair.summary)].add(same_words(pair.body))

    def answers(self, query: str, document: str) -> bool:
        """Whether ``document`` is known to be relevant to ``query``."""
        return same_words(document) in self._documents[same_words(query)]
