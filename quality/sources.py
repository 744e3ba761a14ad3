"""Two data sets, each split into three parts: to train the cross-encoder, to train the students, and for evaluation.

Both are read from installed packages. ``docstrings``: the query is a docstring's summary, the document is the rest of
the docstring. ``code``: code search as in CodeSearchNet (https://arxiv.org/abs/1909.09436); the query is the summary of
a function's docstring, the document is the function's source without the docstring.
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
    """Three parts of one data set that have no module and no text in common.

    Attributes:
        guide: Pairs that the cross-encoder is trained on.
        train: Pairs that the students are trained on.
        held_out: Pairs for evaluation.
    """

    guide: list[Pair]
    train: list[Pair]
    held_out: list[Pair]


def code_pairs_of_source(source: bytes, module: str) -> list[Pair]:
    """Make pairs of summary and code from the functions of one file.

    Args:
        source: The file's bytes.
        module: Value of :attr:`Pair.module`.

    Returns:
        One pair for each function that has a summary of 20 to 200 characters and at least 80 characters of code. The
        code is on one line, without docstring, comments and decorators, cut to 320 characters.

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
        # The docstring is the first statement of the body. If it is the only one, a pass takes its place.
        bare = ast.FunctionDef(function.name, function.args, function.body[1:] or [ast.Pass()], [])
        code = shortened(ast.unparse(ast.fix_missing_locations(bare)))
        if len(code) >= _CODE_LEAST:
            pairs.append(Pair(summary, code, module))
    return pairs


#: Data sets: name, and function that makes pairs from a file's bytes and module.
SOURCES: Mapping[str, Callable[[bytes, str], list[Pair]]] = {
    "docstrings": pairs_of_source,
    "code": code_pairs_of_source,
}


def read(name: str, limit: int, packages: Sequence[str]) -> list[Pair]:
    """Read at most ``limit`` pairs of the data set ``name`` from ``packages``; see ``examples.docstrings.collect``."""
    return collect(limit, packages, SOURCES[name])


def split(pairs: Sequence[Pair], guide_share: float, held_out_share: float) -> Parts:
    """Split pairs by module into three parts; pairs with a text that another part also has are dropped from one part.

    Args:
        pairs: All pairs.
        guide_share: Share of the modules that train the cross-encoder.
        held_out_share: Share of the other modules that is held out for evaluation.
    """
    for_guide = split_by_module(pairs, guide_share, seed=0)
    for_students = split_by_module(for_guide.train, held_out_share, seed=1)
    return Parts(guide=for_guide.held_out, train=for_students.train, held_out=for_students.held_out)


def normalize(text: str) -> str:
    """Return the words of a text in lower case, so that texts with the same words become equal."""
    return " ".join(re.findall(r"\w+", text.casefold()))


class KnownRelevance:
    """Known relevance of documents to queries, from which the known false negatives of a batch follow.

    A document is known to be relevant to a query if a pair of the data set has this query and this document; case,
    spaces and punctuation are ignored. So the known false negatives of an anchor are the documents that are paired with
    the same query elsewhere in the data set (an overload, another implementation, an interface and its implementation),
    and copies of the anchor's positive.

    Args:
        pairs: All pairs of the data set.
    """

    def __init__(self, pairs: Iterable[Pair]) -> None:
        self._documents: defaultdict[str, set[str]] = defaultdict(set)
        for pair in pairs:
            self._documents[normalize(pair.summary)].add(normalize(pair.body))

    def answers(self, query: str, document: str) -> bool:
        """Whether ``document`` is known to be relevant to ``query``."""
        return normalize(document) in self._documents[normalize(query)]
