"""Retrieval data set that every machine has: the docstrings of installed packages.

The anchor of a pair is a docstring's summary (its first paragraph), the positive is the rest of the docstring. Aliases,
overloads and copied interfaces repeat texts, so some pairs share a text with another pair. These pairs are kept,
because they give natural false negatives. Source files are parsed, never imported, so reading is safe, fast and the
same on every run.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import re
import sysconfig
import warnings
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

STANDARD_LIBRARY = "stdlib"

#: Packages to read, those with few docstrings first: the rest of their share goes to the packages after them.
PACKAGES: tuple[str, ...] = (
    "numpy",
    "networkx",
    "matplotlib",
    "sklearn",
    "pandas",
    STANDARD_LIBRARY,
    "scipy",
    "transformers",
    "torch",
    "sympy",
)

# Folders of tests, of vendored packages, and of the packages that are installed below the standard library.
_SKIPPED_FOLDERS = {"tests", "test", "testing", "_vendor", "_vendored_packages", "lib2to3", "site-packages"}

_SUMMARY_CHARACTERS = range(20, 201)
_BODY_LEAST = 60
# About the 64 tokens that the student reads.
_BODY_MOST = 320
_UNDERLINE = re.compile(r"^\s*([-=~^*#])\1{2,}\s*$", re.MULTILINE)
# Interactive sessions are code, not text.
_SESSION = re.compile(r"^\s*>>>.*\Z", re.MULTILINE | re.DOTALL)
_VERSION_NOTE = re.compile(r"^\s*\.\. (versionadded|versionchanged|deprecated)::.*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Pair:
    """Pair of a query and a document, from one docstring.

    Attributes:
        summary: First paragraph on one line, 20 to 200 characters: the anchor, or the query.
        body: Rest of the docstring on one line, 60 to 320 characters: the positive, or the document.
        module: File of the docstring, as ``package/path/to/file.py``.
    """

    summary: str
    body: str
    module: str


@dataclass(frozen=True, slots=True)
class Split:
    """Pairs for training, and pairs from other modules for evaluation; the two have no text in common.

    Attributes:
        train: Pairs for training.
        held_out: Pairs for evaluation.
    """

    train: list[Pair]
    held_out: list[Pair]


def text_key(text: str) -> str:
    """Return a key that is equal for texts that differ only in case, which the uncased student does not distinguish."""
    return text.casefold()


def pairs_of_source(source: bytes, module: str) -> list[Pair]:
    """Make pairs from the docstrings of one file.

    Args:
        source: The file's bytes; a declared encoding is respected.
        module: Value of :attr:`Pair.module`.

    Returns:
        One pair for each module, class and function with a docstring whose summary and body have the lengths that
        :class:`Pair` states, in the order of the file. Longer bodies are cut.

    Raises:
        SyntaxError, ValueError: The file is not valid Python.
    """
    docstrings = (
        ast.get_docstring(node)
        for node in nodes_of_source(source)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    )
    pairs = (_pair_of_docstring(docstring, module) for docstring in docstrings if docstring)
    return [pair for pair in pairs if pair is not None]


def nodes_of_source(source: bytes) -> list[ast.AST]:
    """Return the module and all statements of one file in the order of the file.

    Raises:
        SyntaxError, ValueError: The file is not valid Python.
    """
    with warnings.catch_warnings():
        # Installed packages have string literals with invalid escapes, which Python warns about.
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    return sorted(_statements(tree), key=lambda node: getattr(node, "lineno", 0))


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the module and its statements. Expressions are skipped: they are most nodes, and hold no statements."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        yield (node := waiting.popleft())
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            waiting.extend(getattr(node, name, ()))


def one_line_summary(docstring: str) -> str | None:
    """Return the first paragraph of a docstring on one line; ``None`` if it is not 20 to 200 characters long."""
    summary = _one_line(docstring.partition("\n\n")[0])
    return summary if len(summary) in _SUMMARY_CHARACTERS else None


def shortened(text: str) -> str:
    """Return a text on one line, cut between two words to at most 320 characters."""
    line = _one_line(text)
    if len(line) <= _BODY_MOST:
        return line
    return line[: _BODY_MOST + 1].rpartition(" ")[0] or line[:_BODY_MOST]


def collect(
    limit: int,
    packages: Sequence[str] = PACKAGES,
    extract: Callable[[bytes, str], list[Pair]] = pairs_of_source,
) -> list[Pair]:
    """Read pairs from installed packages.

    Args:
        limit: Maximum number of pairs. Packages are read in order, and each gives at most an equal share of the pairs
            that are missing when it is read.
        packages: Import names; ``"stdlib"`` is the standard library. Packages that are not installed are skipped.
        extract: Makes the pairs of one file from its bytes and the value of :attr:`Pair.module`.

    Returns:
        The pairs, package by package; duplicates are kept.

    Raises:
        ValueError: ``limit`` is not positive, or none of the packages is installed.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    roots = {name: root for name in packages if (root := _package_root(name)) is not None}
    if not roots:
        raise ValueError(f"none of these packages is installed: {', '.join(packages)}")
    pairs: list[Pair] = []
    for position, (name, root) in enumerate(roots.items()):
        share = -(-(limit - len(pairs)) // (len(roots) - position))
        pairs += _package_pairs(name, root, share, extract)
    return pairs[:limit]


def split_by_module(pairs: Sequence[Pair], held_out_share: float, seed: int) -> Split:
    """Hold out about ``held_out_share`` (between 0 and 1) of the modules, and keep their texts out of training.

    A pair of another module that has a summary or body of a held-out module is in neither part.

    Raises:
        ValueError: The share is not between 0 and 1.
    """
    if not 0 < held_out_share < 1:
        raise ValueError(f"held_out_share must be between 0 and 1, not {held_out_share}")
    held_out = [pair for pair in pairs if _unit_hash(f"{seed}:{pair.module}") < held_out_share]
    seen = {text_key(text) for pair in held_out for text in (pair.summary, pair.body)}
    modules = {pair.module for pair in held_out}
    train = [
        pair
        for pair in pairs
        if pair.module not in modules and text_key(pair.summary) not in seen and text_key(pair.body) not in seen
    ]
    return Split(train=train, held_out=held_out)


def repeated_share(pairs: Collection[Pair]) -> float:
    """Return the share of the pairs, in [0, 1], whose summary or body another pair also has; 0 for no pairs."""
    summaries = Counter(text_key(pair.summary) for pair in pairs)
    bodies = Counter(text_key(pair.body) for pair in pairs)
    repeated = sum(summaries[text_key(pair.summary)] > 1 or bodies[text_key(pair.body)] > 1 for pair in pairs)
    return repeated / max(len(pairs), 1)


def _pair_of_docstring(docstring: str, module: str) -> Pair | None:
    summary = one_line_summary(docstring)
    paragraphs = (_SESSION.sub("", part) for part in re.split(r"\n\s*\n", docstring.partition("\n\n")[2]))
    body = shortened(_VERSION_NOTE.sub("", _UNDERLINE.sub("", "\n".join(paragraphs))))
    if summary is None or len(body) < _BODY_LEAST:
        return None
    return Pair(summary, body, module)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _package_root(name: str) -> Path | None:
    if name == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _package_pairs(name: str, root: Path, limit: int, extract: Callable[[bytes, str], list[Pair]]) -> list[Pair]:
    pairs: list[Pair] = []
    for path, module in _source_files(name, root):
        try:
            pairs += extract(path.read_bytes(), module)
        except (SyntaxError, ValueError):
            # Some packages contain templates and samples of invalid code.
            continue
        if len(pairs) >= limit:
            break
    return pairs[:limit]


def _source_files(name: str, root: Path) -> Iterator[tuple[Path, str]]:
    """Return (path, module) of a package's files, in an order that depends on names alone and mixes all folders."""
    named: list[tuple[str, Path]] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [one for one in folders if one not in _SKIPPED_FOLDERS]
        paths = [Path(folder, file) for file in files if file.endswith(".py")]
        named += [(f"{name}/{path.relative_to(root).as_posix()}", path) for path in paths]
    named.sort(key=lambda item: (_unit_hash(item[0]), item[0]))
    return ((path, module) for module, path in named)


def _unit_hash(text: str) -> float:
    """Hash a text to a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
