"""Chain: the modules of a sentence-transformers CrossEncoder that make a score from a transformer's token vectors.

The library loads and runs the modules, in float32 whatever the transformer's format.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from ..models import ModelSpec, UnsupportedModelError
from .packed import Packed


class ModuleChain(torch.nn.Module):
    """Maps token vectors to scores."""

    def __init__(self, spec: ModelSpec) -> None:
        """Load the modules.

        Raises:
            UnsupportedModelError: sentence-transformers is not installed, or a module cannot be loaded.
        """
        super().__init__()
        try:
            from sentence_transformers import CrossEncoder
        except ImportError as error:
            raise UnsupportedModelError(
                f"{spec.name}: its score comes from modules of sentence-transformers, which is not installed; "
                "pip install sentence-transformers"
            ) from error
        try:
            # The whole model, because the library alone knows which classes its modules are. Its transformer is
            # dropped: the engine has loaded it with a check of the weights.
            model = CrossEncoder(str(spec.root), device="cpu", local_files_only=True, trust_remote_code=False)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UnsupportedModelError(f"{spec.name}: a module of its chain cannot be loaded: {error}") from error
        self._modules_in_order = torch.nn.ModuleList(list(model)[1:]).float().eval().requires_grad_(False)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Scores, shape ``(n,)``, of token vectors ``(n, longest, hidden)`` with their mask ``(n, longest)``."""
        return self._scores({"token_embeddings": tokens.float(), "attention_mask": mask})

    def packed(self, tokens: torch.Tensor, batch: Packed) -> torch.Tensor:
        """Scores, shape ``(n,)``, of the token vectors of a packed batch, shape ``(T, hidden)``."""
        return self._scores(
            {
                "token_embeddings": tokens.float()[None],
                "cu_seq_lens_q": batch.bounds,
                "seq_idx": batch.owners[None],
            }
        )

    def _scores(self, features: dict[str, Any]) -> torch.Tensor:
        for module in self._modules_in_order:
            features = module(features)
        return cast(torch.Tensor, features["scores"][:, 0])
