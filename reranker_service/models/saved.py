"""Saved settings: reads what sentence-transformers saves beside the weights, for the description of the model."""

from __future__ import annotations

from typing import Any

from .hub import ModelFiles
from .spec import SavedSettings

_ACTIVATIONS = {"Sigmoid": "sigmoid", "Identity": "identity"}
_SIMILARITIES = ("cosine", "dot")


def saved_settings(files: ModelFiles) -> SavedSettings:
    """Read the settings in the model's own files; what they do not name, or not in a known form, is left out."""
    family = files.family
    prompts = family.get("prompts")
    prompts = prompts if isinstance(prompts, dict) else {}
    default = family.get("default_prompt_name")
    similarity = family.get("similarity_fn_name")
    return SavedSettings(
        activation=_activation(files),
        prompts={str(name): prompt for name, prompt in prompts.items() if isinstance(prompt, str)},
        default_prompt_name=default if isinstance(default, str) else None,
        similarity=similarity if similarity in _SIMILARITIES else None,
    )


def _activation(files: ModelFiles) -> str | None:
    """The activation function, from the places where versions of sentence-transformers look for it, newest first."""
    older: Any = getattr(files.config, "sentence_transformers", None)
    named = (
        files.family.get("activation_fn"),
        older.get("activation_fn") if isinstance(older, dict) else None,
        getattr(files.config, "sbert_ce_default_activation_function", None),
    )
    path = next((one for one in named if isinstance(one, str)), "")
    return _ACTIVATIONS.get(path.rpartition(".")[2]) if path.startswith("torch.") else None
