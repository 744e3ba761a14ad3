"""Files of a model: finds them in a directory or downloads them from the hub, and reads their settings.

No weights are loaded here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .spec import UnsupportedModelError
from .tokenizer import load_tokenizer

# Imported late, because the import of transformers takes seconds: the server answers probes and finds a wrong path
# before it.
if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "pytorch_model*.bin"]


@dataclass(frozen=True)
class ModelFiles:
    """Settings in a model's directory.

    Attributes:
        model: The name or directory that the user gave; error messages begin with it.
        root: The model's directory.
        path: The directory with configuration, weights and tokenizer: ``root`` or a folder in it.
        modules: Class name and folder of each sentence-transformers module; empty for a plain transformers model.
        family: Settings of the whole model, as sentence-transformers saved them.
        config: The configuration of the transformers model.
        architecture: The class that the weights were saved from.
        tokenizer: The model's fast tokenizer.
    """

    model: str
    root: Path
    path: Path
    modules: list[tuple[str, str]]
    family: dict[str, Any]
    config: PreTrainedConfig
    architecture: str
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def read(cls, model: str) -> ModelFiles:
        """Read a directory, or a model that is downloaded from the hub.

        Raises:
            UnsupportedModelError: There is no such model, or one of its files can't be used.
        """
        root = _directory(model)
        modules = _modules(root)
        path = root / modules[0][1] if modules else root
        config = _config(path)
        family = read_json(root / "config_sentence_transformers.json")
        architecture = (config.architectures or ["a model of unknown architecture"])[0]
        return cls(model, root, path, modules, family, config, architecture, load_tokenizer(path))

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


def _directory(model: str) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise UnsupportedModelError(f"{model!r} is neither a directory nor a hub name of the form 'owner/model'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise UnsupportedModelError(
            f"{model!r} is no directory, and its download from the hub failed ({type(error).__name__}: {error}); if "
            "the hub cannot be reached, give the directory of a downloaded model"
        ) from error


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


def _modules(root: Path) -> list[tuple[str, str]]:
    """Class name and folder of each sentence-transformers module; empty for a plain transformers model."""
    path = root / "modules.json"
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        modules = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(f"modules.json can't be read: {error!r}") from error
    if not modules or modules[0][0] != "Transformer":
        first = modules[0][0] if modules else "nothing"
        raise UnsupportedModelError(f"modules.json begins with {first}; the first module must be Transformer")
    return modules


def _config(path: Path) -> PreTrainedConfig:
    if not (path / "config.json").is_file():
        raise UnsupportedModelError(
            f"{path.name} holds no config.json; give the directory of a model that transformers saved"
        )
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(f"{path.name}: its config.json can't be used: {error}") from error
    return cast("PreTrainedConfig", config)
