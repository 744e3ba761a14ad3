"""Files of a model: finds them in a directory or downloads them from the hub, and reads their settings.

No weights are loaded here. From the hub the settings come first, and the weights after the model was judged by them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .spec import UnsupportedModelError
from .tokenizer import load_tokenizer

# Imported late, because the import of transformers takes seconds: the server answers probes and finds a wrong path
# before it.
if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_SETTINGS = ["*.json", "*.txt", "*.model", "*.jinja"]
_OF_A_MODEL = frozenset({".json", ".txt", ".model", ".jinja", ".safetensors", ".bin", ".py"})
_OTHER_FORMATS = ["onnx/*", "openvino/*", "original/*", "consolidated*"]


@dataclass(frozen=True)
class ModelFiles:
    """Settings in a model's directory.

    Attributes:
        model: The name or directory that the user gave; error messages begin with it.
        root: The model's directory.
        path: The directory with configuration, weights and tokenizer: ``root`` or a folder in it.
        modules: Name and folder of each sentence-transformers module; empty for a plain transformers model. The name
            of a class of the library has no dots; that of a class of the model's own code is "file.Class".
        family: Settings of the whole model, as sentence-transformers saved them.
        config: The configuration of the transformers model.
        architecture: The class that the weights were saved from.
        tokenizer: The model's fast tokenizer.
        trust_remote_code: Whether Python code in the model's directory may run.
        revision: Branch, tag or commit of a model on the hub; ``None`` for the main branch.
    """

    model: str
    root: Path
    path: Path
    modules: list[tuple[str, str]]
    family: dict[str, Any]
    config: PreTrainedConfig
    architecture: str
    tokenizer: PreTrainedTokenizerBase

    trust_remote_code: bool = False
    revision: str | None = None

    @classmethod
    def read(cls, model: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelFiles:
        """Read a directory, or the settings of a model that are downloaded from the hub.

        Raises:
            UnsupportedModelError: There is no such model, or one of its files can't be used.
        """
        root = _directory(model, revision, _SETTINGS + ["*.py"] * trust_remote_code)
        modules = _modules(root, trust_remote_code)
        path = root / modules[0][1] if modules else root
        if trust_remote_code:
            _fetch_code(path)
        config = _config(path, trust_remote_code)
        family = read_json(root / "config_sentence_transformers.json")
        architecture = (config.architectures or ["a model of unknown architecture"])[0]
        if reason := _unsupported(config, architecture, bool(modules)):
            raise UnsupportedModelError(f"{model}: {reason}")
        tokenizer = load_tokenizer(path, trust_remote_code)
        return cls(model, root, path, modules, family, config, architecture, tokenizer, trust_remote_code, revision)

    def fetch_weights(self) -> None:
        """Download the weights of a model on the hub, each file once: no ``.bin`` beside a ``.safetensors``.

        Raises:
            UnsupportedModelError: The hub cannot be reached.
        """
        if Path(self.model).expanduser().is_dir():
            return
        from huggingface_hub import list_repo_files
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        try:
            names = list_repo_files(self.model, revision=self.revision)
        except (OSError, HfHubHTTPError, OfflineModeIsEnabled):
            # Without the hub, the files that an earlier download left are all that there is.
            names = [str(path.relative_to(self.root)) for path in self.root.rglob("*")]
        _directory(self.model, self.revision, weights_of(names))

    def refuse(self, reason: str) -> UnsupportedModelError:
        """Make the error that refuses this model."""
        return UnsupportedModelError(f"{self.model}: {reason}")

    def need_modules(self, known: set[str]) -> None:
        """Raise ``UnsupportedModelError`` for a sentence-transformers module that is not among ``known``."""
        names = [name for name, _ in self.modules]
        if set(names) - known or names.count("Transformer") > 1:
            supported = ", ".join(sorted(known))
            raise self.refuse(f"modules.json names {', '.join(names)}; a model of this kind may have only {supported}")

    def need_one_label(self) -> None:
        """Raise ``UnsupportedModelError`` for a classifier of several labels."""
        if self.config.num_labels != 1:
            raise self.refuse(f"a classifier with {self.config.num_labels} labels; a reranker has one (num_labels = 1)")


def weights_of(names: Iterable[str]) -> list[str]:
    """Files of weights to download: in each folder those in safetensors, or without any those of torch.

    Args:
        names: Files of a repository, with their folders.
    """
    folders: dict[str, list[str]] = {}
    for name in names:
        if not any(fnmatch(name, pattern) for pattern in _OTHER_FORMATS):
            folders.setdefault(name.rpartition("/")[0], []).append(name)
    found = []
    for files in folders.values():
        safe = [name for name in files if name.endswith(".safetensors")]
        found += safe or [name for name in files if fnmatch(name.rpartition("/")[2], "pytorch_model*.bin")]
    return sorted(found)


def _directory(model: str, revision: str | None, patterns: list[str]) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UnsupportedModelError(
                f"--revision {revision} is for a model on the hub, and {model!r} is a directory"
            )
        _check_readable(path)
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise UnsupportedModelError(f"{model!r} is neither a directory nor a hub name of the form 'owner/model'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise UnsupportedModelError(
            f"{model!r} is no directory, and its download from the hub failed ({type(error).__name__}: {error}); if "
            "the hub cannot be reached, give the directory of a downloaded model"
        ) from error


def _check_readable(directory: Path) -> None:
    """Refuse a directory with a file that this process may not read: the libraries would say that there is none."""
    for path in directory.rglob("*"):
        if path.suffix in _OF_A_MODEL and path.is_file() and not os.access(path, os.R_OK):
            raise UnsupportedModelError(
                f"{path} can't be read by the user of this process (save_pretrained writes weights for their owner "
                "alone); let every user read it: chmod a+r"
            )


def _unsupported(config: PreTrainedConfig, architecture: str, has_modules: bool) -> str | None:
    """The reason for which a model is refused before its tokenizer is loaded; ``None`` if there is none."""
    if any(hasattr(config, name) for name in ("vision_config", "audio_config")):
        return (
            f"{architecture} reads images or sound beside texts, which is not supported; a reranker that reads texts "
            "only is needed"
        )
    classifies = architecture.endswith("ForSequenceClassification")
    if getattr(config, "is_encoder_decoder", False) and not classifies and not has_modules:
        return (
            f"{architecture} is a model of encoder and decoder, such as T5, which is not supported; needed is an "
            "encoder or a decoder whose files say how it scores a pair"
        )
    return None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModelError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{path.name} holds a {type(content).__name__}, not an object")
    return content


def _modules(root: Path, trust_remote_code: bool) -> list[tuple[str, str]]:
    """Name and folder of each sentence-transformers module; see ``ModelFiles.modules``."""
    path = root / "modules.json"
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        modules = [(_module_name(str(entry["type"])), str(entry["path"])) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(f"modules.json can't be read: {error!r}") from error
    if not modules or modules[0][0] != "Transformer":
        first = modules[0][0] if modules else "nothing"
        raise UnsupportedModelError(
            f"modules.json begins with {first}; the first module must be the Transformer of sentence-transformers"
        )
    foreign = [name for name, _ in modules if "." in name]
    if foreign and not trust_remote_code:
        raise UnsupportedModelError(
            f"modules.json names {', '.join(foreign)}, which is Python code of the model; it runs only with "
            "--trust-remote-code"
        )
    return modules


def _module_name(reference: str) -> str:
    """Class name of a module of sentence-transformers; the whole reference of any other."""
    return reference.rpartition(".")[2] if reference.startswith("sentence_transformers.") else reference


def _fetch_code(path: Path) -> None:
    """Download the Python code that config.json names in other repositories; transformers reads it from the cache.

    Raises:
        UnsupportedModelError: The hub cannot be reached, and the cache lacks the code.
    """
    named = read_json(path / "config.json").get("auto_map") or {}
    references = [str(one) for value in named.values() for one in (value if isinstance(value, list) else [value])]
    for repository in sorted({one.partition("--")[0] for one in references if "--" in one}):
        _directory(repository, None, ["*.py"])


def _config(path: Path, trust_remote_code: bool) -> PreTrainedConfig:
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise UnsupportedModelError(
                f"{path.name} is a PEFT adapter; serve its base model, with this directory as --adapter"
            )
        raise UnsupportedModelError(
            f"{path.name} holds no config.json; give the directory of a model that transformers saved"
        )
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if not trust_remote_code and '"auto_map"' in (path / "config.json").read_text(encoding="utf-8"):
            # The library's message names an argument of its own functions.
            raise UnsupportedModelError(
                f"{path.name}: its config.json can't be used without Python code that the model brings along, which "
                "runs only with --trust-remote-code"
            ) from error
        raise UnsupportedModelError(f"{path.name}: its config.json can't be used: {error}") from error
    return cast("PreTrainedConfig", config)
