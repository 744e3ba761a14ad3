"""Rerankers of many families give the numbers of sentence-transformers, or of the code on their model card."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder, SentenceTransformer
from structlog.testing import capture_logs
from transformers import AutoTokenizer

from reranker_service.models import (
    ModelSpec,
    PairLayout,
    TextLayout,
    UnsupportedModelError,
    make_layout,
    read_model,
)
from reranker_service.models.one_by_one import PairByPairLayout
from reranker_service.models.templated import TemplateLayout

from . import families, models, references
from .computing import compute
from .test_engines import TOLERANCE
from .test_model import edit

PAIRS = [*references.pairs(6), ("a query", "short"), ("?", "Is it?\n"), ("a  query\n", " a document \n\n")]
# Of a longer query the library cuts the texts of the template.
SHORT = [(query, document) for query, document in PAIRS if len(query) < 100]
WHOLE = [(query, document) for query, document in SHORT if len(document) < 1000]
LONG = [("a query", "A document that is far too long. " * 60), ("why?", "x1 " * 400)]


def score(spec: ModelSpec, layout: PairLayout, pairs: list[tuple[str, str]], **options: Any) -> NDArray[np.float32]:
    """Raw scores of pairs: the engine's for the layout's inputs."""
    instruction, length = options.pop("instruction", None), options.pop("max_length", spec.default_length)
    if instruction is None:
        instruction = layout.default_instruction  # as the servicer does
    queries = layout.encode_queries([query for query, _ in pairs], instruction, length)
    inputs = layout.join(queries, layout.encode_documents([document for _, document in pairs], length), length)

    return compute(spec, inputs, **options)


def pair_layout(spec: ModelSpec) -> PairLayout:
    layout = make_layout(spec)
    assert isinstance(layout, PairLayout)
    return layout


def library_scores(model: Path, pairs: list[tuple[str, str]], **options: Any) -> NDArray[np.float32]:
    encoder = CrossEncoder(str(model), device="cpu")
    if (length := options.pop("max_length", None)) is not None:
        encoder.max_seq_length = length
    options = {"activation_fn": torch.nn.Identity(), "batch_size": 4, **options}
    return np.asarray(encoder.predict(pairs, **options))


def assert_equal(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
    assert wanted.std() > 0.01
    scale = max(1.0, float(np.abs(wanted).max()))
    assert np.abs(found - wanted).max() < TOLERANCE * scale


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "gemma", "gemma2", "gpt2"])
def test_a_logit_score_gives_the_numbers_of_the_library(model_type: str, tmp_path: Path) -> None:
    template = families.PLAIN_TEMPLATE if model_type.startswith("gemma") else families.QWEN_TEMPLATE
    answers = ("Yes", None) if model_type == "gemma" else ("yes", "no")
    model = families.build_logit_score(tmp_path, model_type, template, answers)
    spec = read_model(str(model))
    layout = pair_layout(spec)
    assert (spec.kind, spec.max_length) == ("causal-reranker", 256)
    # In the library, scores of GPT-2 depend on the padding.
    wanted = library_scores(model, SHORT + LONG, batch_size=1 if model_type == "gpt2" else 4)
    assert_equal(score(spec, layout, SHORT + LONG), wanted)


@pytest.mark.parametrize("template", ["QWEN_TEMPLATE", "PLAIN_TEMPLATE"])
def test_a_chat_template_is_joined_from_the_tokens_of_its_texts(template: str, tmp_path: Path) -> None:
    model = families.build_logit_score(tmp_path, template=getattr(families, template))
    spec = read_model(str(model))
    with capture_logs() as events:
        layout = pair_layout(spec)
    assert type(layout) is TemplateLayout
    assert layout.template == "chat-template"
    assert not [event for event in events if event["log_level"] == "warning"]
    least = layout.smallest_length(None)
    for length in (least + 8, least + 25):
        wanted = library_scores(model, LONG, max_length=length)
        assert_equal(score(spec, layout, LONG, max_length=length), wanted)


def test_a_template_that_changes_its_texts_is_rendered_pair_by_pair(tmp_path: Path) -> None:
    model = families.build_logit_score(tmp_path, template=families.TRIMMED_TEMPLATE)
    spec = read_model(str(model))
    with capture_logs() as events:
        layout = pair_layout(spec)
    assert type(layout) is PairByPairLayout
    (event,) = [event for event in events if event["log_level"] == "warning"]
    assert "pair by pair" in event["event"]
    assert_equal(score(spec, layout, PAIRS + LONG), library_scores(model, PAIRS + LONG))


def test_an_instruction_is_the_system_message(tmp_path: Path) -> None:
    prompts = {"task": "Which document has the answer?"}
    model = families.build_logit_score(tmp_path, prompts=prompts, default_prompt_name="task")
    spec = read_model(str(model))
    layout = pair_layout(spec)
    assert layout.default_instruction == prompts["task"]
    assert_equal(score(spec, layout, SHORT), library_scores(model, SHORT))
    other = "Wo steht die {Antwort}?\n"
    assert_equal(score(spec, layout, SHORT, instruction=other), library_scores(model, SHORT, prompt=other))
    plain = score(spec, layout, SHORT, instruction="")
    assert_equal(plain, library_scores(model, SHORT, prompt=""))
    overridden = read_model(str(model), prompts={"task": other})
    assert_equal(score(overridden, pair_layout(overridden), SHORT), library_scores(model, SHORT, prompt=other))


def test_a_query_without_room_for_its_document_keeps_the_template(tmp_path: Path) -> None:
    model = families.build_logit_score(tmp_path)
    spec = read_model(str(model))
    layout = pair_layout(spec)
    length = layout.smallest_length(None) + 10
    (query,) = layout.encode_queries(["word " * 200], None, length)
    (joined,) = layout.join([query], layout.encode_documents(["a document " * 50], length), length)
    text = AutoTokenizer.from_pretrained(model).decode(joined.ids)
    assert len(joined.ids) == length
    assert "<Query>: word word" in text
    assert "\n<Document>: a document" in text
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "gemma", "gpt2"])
def test_a_classifier_of_a_decoder_gives_the_numbers_of_the_library(model_type: str, tmp_path: Path) -> None:
    model = families.build_classifier(tmp_path, model_type)
    spec = read_model(str(model))
    assert (spec.kind, spec.library_model) == ("cross-encoder", True)
    layout = pair_layout(spec)
    assert not isinstance(layout, PairByPairLayout)
    pairs, options = PAIRS + LONG, {}
    if model_type == "gpt2":
        # Padding at the left shifts its absolute positions, so that the library's scores depend on the batch. Two empty
        # texts have no tokens, which the library cannot score alone.
        pairs, options = [pair for pair in pairs if any(pair)], {"batch_size": 1}
    assert_equal(score(spec, layout, pairs), library_scores(model, pairs, **options))


# Of inputs without tokens, EuroBERT's attention makes NaN; the third has no padding.
@pytest.mark.parametrize("model_type", ["llama", "eurobert", "llama without padding"])
def test_two_empty_texts_have_a_score_that_depends_on_no_other_pair(model_type: str, tmp_path: Path) -> None:
    model = families.build_classifier(tmp_path, model_type.split()[0])
    if "without" in model_type:
        edit(model / "config.json", pad_token_id=None)
    spec = read_model(str(model))
    layout = pair_layout(spec)
    alone = score(spec, layout, [("", "")])
    assert np.isfinite(alone).all()
    assert np.abs(score(spec, layout, [("", ""), *WHOLE])[0] - alone[0]) < TOLERANCE


def test_a_classifier_of_encoder_and_decoder_gives_the_numbers_of_the_library(tmp_path: Path) -> None:
    model = families.build_bart_classifier(tmp_path)
    spec = read_model(str(model))
    # The library refuses a batch if some of its texts have end tokens in them.
    assert_equal(score(spec, pair_layout(spec), PAIRS + LONG), library_scores(model, PAIRS + LONG, batch_size=1))


def test_settings_that_the_library_saves_hold_for_a_classifier(tmp_path: Path) -> None:
    plain = models.build_roberta_cross_encoder(tmp_path / "plain")
    model = tmp_path / "saved"
    CrossEncoder(str(plain), device="cpu").save_pretrained(str(model))
    edit(model / "sentence_bert_config.json", max_seq_length=48, do_lower_case=True)
    spec = read_model(str(model))
    assert (spec.library_model, spec.default_length, spec.lower_case) == (False, 48, True)
    wanted = library_scores(model, PAIRS + LONG)
    assert_equal(score(spec, pair_layout(spec), PAIRS + LONG), wanted)
    assert np.abs(wanted - library_scores(plain, PAIRS + LONG)).max() > 0.01


def test_other_chains_give_the_numbers_of_the_library(tmp_path: Path) -> None:
    model = families.build_decoder_chain(tmp_path)
    spec = read_model(str(model))
    assert_equal(score(spec, pair_layout(spec), PAIRS + LONG), library_scores(model, PAIRS + LONG))


@pytest.mark.parametrize("build", [families.build_dense_bi_encoder, families.build_t5_bi_encoder])
def test_other_bi_encoders_give_the_numbers_of_the_library(build: Callable[[Path], Path], tmp_path: Path) -> None:
    model = build(tmp_path)
    spec = read_model(str(model))
    layout = make_layout(spec)
    assert isinstance(layout, TextLayout)
    assert spec.hidden_size == 24
    queries, documents = [query for query, _ in PAIRS], [document for _, document in PAIRS]
    encoded = [*layout.encode_queries(queries, None), *layout.encode_documents(documents)]
    inputs = [layout.single(one, spec.default_length)[0] for one in encoded]

    reference = SentenceTransformer(str(model), device="cpu")
    wanted = np.concatenate(
        [
            reference.encode_query(queries, normalize_embeddings=True),
            reference.encode_document(documents, normalize_embeddings=True),
        ]
    )
    assert np.abs(compute(spec, inputs) - wanted).max() < TOLERANCE


def test_mxbai_rerank_v2(tmp_path: Path) -> None:
    model = families.build_causal(tmp_path, "qwen2", max_position_embeddings=1024)
    spec = read_model(str(model), family="mxbai-rerank-v2")
    layout = pair_layout(spec)
    texts = [*SHORT, *LONG]
    assert layout.default_instruction == ""
    assert_equal(score(spec, layout, WHOLE), references.mxbai_logits(model, WHOLE))
    task = "Find the answer."
    wanted = references.mxbai_logits(model, WHOLE, task)
    assert_equal(score(spec, layout, WHOLE, instruction=task), wanted)
    # The model card's limit does not count the template.
    template = layout.smallest_length(None) - 2 - len(layout._between) - layout.encode_queries([""], None)[0].head
    wanted = references.mxbai_logits(model, texts, None, 100)
    assert_equal(score(spec, layout, texts, max_length=100 + template), wanted)


def test_bge_reranker_v2_gemma(tmp_path: Path) -> None:
    model = families.build_causal(tmp_path, "gemma", max_position_embeddings=1024)
    spec = read_model(str(model), family="bge-reranker-v2-gemma")
    layout = pair_layout(spec)
    texts = [*SHORT, *LONG]
    assert layout.default_instruction is None
    assert_equal(score(spec, layout, WHOLE), references.bge_gemma_logits(model, WHOLE))
    question = len(layout._suffix)
    assert_equal(score(spec, layout, texts, max_length=100 + question), references.bge_gemma_logits(model, texts, 100))


def test_a_bare_causal_model_is_served_only_if_its_family_is_known(tmp_path: Path) -> None:
    model = families.build_causal(tmp_path / "model", "qwen3")
    message = "generates text, and nothing in its files says that it is a reranker.*LogitScore.*--family qwen3-reranker"
    with pytest.raises(UnsupportedModelError, match=message):
        read_model(str(model))
    named = read_model(str(model), family="qwen3-reranker")
    assert (named.kind, named.family) == ("causal-reranker", "qwen3-reranker")
    edit(model / "config.json", reranker_family="qwen3-reranker")
    assert replace(read_model(str(model)), name=named.name) == named
    edit(model / "config.json", reranker_family="nonsense")
    with pytest.raises(UnsupportedModelError, match="reranker_family 'nonsense', which is unknown; known are qwen3-"):
        read_model(str(model))
    with pytest.raises(UnsupportedModelError, match="models of the family mxbai-rerank-v2 are Qwen2ForCausalLM"):
        read_model(str(model), family="mxbai-rerank-v2")
    with pytest.raises(UnsupportedModelError, match="--kind bi-encoder, but its family qwen3-reranker is of the kind"):
        read_model(str(model), "bi-encoder", family="qwen3-reranker")
    with pytest.raises(UnsupportedModelError, match="--family 'bert' is unknown; known are qwen3-reranker, mxbai"):
        read_model(str(model), family="bert")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "encoder and decoder.*not supported"),
        (
            {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"], "vision_config": {}},
            "reads images or sound beside texts, which is not supported",
        ),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "generates text, and nothing in its files"),
        (
            {"model_type": "qwen2", "architectures": ["Qwen2ForSequenceClassification"], "num_labels": 3},
            "3 labels; a reranker has one",
        ),
        (
            {"model_type": "own", "architectures": ["OwnModel"], "auto_map": {"AutoConfig": "own.Config"}},
            "only with --trust-remote-code",
        ),
    ],
    ids=["t5", "images", "chat", "labels", "code"],
)
def test_other_models_are_refused_by_their_configuration(
    settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    models.qwen_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModelError, match=message):
        read_model(str(tmp_path))


def test_modules_that_give_no_single_number_are_refused_at_start(tmp_path: Path) -> None:
    model = families.build_decoder_chain(tmp_path)
    dense = next(model.glob("*_Dense")) / "config.json"
    edit(dense, module_output_name="other")
    with pytest.raises(
        UnsupportedModelError, match="a chain that makes a score has a Pooling, and a Dense with module_"
    ):
        read_model(str(model))
    (model / "modules.json").write_text(json.dumps(json.loads((model / "modules.json").read_text())[:2]))
    spec = replace(read_model(str(families.build_decoder_chain(tmp_path / "right"))), path=model, root=model)
    with pytest.raises(UnsupportedModelError, match="its modules give no scores"):
        score(spec, pair_layout(spec), PAIRS)
