"""Fingerprint: a hash of everything that scores depend on. Equal fingerprints mean equal scores up to rounding.

Large weights are sampled, tensor by tensor: the hash covers a file's size, its header (in safetensors the names, shapes
and types of all tensors), tensors of at most 64 KiB as a whole, and of every larger one blocks of 4 KiB at even
distances, its first and its last block among them. Training changes every block, and a tensor that is scaled or
exchanged changes its own blocks; a change of a few numbers between two blocks of a large tensor can go unseen. The path
of the directory and the dates of the files do not count.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

from .families import FAMILIES
from .spec import ModelSpec

_BLOCK = 4096
_BLOCKS = 1024  # of a file; more where it has many tensors
_WHOLE_TENSOR = 64 << 10
_ZIP_LOCAL_HEADER = 30
_WHOLE_LIMIT = 64 << 20
_Span = tuple[int, int]
_WEIGHTS = (".safetensors", ".bin")
# Fields of the description that change no score, or that the hashed configuration has as well.
_WITHOUT_INFLUENCE = {"chain", "hidden_size", "name", "path", "root", "saved"}
# Fields that count only where they are set.
_SELDOM = {"adapter", "family", "library_input", "library_model", "trust_remote_code"}
# Files without influence on scores, and files that change each time a model is saved.
_IGNORED = {"config_sentence_transformers.json", "generation_config.json", "modules.json", "training_args.bin"}
_VOLATILE = {"_name_or_path", "transformers_version", "is_local", "local_files_only", "name_or_path", "use_cache"}


def fingerprint(spec: ModelSpec, engine: Mapping[str, object], arguments: Mapping[str, object] | None = None) -> str:
    """Hash everything that scores depend on.

    Args:
        spec: The model. Its weights, tokenizer, configuration, kind, lengths and prompts count; its name and place do
            not.
        engine: Facts of the engine that may change scores: name, number format, versions of its libraries.
        arguments: Arguments of the engine that may change scores, if there are any.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    without = _WITHOUT_INFLUENCE | _SELDOM
    facts = {field.name: getattr(spec, field.name) for field in fields(spec) if field.name not in without}
    # The default length is a default of requests: with the length given, it changes no score.
    del facts["default_length"]
    _add(digest, "model", facts)
    _add(digest, "engine", dict(engine))
    if arguments:
        _add(digest, "arguments", dict(arguments))
    _add(digest, "tokenizers", version("tokenizers"))
    if spec.family is not None:
        _add(digest, "template", asdict(FAMILIES[spec.family].template))
    if spec.library_input:
        _add(digest, "sentence-transformers", version("sentence-transformers"))
    _add_files(digest, spec.path, spec.trust_remote_code)
    for name, folder in spec.chain:
        _add(digest, "module", name)
        assert spec.root is not None
        if (spec.root / folder).is_dir():  # a module without settings has no directory in a download
            _add_files(digest, spec.root / folder, spec.trust_remote_code)
    if spec.adapter is not None:
        _add(digest, "adapter", None)
        _add_files(digest, spec.adapter, code=False)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, label: str, value: object) -> None:
    text = json.dumps([label, value], sort_keys=True, default=str)
    digest.update(f"{len(text)}:{text}".encode())


def _add_files(digest: hashlib._Hash, directory: Path, code: bool) -> None:
    for path in _files(directory, code):
        _add(digest, "file", path.name)
        digest.update(_file(path))


def _files(directory: Path, code: bool) -> list[Path]:
    """Files that scores depend on, by name; with Python code if that may run."""
    weights = [path for path in directory.iterdir() if path.suffix in _WEIGHTS and path.name not in _IGNORED]
    if any(path.suffix == ".safetensors" for path in weights):
        # A second copy in the older format is not read.
        weights = [path for path in weights if path.suffix == ".safetensors"]
    small = [
        path
        for path in directory.iterdir()
        if path.suffix in {".json", ".txt", ".model", ".jinja"} | ({".py"} if code else set())
        and path.name not in _IGNORED
        and path.stat().st_size < _WHOLE_LIMIT
    ]
    return sorted((*weights, *small), key=lambda path: path.name)


def _file(path: Path) -> bytes:
    if path.suffix in _WEIGHTS:
        return _sample(path)
    content = path.read_bytes()
    if path.suffix == ".json":
        try:
            parsed = json.loads(content)
        except ValueError:
            return hashlib.sha256(content).digest()
        if isinstance(parsed, dict):
            content = json.dumps({k: v for k, v in parsed.items() if k not in _VOLATILE}, sort_keys=True).encode()
    return hashlib.sha256(content).digest()


def _sample(path: Path) -> bytes:
    """Hash a file of weights: its size, everything that is no tensor, and samples of its tensors."""
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    tensors = _safetensors_spans(path, size) if path.suffix == ".safetensors" else _zip_spans(path, size)
    with path.open("rb") as file:
        if tensors is None:
            # Neither format, such as a ``.bin`` file of torch before 1.6: where its tensors are cannot be known.
            return hashlib.file_digest(file, "sha256").digest()
        total = sum(end - begin for begin, end in tensors)
        at = 0
        for begin, end in tensors:
            _update(digest, file, at, begin)
            length = end - begin
            if length <= _WHOLE_TENSOR:
                _update(digest, file, begin, end)
            else:
                blocks = max(2, round(_BLOCKS * length / total))
                for number in range(blocks):
                    start = begin + (length - _BLOCK) * number // (blocks - 1)
                    _update(digest, file, start, start + _BLOCK)
            at = end
        _update(digest, file, at, size)
    return digest.digest()


def _update(digest: hashlib._Hash, file: BinaryIO, begin: int, end: int) -> None:
    """Hash the bytes of a file from ``begin`` to ``end``, none if it is not larger."""
    file.seek(begin)
    while begin < end:
        data = file.read(min(end - begin, 1 << 20))
        if not data:
            return
        digest.update(data)
        begin += len(data)


def _safetensors_spans(path: Path, size: int) -> list[_Span] | None:
    """Begin and end of each tensor, in order; ``None`` if the file is damaged.

    The format: https://huggingface.co/docs/safetensors
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            return None
        header = file.read(length)
    try:
        offsets = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
        spans = sorted((8 + length + int(begin), 8 + length + int(end)) for begin, end in offsets)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return _in_order(spans, size)


def _zip_spans(path: Path, size: int) -> list[_Span] | None:
    """Begin and end of each entry of a file that ``torch.save`` wrote; ``None`` if it is no such file.

    Each tensor is an uncompressed entry: https://docs.pytorch.org/docs/stable/notes/serialization.html
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            spans = []
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    return None
                file.seek(entry.header_offset)
                local = file.read(_ZIP_LOCAL_HEADER)
                begin = entry.header_offset + _ZIP_LOCAL_HEADER
                begin += int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
                spans.append((begin, begin + entry.file_size))
    except (zipfile.BadZipFile, OSError, ValueError):
        return None
    return _in_order(sorted(spans), size)


def _in_order(spans: list[_Span], size: int) -> list[_Span] | None:
    """Return spans that follow each other inside a file of ``size`` bytes; ``None`` for others."""
    borders = [0, *(border for span in spans for border in span), size]
    return spans if all(before <= after for before, after in itertools.pairwise(borders)) else None
