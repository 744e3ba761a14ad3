"""The head computes in float32 whatever the backbone's format, so that distinct documents get distinct scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from reranker_service.models import make_layout, read_model
from tests import families, models
from tests.computing import compute
from tests.test_chain import build as build_chain

DOCUMENTS = [f"Document {number} is about {'many ' * (number % 7)}things." for number in range(150)]
ENCODERS = sorted(models.OTHER_ENCODERS)
MODELS: dict[str, Callable[[Path], Path]] = {
    "bert": models.build_bert_cross_encoder,
    "xlm-roberta": models.build_xlm_roberta_cross_encoder,
    **{one: lambda path, one=one: models.build_other_cross_encoder(path, one) for one in ENCODERS},  # type: ignore[misc]
    "chain": build_chain,
    "qwen3 reranker": models.build_qwen3_reranker,
    "gemma2 answers": lambda path: families.build_logit_score(path, "gemma2", families.PLAIN_TEMPLATE),
    "llama classifier": lambda path: families.build_classifier(path, "llama"),
    "decoder chain": families.build_decoder_chain,
}


def scores(model: Path, dtype: str) -> NDArray[np.float32]:
    """Raw scores of one query with all documents."""
    spec = read_model(str(model))
    layout: Any = make_layout(spec)
    queries = layout.encode_queries(["a query"] * len(DOCUMENTS), layout.default_instruction)
    inputs = layout.join(queries, layout.encode_documents(DOCUMENTS), spec.default_length)

    return compute(spec, inputs, dtype=dtype, device="cpu")


@pytest.mark.parametrize("name", MODELS)
def test_distinct_documents_do_not_tie_in_16_bits(name: str, tmp_path: Path) -> None:
    model = MODELS[name](tmp_path)
    exact, found = scores(model, "float32"), scores(model, "bfloat16")
    assert len(np.unique(exact)) > 148, "the test's documents must have distinct scores"
    assert len(np.unique(found)) > 145
    assert np.abs(found - exact).mean() < 0.2 * exact.std() + 0.02
