"""Fingerprint: a hash of everything that scores depend on. Equal fingerprints mean equal scores up to rounding.

Weights are sampled: of each file the hash covers its size, its header (in safetensors the names, shapes and types of
all tensors) and blocks of 4 KiB at even distances. Training changes every block; a change of a few bytes between two
blocks can go unseen. The path of the directory and the dates of the files do not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

from .spec import ModelSpec
from .templates import DEFAULT_INSTRUCTION, DOCUMENT_MARK, PREFIX, SUFFIX, query_head

_BLOCK = 4096
_BLOCKS = 1024
_HEADER_LIMIT = 16 << 20
_WHOLE_LIMIT = 64 << 20
_WEIGHTS = (".safetensors", ".bin")
_PLACE = {"name", "path"}
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
    facts = {field.name: getattr(spec, field.name) for field in fields(spec) if field.name not in _PLACE}
    # The default length is a default of requests: with the length given, it changes no score.
    del facts["default_length"]
    _add(digest, "model", facts)
    _add(digest, "engine", dict(engine))
    if arguments:
        _add(digest, "arguments", dict(arguments))
    _add(digest, "tokenizers", version("tokenizers"))
    if spec.kind == "causal-reranker":
        _add(digest, "template", [PREFIX, query_head(DEFAULT_INSTRUCTION), DOCUMENT_MARK, SUFFIX])
    for path in _files(spec.path):
        _add(digest, "file", path.name)
        digest.update(_file(path))
    return digest.hexdigest()


def _add(digest: hashlib._Hash, label: str, value: object) -> None:
    text = json.dumps([label, value], sort_keys=True, default=str)
    digest.update(f"{len(text)}:{text}".encode())


def _files(directory: Path) -> list[Path]:
    """Files that scores depend on, by name."""
    weights = [path for path in directory.iterdir() if path.suffix in _WEIGHTS and path.name not in _IGNORED]
    if any(path.suffix == ".safetensors" for path in weights):
        # A second copy in the older format is not read.
        weights = [path for path in weights if path.suffix == ".safetensors"]
    small = [
        path
        for path in directory.iterdir()
        if path.suffix in {".json", ".txt", ".model"}
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
    """Hash a file's size, its header and blocks at even distances, the last one included."""
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        start = 0
        if path.suffix == ".safetensors":
            # The format begins with the length of its header: https://huggingface.co/docs/safetensors
            start = 8 + min(int.from_bytes(file.read(8), "little"), _HEADER_LIMIT)
            file.seek(0)
            digest.update(file.read(start))
        body = max(0, size - start)
        if body <= _BLOCK * _BLOCKS:
            digest.update(file.read())
        else:
            for number in range(_BLOCKS):
                file.seek(start + (body - _BLOCK) * number // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.digest()
