"""Token ids joined from parts equal the ids that the model's own tokenizer gives for the whole."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from reranker_service.models import (
    EncodedText,
    NoRoomError,
    PairLayout,
    TextLayout,
    TokenSequence,
    UnsupportedModelError,
    make_layout,
    read_model,
)

from . import models
from .references import CARD_INSTRUCTION, CARD_PREFIX, CARD_SUFFIX, ODD_PAIRS, causal_ids

PIECES = [
    *(" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200b", "\ufeff"),
    *("a", "the", "The", "query", "Document", "ness", "yes", "no", "don't", "'s", "1", "2024", "٣", "x" * 30),
    *(".", "?", "!", ":", ";", ",", "-", "_", "<", ">", "</", "...", "?\n", "(", "``"),
    *(
        "é",
        "e\u0301",
        "\u0301",
        "\u0338",
        "Å",
        "ﬁ",
        "Ａ",
        "한",
        "\u1112\u1161\u11ab",
        "नि",
        "日本",
        "Москва",
        "😀",
        "👩‍👧",
        "İ",
    ),
    *("<|im_end|>", "<|im_start|>", "<think>", "[SEP]", "[PAD]", "</s>", "<s>", "<mask>", "▁", "Ġ", "\n<Document>:"),
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=90).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join),
    st.text(max_size=40),
)
# Each example gives up to 16 pairs: about 2,500 pairs for each tokenizer, each with and without truncation.
FEW = st.lists(TEXTS, min_size=1, max_size=4)
PROPERTY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

CROSS_ENCODERS = {
    "wordpiece": models.build_bert_cross_encoder,
    "unigram": models.build_xlm_roberta_cross_encoder,
    "byte-level": models.build_roberta_cross_encoder,
}


@pytest.fixture(scope="module", params=CROSS_ENCODERS)
def pair_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CROSS_ENCODERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def causal_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build_qwen3_reranker(tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def spm_causal_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal reranker whose tokenizer prepends "▁" to every text and lets tokens span words, like Llama's."""
    directory = models.build_qwen3_reranker(tmp_path_factory.mktemp("spm"))
    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(">", "merged_with_previous")
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", *models.QWEN_SPECIAL], show_progress=False, max_token_length=12
    )
    bodies = [f"<Query>: {text[:60]}\n<Document>: {text[:60]}" for text in models.docstrings()[:300]]
    tokenizer.train_from_iterator(bodies, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.add_tokens([AddedToken("yes", single_word=True), AddedToken("no", single_word=True)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", unk_token="<unk>")
    for old in ("tokenizer.json", "tokenizer_config.json"):
        (directory / old).unlink()
    wrapped.save_pretrained(directory)
    return directory


def pair_layout(model: Path) -> PairLayout:
    layout = make_layout(read_model(str(model)))
    assert isinstance(layout, PairLayout)
    return layout


def text_layout(model: Path) -> TextLayout:
    layout = make_layout(read_model(str(model)))
    assert isinstance(layout, TextLayout)
    return layout


def length_of(layout: PairLayout, query: EncodedText, document: EncodedText) -> int:
    zero = np.zeros(1, dtype=np.int64)
    return int(layout.lengths([query], [document], zero, zero)[0])


def join(
    layout: PairLayout, query: str, document: str, max_length: int, instruction: str | None = None
) -> TokenSequence:
    encoded_query = layout.encode_queries([query], instruction)[0]
    return layout.join([encoded_query], layout.encode_documents([document]), max_length)[0]


def test_joined_pairs_equal_those_of_the_tokenizer(pair_model: Path) -> None:
    layout = pair_layout(pair_model)
    tokenizer = AutoTokenizer.from_pretrained(pair_model)

    @PROPERTY
    @given(queries=FEW, documents=FEW, max_length=st.integers(layout.smallest_length(None), 128))
    def check(queries: list[str], documents: list[str], max_length: int) -> None:
        for query, encoded_query in zip(queries, layout.encode_queries(queries, None), strict=True):
            for document, encoded_document in zip(documents, layout.encode_documents(documents), strict=True):
                for limit in (10**6, max_length):
                    sequence = layout.join([encoded_query], [encoded_document], limit)[0]
                    # A list of one pair: without the list, the tokenizer would take an empty document for no document.
                    whole = tokenizer([(query, document)], truncation="longest_first", max_length=limit)
                    assert sequence.ids.tolist() == whole["input_ids"][0]
                    types = whole.get("token_type_ids", [[0] * len(sequence.ids)])[0]
                    assert [0] * sequence.first_segment + [1] * (len(types) - sequence.first_segment) == types
                    full = len(tokenizer([(query, document)])["input_ids"][0])
                    assert length_of(layout, encoded_query, encoded_document) == full

    check()


def test_pairs_joined_together_equal_pairs_joined_one_by_one(pair_model: Path, causal_model: Path) -> None:
    for model in (pair_model, causal_model):
        check_joined_together(pair_layout(model))


def check_joined_together(layout: PairLayout) -> None:
    limit = layout.smallest_length(None) + 12
    queries = layout.encode_queries(["", "a query", "a long query " * 9], None)
    documents = layout.encode_documents(["a document", "", "a long document " * 9])
    pairs = [(query, document) for query in queries for document in documents]
    together = layout.join(*zip(*pairs, strict=True), limit)
    alone = [layout.join([query], [document], limit)[0] for query, document in pairs]
    assert {length_of(layout, *pair) > limit for pair in pairs} == {False, True}
    for found, expected in zip(together, alone, strict=True):
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.first_segment == expected.first_segment
    assert layout.join([], [], limit) == []
    with pytest.raises(NoRoomError):
        layout.join(*zip(*pairs, strict=True), 1)


def test_joined_causal_pairs_equal_those_of_the_model_card(causal_model: Path) -> None:
    layout = pair_layout(causal_model)
    tokenizer = AutoTokenizer.from_pretrained(causal_model)

    @PROPERTY
    @given(queries=FEW, documents=FEW, instruction=st.one_of(st.none(), TEXTS), spare=st.integers(0, 60))
    def check(queries: list[str], documents: list[str], instruction: str | None, spare: int) -> None:
        encoded_documents = layout.encode_documents(documents)
        for query, encoded_query in zip(queries, layout.encode_queries(queries, instruction), strict=True):
            for document, encoded_document in zip(documents, encoded_documents, strict=True):
                whole = causal_ids(tokenizer, query, document, instruction, 10**6)
                sequence = layout.join([encoded_query], [encoded_document], 10**6)[0]
                assert sequence.ids.tolist() == whole
                assert sequence.first_segment == len(whole) == length_of(layout, encoded_query, encoded_document)
                # The smallest limit that leaves room for the whole query and one token of the document.
                limit = layout.smallest_length(instruction) - layout.smallest_length("") + spare
                limit += len(causal_ids(tokenizer, query, "", "", 10**6))
                if limit > len(encoded_query.ids) + overhead(tokenizer):
                    sequence = layout.join([encoded_query], [encoded_document], limit)[0]
                    assert sequence.ids.tolist() == causal_ids(tokenizer, query, document, instruction, limit)

    check()


def overhead(tokenizer) -> int:
    return sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in (CARD_PREFIX, CARD_SUFFIX))


def test_a_tokenizer_that_joins_the_template_with_a_text_is_refused(spm_causal_model: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="a byte-level tokenizer is needed"):
        make_layout(read_model(str(spm_causal_model)))


def test_truncation_of_a_causal_pair_keeps_the_template(causal_model: Path) -> None:
    layout = pair_layout(causal_model)
    tokenizer = AutoTokenizer.from_pretrained(causal_model)
    prefix = tokenizer.encode(CARD_PREFIX, add_special_tokens=False)
    suffix = tokenizer.encode(CARD_SUFFIX, add_special_tokens=False)
    head = tokenizer.encode(f"<Instruct>: {CARD_INSTRUCTION}\n<Query>:", add_special_tokens=False)
    mark = tokenizer.encode("\n<Document>:", add_special_tokens=False)

    @PROPERTY
    @given(query=TEXTS, document=TEXTS, spare=st.integers(0, 40))
    def check(query: str, document: str, spare: int) -> None:
        encoded_query = layout.encode_queries([query], None)[0]
        encoded_document = layout.encode_documents([document])[0]
        limit = layout.smallest_length(None) + spare
        ids = layout.join([encoded_query], [encoded_document], limit)[0].ids.tolist()
        cut = length_of(layout, encoded_query, encoded_document) > limit
        assert len(ids) <= limit
        assert ids[: len(prefix)] == prefix
        assert ids[len(ids) - len(suffix) :] == suffix
        body = ids[len(prefix) : len(ids) - len(suffix)]
        if cut and len(encoded_query.ids) >= limit - len(prefix) - len(suffix):
            # The query is truncated: the document keeps at least half of the room, or all of its tokens.
            room = limit - len(prefix) - len(suffix) - len(head) - len(mark)
            kept = min(len(encoded_document.ids), room - room // 2)
            text = room - kept
            assert body[: len(head)] == head
            assert body[len(head) : len(head) + text] == encoded_query.ids.tolist()[len(head) : len(head) + text]
            assert body[len(head) + text : len(head) + text + len(mark)] == mark
            assert body[len(head) + text + len(mark) :] == encoded_document.ids.tolist()[:kept]
            assert text >= 1

    check()


def test_truncation_of_an_over_long_query_keeps_only_its_own_words(causal_model: Path) -> None:
    layout = pair_layout(causal_model)
    tokenizer = AutoTokenizer.from_pretrained(causal_model)
    for query in ("word " * 300 + "end", "word " * 300 + "end?", "word? " * 300):
        for spare in range(12):
            sequence = join(layout, query, "the document", layout.smallest_length(None) + spare)
            text = tokenizer.decode(sequence.ids)
            kept = text.partition("\n<Query>:")[2].partition("\n<Document>:")[0]
            assert query.startswith(kept.strip())
            assert len(kept.strip()) < len(query)
            assert text.count("<Document>:") == 1


def test_a_limit_without_room_for_the_instruction_is_an_error(causal_model: Path) -> None:
    layout = pair_layout(causal_model)
    long = "Find what is asked for. " * 20
    need = layout.smallest_length(long)
    assert need > layout.smallest_length(None)
    assert len(join(layout, "word " * 300, "word " * 300, need, long).ids) == need
    with pytest.raises(NoRoomError, match=f"the least is {need}"):
        join(layout, "word " * 300, "word " * 300, need - 1, long)


def test_single_texts_equal_those_of_the_tokenizer(tmp_path: Path) -> None:
    prompts = {"query": "Represent this: ", "document": ""}
    model = models.build_bi_encoder(tmp_path, prompts=prompts)
    layout = text_layout(model)
    tokenizer = AutoTokenizer.from_pretrained(model)

    @PROPERTY
    @given(texts=FEW, max_length=st.integers(layout.smallest_length(None), 64))
    def check(texts: list[str], max_length: int) -> None:
        for prompt, encoded in (
            ("Represent this: ", layout.encode_queries(texts, None)),
            ("", layout.encode_documents(texts)),
        ):
            for text, one in zip(texts, encoded, strict=True):
                whole = tokenizer(prompt + text)["input_ids"]
                sequence, cut = layout.single(one, max_length)
                expected = tokenizer(prompt + text, truncation="longest_first", max_length=max_length)["input_ids"]
                assert sequence.ids.tolist() == expected
                assert sequence.first_segment == len(expected)
                assert cut == (len(whole) > max_length)

    check()


def test_left_truncation_equals_that_of_the_tokenizer(tmp_path: Path) -> None:
    model = models.build_bert_cross_encoder(tmp_path)
    settings_file = model / "tokenizer_config.json"
    settings_file.write_text(json.dumps({**json.loads(settings_file.read_text()), "truncation_side": "left"}))
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.truncation_side == "left"
    layout = pair_layout(model)
    for query, document in ODD_PAIRS:
        sequence = join(layout, query, document, 20)
        assert sequence.ids.tolist() == tokenizer([(query, document)], truncation=True, max_length=20)["input_ids"][0]


def test_special_tokens_of_a_causal_tokenizer_stand_around_the_body(tmp_path: Path) -> None:
    model = models.build_qwen3_reranker(tmp_path)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<|im_start|>", "<|endoftext|>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>", pair="$A $B", special_tokens=ends
    )
    tokenizer.save(str(model / "tokenizer.json"))
    reference = AutoTokenizer.from_pretrained(model)
    assert len(reference("a")["input_ids"]) == 3
    layout = pair_layout(model)
    for query, document in [("a query", "a document"), ("a query", "word " * 500)]:
        sequence = join(layout, query, document, 300)
        assert sequence.ids.tolist() == causal_ids(reference, query, document, None, 300)


def test_lower_casing(tmp_path: Path) -> None:
    uncased = make_layout(read_model(str(models.build_bi_encoder(tmp_path))))
    assert np.array_equal(uncased.encode_documents(["ABC"])[0].ids, uncased.encode_documents(["abc"])[0].ids)
    spec = read_model(str(models.build_roberta_cross_encoder(tmp_path / "cased")))
    plain, lowered = make_layout(spec), make_layout(replace(spec, lower_case=True))
    assert not np.array_equal(plain.encode_documents(["ABC"])[0].ids, plain.encode_documents(["abc"])[0].ids)
    assert np.array_equal(lowered.encode_documents(["ABC"])[0].ids, plain.encode_documents(["abc"])[0].ids)


def test_only_causal_rerankers_take_an_instruction(pair_model: Path, causal_model: Path) -> None:
    assert pair_layout(pair_model).default_instruction is None
    assert pair_layout(causal_model).default_instruction == CARD_INSTRUCTION


def test_smallest_lengths(pair_model: Path, causal_model: Path) -> None:
    for model in (pair_model, causal_model):
        layout = pair_layout(model)
        least = layout.smallest_length(None)
        assert len(join(layout, "word " * 200, "word " * 200, least).ids) == least
        with pytest.raises(NoRoomError):
            join(layout, "word " * 200, "word " * 200, least - 1)


def test_threads_can_share_a_layout(causal_model: Path) -> None:
    layout = pair_layout(causal_model)
    texts = [text[:200] for text in models.docstrings()[:100]]
    alone = [one.ids for one in layout.encode_queries(texts, None)]
    start = threading.Barrier(4)

    def work(_: int) -> list[EncodedText]:
        start.wait()
        return layout.encode_queries(texts, None)

    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(work, range(4)):
            assert all(np.array_equal(one.ids, ids) for one, ids in zip(result, alone, strict=True))


def test_a_tokenizer_without_separator_is_refused(tmp_path: Path) -> None:
    model = models.build_bert_cross_encoder(tmp_path)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.post_processor = None
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(model)
    with pytest.raises(UnsupportedModelError, match="no special token between"):
        make_layout(read_model(str(model)))
