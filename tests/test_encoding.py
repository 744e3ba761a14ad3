"""Token ids joined from parts are the ids that the model's own tokenizer gives for the whole."""

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

from reranker_service.models.encoding import EncodedText, Encoder, NoRoomError
from reranker_service.models.spec import UnsupportedModelError, read_model

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
# Each example gives up to 16 pairs: about 2,500 pairs a tokenizer, each with and without a cut.
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
    """A causal reranker whose tokenizer prepends "▁" to every text and lets tokens span words, as Llama's does."""
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


def join(encoder: Encoder, query: str, document: str, max_length: int, instruction: str | None = None):
    encoded_query = encoder.encode_queries([query], instruction)[0]
    return encoder.join(encoded_query, encoder.encode_documents([document])[0], max_length)


def test_joined_pairs_are_the_tokenizers_own(pair_model: Path) -> None:
    encoder = Encoder(read_model(str(pair_model)))
    tokenizer = AutoTokenizer.from_pretrained(pair_model)

    @PROPERTY
    @given(queries=FEW, documents=FEW, max_length=st.integers(encoder.min_length, 128))
    def check(queries: list[str], documents: list[str], max_length: int) -> None:
        for query, encoded_query in zip(queries, encoder.encode_queries(queries, None), strict=True):
            for document, encoded_document in zip(documents, encoder.encode_documents(documents), strict=True):
                for limit in (10**6, max_length):
                    sequence, cut = encoder.join(encoded_query, encoded_document, limit)
                    # A list of one pair: given alone, an empty document would count as none.
                    whole = tokenizer([(query, document)], truncation="longest_first", max_length=limit)
                    assert sequence.ids.tolist() == whole["input_ids"][0]
                    types = whole.get("token_type_ids", [[0] * len(sequence.ids)])[0]
                    assert [0] * sequence.first_segment + [1] * (len(types) - sequence.first_segment) == types
                    full = len(tokenizer([(query, document)])["input_ids"][0])
                    assert encoder.length(encoded_query, encoded_document) == full
                    assert cut == (full > limit)

    check()


def test_pairs_joined_together_are_pairs_joined_one_by_one(pair_model: Path, causal_model: Path) -> None:
    for model in (pair_model, causal_model):
        check_joined_together(Encoder(read_model(str(model))))


def check_joined_together(encoder: Encoder) -> None:
    limit = encoder.min_length + 12
    queries = encoder.encode_queries(["", "a query", "a long query " * 9], None)
    documents = encoder.encode_documents(["a document", "", "a long document " * 9])
    pairs = [(query, document) for query in queries for document in documents]
    together = encoder.join_all(*zip(*pairs, strict=True), limit)
    alone = [encoder.join(query, document, limit) for query, document in pairs]
    assert {cut for _, cut in alone} == {False, True}
    for found, (expected, _) in zip(together, alone, strict=True):
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.first_segment == expected.first_segment
    assert encoder.join_all([], [], limit) == []
    with pytest.raises(NoRoomError):
        encoder.join_all(*zip(*pairs, strict=True), 1)


@pytest.mark.parametrize("which", ["causal_model", "spm_causal_model"])
def test_joined_causal_pairs_are_the_model_cards(which: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    encoder = Encoder(read_model(str(model)))
    tokenizer = AutoTokenizer.from_pretrained(model)

    @PROPERTY
    @given(queries=FEW, documents=FEW, instruction=st.one_of(st.none(), TEXTS), spare=st.integers(0, 60))
    def check(queries: list[str], documents: list[str], instruction: str | None, spare: int) -> None:
        encoded_documents = encoder.encode_documents(documents)
        for query, encoded_query in zip(queries, encoder.encode_queries(queries, instruction), strict=True):
            for document, encoded_document in zip(documents, encoded_documents, strict=True):
                whole = causal_ids(tokenizer, query, document, instruction, 10**6)
                sequence, cut = encoder.join(encoded_query, encoded_document, 10**6)
                assert sequence.ids.tolist() == whole
                assert not cut
                assert sequence.first_segment == len(whole) == encoder.length(encoded_query, encoded_document)
                # The least that leaves room for a token of the document beside the whole query.
                limit = encoder.smallest_length(instruction) - encoder.smallest_length("") + spare
                limit += len(causal_ids(tokenizer, query, "", "", 10**6))
                if limit > len(encoded_query.ids) + overhead(tokenizer):
                    sequence, cut = encoder.join(encoded_query, encoded_document, limit)
                    assert sequence.ids.tolist() == causal_ids(tokenizer, query, document, instruction, limit)
                    assert cut == (len(whole) > limit)

    check()


def overhead(tokenizer) -> int:
    return sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in (CARD_PREFIX, CARD_SUFFIX))


def test_which_tokenizers_need_the_whole_is_found_out(causal_model: Path, spm_causal_model: Path) -> None:
    by_parts = Encoder(read_model(str(causal_model))).encode_documents(["a"])[0]
    as_whole = Encoder(read_model(str(spm_causal_model))).encode_documents(["a"])[0]
    assert by_parts.source is None
    assert as_whole.source == " a"


@pytest.mark.parametrize("which", ["causal_model", "spm_causal_model"])
def test_cutting_a_causal_pair_spares_the_template(which: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    encoder = Encoder(read_model(str(model)))
    tokenizer = AutoTokenizer.from_pretrained(model)
    prefix = tokenizer.encode(CARD_PREFIX, add_special_tokens=False)
    suffix = tokenizer.encode(CARD_SUFFIX, add_special_tokens=False)
    head = tokenizer.encode(f"<Instruct>: {CARD_INSTRUCTION}\n<Query>:", add_special_tokens=False)
    mark = tokenizer.encode("\n<Document>:", add_special_tokens=False)

    @PROPERTY
    @given(query=TEXTS, document=TEXTS, spare=st.integers(0, 40))
    def check(query: str, document: str, spare: int) -> None:
        encoded_query = encoder.encode_queries([query], None)[0]
        encoded_document = encoder.encode_documents([document])[0]
        limit = encoder.min_length + spare
        sequence, cut = encoder.join(encoded_query, encoded_document, limit)
        ids = sequence.ids.tolist()
        assert len(ids) <= limit
        assert cut == (encoder.length(encoded_query, encoded_document) > limit)
        assert ids[: len(prefix)] == prefix
        assert ids[len(ids) - len(suffix) :] == suffix
        body = ids[len(prefix) : len(ids) - len(suffix)]
        if cut and len(encoded_query.ids) >= limit - len(prefix) - len(suffix):
            # The query gives way: the document has at least half of the room, or all of its own tokens.
            room = limit - len(prefix) - len(suffix) - len(head) - len(mark)
            kept = min(len(encoded_document.ids), room - room // 2)
            text = room - kept
            assert body[: len(head)] == head
            assert body[len(head) : len(head) + text] == encoded_query.ids.tolist()[len(head) : len(head) + text]
            assert body[len(head) + text : len(head) + text + len(mark)] == mark
            assert body[len(head) + text + len(mark) :] == encoded_document.ids.tolist()[:kept]
            assert text >= 1

    check()


def test_the_cut_of_an_over_long_query_keeps_only_its_own_words(causal_model: Path) -> None:
    encoder = Encoder(read_model(str(causal_model)))
    tokenizer = AutoTokenizer.from_pretrained(causal_model)
    for query in ("word " * 300 + "end", "word " * 300 + "end?", "word? " * 300):
        for spare in range(12):
            sequence, cut = join(encoder, query, "the document", encoder.min_length + spare)
            text = tokenizer.decode(sequence.ids)
            kept = text.partition("\n<Query>:")[2].partition("\n<Document>:")[0]
            assert cut
            assert query.startswith(kept.strip())
            assert text.count("<Document>:") == 1


def test_room_is_demanded_for_the_instruction(causal_model: Path) -> None:
    encoder = Encoder(read_model(str(causal_model)))
    long = "Find what is asked for. " * 20
    need = encoder.smallest_length(long)
    assert need > encoder.min_length
    sequence, cut = join(encoder, "word " * 300, "word " * 300, need, long)
    assert len(sequence.ids) == need
    assert cut
    with pytest.raises(NoRoomError, match=f"the least is {need}"):
        join(encoder, "word " * 300, "word " * 300, need - 1, long)


def test_single_texts_are_the_tokenizers_own(tmp_path: Path) -> None:
    prompts = {"query": "Represent this: ", "document": ""}
    model = models.build_bi_encoder(tmp_path, prompts=prompts)
    encoder = Encoder(read_model(str(model)))
    tokenizer = AutoTokenizer.from_pretrained(model)

    @PROPERTY
    @given(texts=FEW, max_length=st.integers(encoder.min_length, 64))
    def check(texts: list[str], max_length: int) -> None:
        for prompt, encoded in (
            ("Represent this: ", encoder.encode_queries(texts, None)),
            ("", encoder.encode_documents(texts)),
        ):
            for text, one in zip(texts, encoded, strict=True):
                whole = tokenizer(prompt + text)["input_ids"]
                sequence, cut = encoder.single(one, max_length)
                expected = tokenizer(prompt + text, truncation="longest_first", max_length=max_length)["input_ids"]
                assert sequence.ids.tolist() == expected
                assert sequence.first_segment == len(expected)
                assert cut == (len(whole) > max_length)
        query, document = encoder.encode_queries(texts, None)[0], encoder.encode_documents(texts)[0]
        longest = max(len(encoder.single(one, 10**6)[0].ids) for one in (query, document))
        assert encoder.length(query, document) == longest

    check()


def test_left_truncation_is_the_tokenizers_own(tmp_path: Path) -> None:
    model = models.build_bert_cross_encoder(tmp_path)
    settings_file = model / "tokenizer_config.json"
    settings_file.write_text(json.dumps({**json.loads(settings_file.read_text()), "truncation_side": "left"}))
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.truncation_side == "left"
    encoder = Encoder(read_model(str(model)))
    for query, document in ODD_PAIRS:
        sequence, _ = join(encoder, query, document, 20)
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
    encoder = Encoder(read_model(str(model)))
    for query, document in [("a query", "a document"), ("a query", "word " * 500)]:
        sequence, _ = join(encoder, query, document, 300)
        assert sequence.ids.tolist() == causal_ids(reference, query, document, None, 300)


def test_lower_casing_and_default_prompt(tmp_path: Path) -> None:
    model = models.build_bi_encoder(tmp_path)
    spec = read_model(str(model))
    assert np.array_equal(
        Encoder(spec).encode_documents(["ABC"])[0].ids, Encoder(spec).encode_documents(["abc"])[0].ids
    )
    cased = models.build_roberta_cross_encoder(tmp_path / "cased")
    plain, lowered = Encoder(read_model(str(cased))), Encoder(replace(read_model(str(cased)), lower_case=True))
    assert not np.array_equal(plain.encode_documents(["ABC"])[0].ids, plain.encode_documents(["abc"])[0].ids)
    assert np.array_equal(lowered.encode_documents(["ABC"])[0].ids, plain.encode_documents(["abc"])[0].ids)


def test_instructions_are_refused_where_none_is_taken(pair_model: Path, causal_model: Path) -> None:
    encoder = Encoder(read_model(str(pair_model)))
    assert not encoder.supports_instruction
    assert encoder.default_instruction is None
    with pytest.raises(ValueError, match="takes no instruction"):
        encoder.encode_queries(["a"], "")
    causal = Encoder(read_model(str(causal_model)))
    assert causal.supports_instruction
    assert causal.default_instruction == CARD_INSTRUCTION


def test_smallest_lengths(pair_model: Path, causal_model: Path) -> None:
    for model in (pair_model, causal_model):
        encoder = Encoder(read_model(str(model)))
        sequence, cut = join(encoder, "word " * 200, "word " * 200, encoder.min_length)
        assert len(sequence.ids) == encoder.min_length
        assert cut
        with pytest.raises(NoRoomError):
            join(encoder, "word " * 200, "word " * 200, encoder.min_length - 1)


def test_threads_share_an_encoder(causal_model: Path) -> None:
    encoder = Encoder(read_model(str(causal_model)))
    texts = [text[:200] for text in models.docstrings()[:100]]
    alone = [one.ids for one in encoder.encode_queries(texts, None)]
    start = threading.Barrier(4)

    def work(_: int) -> list[EncodedText]:
        start.wait()
        return encoder.encode_queries(texts, None)

    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(work, range(4)):
            assert all(np.array_equal(one.ids, ids) for one, ids in zip(result, alone, strict=True))


def test_a_tokenizer_without_separator_is_refused(tmp_path: Path) -> None:
    model = models.build_bert_cross_encoder(tmp_path)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.post_processor = None
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(model)
    with pytest.raises(UnsupportedModelError, match="no special token between"):
        Encoder(read_model(str(model)))
