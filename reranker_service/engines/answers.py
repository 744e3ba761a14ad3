"""Answers: scores of a causal language model from the logits of one or two tokens at its last position."""

from __future__ import annotations

from typing import Any

import structlog
import torch

# Settings of models that change the logits after the output embedding.
_CHANGED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
# Relative to the largest logit. In 16 bits the same product differs by rounding from one shape of the batch to another.
_TOLERANCE, _TOLERANCE_16_BITS = 1e-4, 0.05

log = structlog.get_logger()


def answer_head(model: Any, answers: tuple[int, int | None]) -> torch.Tensor | None:
    """A vector whose product with the last token's vector is the score, float32, shape ``(hidden,)``.

    It spares the logits of all other tokens. ``None`` if the model does more between the two; this is tried with one
    input.

    Args:
        model: A causal language model of transformers.
        answers: Token ids; see ``ModelSpec.answers``.
    """
    outputs = model.get_output_embeddings()
    config = model.config.get_text_config()
    if not isinstance(outputs, torch.nn.Linear) or outputs.bias is not None:
        return None
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in _CHANGED_LOGITS):
        return None
    first, second = answers
    head = outputs.weight[first].float()
    if second is not None:
        head = head - outputs.weight[second].float()
    ids = torch.arange(12, device=head.device)[None] % len(outputs.weight)
    with torch.inference_mode():
        hidden = model.base_model(input_ids=ids).last_hidden_state[0, -1]
        wanted = outputs(hidden)
        found = model(input_ids=ids).logits[0, -1]
        difference = (found - wanted).abs().max()
        scale = wanted.abs().max().clamp(min=1)
    tolerance = _TOLERANCE if outputs.weight.dtype == torch.float32 else _TOLERANCE_16_BITS
    return head if difference <= tolerance * scale else None


class _AnswerLogits(torch.nn.Module):
    """Output embedding that has the answers' rows only, and computes in float32."""

    def __init__(self, outputs: torch.nn.Linear, rows: list[int]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(outputs.weight.detach()[rows].float(), requires_grad=False)
        self.bias = None
        if outputs.bias is not None:
            self.bias = torch.nn.Parameter(outputs.bias.detach()[rows].float(), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden.float(), self.weight, self.bias)


def narrow_to_answers(model: Any, answers: tuple[int, int | None]) -> tuple[int, int | None]:
    """Let a causal language model compute the answers' logits only, in float32 whatever its format.

    The model stays as it is if that would change its logits; this is tried with one input.

    Args:
        model: A causal language model of transformers; changed in place.
        answers: Token ids; see ``ModelSpec.answers``.

    Returns:
        The answers' places among the logits that the model gives from now on.
    """
    outputs = model.get_output_embeddings()
    if not isinstance(outputs, torch.nn.Linear):
        return answers
    rows = [one for one in answers if one is not None]
    ids = torch.arange(12, device=outputs.weight.device)[None] % len(outputs.weight)
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits[0, -1].float()
        model.set_output_embeddings(_AnswerLogits(outputs, rows))
        try:
            found = model(input_ids=ids).logits[0, -1]
            tolerance = _TOLERANCE if outputs.weight.dtype == torch.float32 else _TOLERANCE_16_BITS
            scale = wanted.abs().max().clamp(min=1)
            if found.shape == (len(rows),) and bool((found - wanted[rows]).abs().max() <= tolerance * scale):
                return 0, None if answers[1] is None else 1
        except (RuntimeError, IndexError, ValueError, TypeError):
            log.debug("the model's code needs the logits of all tokens")
    model.set_output_embeddings(outputs)
    return answers


def answer_scores(model: Any, answers: tuple[int, int | None], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scores from the model's own logits, shape ``(n,)``, of inputs that are padded at their end.

    The padding is moved to the beginning, so that only the last position's logits are computed.

    Args:
        model: A causal language model of transformers.
        answers: Places of the answers' logits; see ``narrow_to_answers``.
        ids: Token ids, shape ``(n, longest)``.
        mask: 1 for tokens and 0 for padding, shape ``(n, longest)``.
    """
    longest = ids.shape[1]
    shifts = longest - mask.sum(dim=1, keepdim=True)  # (n, 1)
    sources = (torch.arange(longest, device=ids.device)[None] - shifts) % longest
    mask = mask.gather(1, sources)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids.gather(1, sources), attention_mask=mask, position_ids=positions, logits_to_keep=1
    ).logits[:, -1]
    first, second = answers
    scores: torch.Tensor = logits[:, first].float()
    return scores if second is None else scores - logits[:, second].float()
