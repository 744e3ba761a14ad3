"""Arguments for vLLM that the settings pass through are checked before vLLM starts."""

from __future__ import annotations

import re

import pytest

from reranker_service.engines.vllm_arguments import check_arguments, with_given
from reranker_service.models import UnsupportedModelError

KNOWN = {"tensor_parallel_size", "data_parallel_size", "enable_lora", "quantization", "dtype", "max_model_len"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tensor_paralel_size": 2}, "no argument tensor_paralel_size; did you mean tensor_parallel_size?"),
        ({"xyz": 2}, "no argument xyz; see vLLM's engine arguments"),
        ({"dtype": "float16"}, "dtype is set by the flag --dtype"),
        ({"enable_lora": True}, "enable_lora would have no effect"),
        ({"tensor_parallel_size": "2"}, "tensor_parallel_size must be a whole number of at least 1, not '2'"),
        ({"tensor_parallel_size": 0}, "at least 1, not 0"),
        ({"tensor_parallel_size": 2, "data_parallel_size": 2}, "needs 4 GPUs, and vLLM sees 2"),
    ],
)
def test_arguments_that_vllm_would_fail_on_or_ignore_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        check_arguments(given, KNOWN, 2)


def test_good_arguments_pass() -> None:
    check_arguments({"tensor_parallel_size": 2, "quantization": "fp8", "max_model_len": 512}, KNOWN, 2)
    check_arguments({"tensor_parallel_size": 2}, KNOWN, None)


def test_overrides_of_the_settings_do_not_drop_those_that_the_score_needs() -> None:
    chosen = {"hf_overrides": {"classifier_from_token": ["no", "yes"], "head_dtype": "float32"}, "max_model_len": 1}
    merged = with_given(chosen, {"hf_overrides": {"head_dtype": "model"}, "max_model_len": 2})
    assert merged == {
        "hf_overrides": {"classifier_from_token": ["no", "yes"], "head_dtype": "model"},
        "max_model_len": 2,
    }
