"""Long texts are tokenized only as far as their tokens are used, with the very tokens of the whole text."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

from reranker_service.models import EncodedText, PairLayout, TextLayout, make_layout, prefix, read_model
from reranker_service.models.prefix import PrefixTokenizer
from reranker_service.scheduling import Scheduler
from reranker_service.scoring import Pairs, Scorer, TextTable, Ticket

from . import models
from .servers import ControlledEngine
from .test_encoding import PIECES, PROPERTY

WORDS = [*PIECES, "中文", "。", "，", "が", "カ", "！", "Слово", "été", "<mask>", "▁a", "a▁", "\u0308", "\u200d", "_"]
_WORDS = st.lists(st.sampled_from([*WORDS, " ", "a b", "c d"]), min_size=5, max_size=40)
LONG_TEXTS = st.one_of(_WORDS.map(" ".join), _WORDS.map("".join), st.text(max_size=30).map("a b {} c d".format))
LONGER = st.builds("{} {}".format, LONG_TEXTS, st.integers(0, 12).map("some more words 12 ".__mul__))
FEW = settings(PROPERTY, max_examples=60)
TOKENIZERS: dict[str, Callable[[], object]] = {
    "wordpiece": models.wordpiece_tokenizer,
    "unigram": models.unigram_tokenizer,
    "byte-level": models.roberta_tokenizer,
    "qwen": models.qwen_tokenizer,
}


@pytest.fixture
def short_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short texts as well."""
    monkeypatch.setattr(prefix, "_LEAST_CHARACTERS", 1)
    monkeypatch.setattr(prefix, "_CHARACTERS_PER_TOKEN", 1)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokens_before_every_border_are_those_of_the_whole_text(name: str) -> None:
    tokenizer: Tokenizer = TOKENIZERS[name]().backend_tokenizer  # type: ignore[attr-defined]
    border = PrefixTokenizer(tokenizer)._border
    assert border is not None
    borders = 0

    @FEW
    @given(LONG_TEXTS)
    def check(text: str) -> None:
        nonlocal borders
        whole = tokenizer.encode(text, add_special_tokens=False).ids
        for found in border.finditer(text):
            part = tokenizer.encode(text[: found.end()], add_special_tokens=False).ids
            assert part == whole[: len(part)], text[: found.end()]
            borders += 1

    check()
    assert borders >= 5, "the texts must have borders"


def build_left(directory: Path) -> Path:
    model = models.build_bert_cross_encoder(directory)
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncation_side": "left"}))
    return model


@pytest.mark.parametrize(
    "build",
    [
        models.build_bert_cross_encoder,
        models.build_xlm_roberta_cross_encoder,
        models.build_roberta_cross_encoder,
        models.build_qwen3_reranker,
        build_left,
    ],
)
@pytest.mark.usefixtures("short_prefixes")
def test_pairs_of_cut_texts_equal_pairs_of_whole_texts(build: Callable[[Path], Path], tmp_path: Path) -> None:
    layout = make_layout(read_model(str(build(tmp_path))))
    assert isinstance(layout, PairLayout)
    zero = np.zeros(1, dtype=np.int64)
    least = layout.smallest_length(None)
    cut = 0

    def measured(text: EncodedText, whole: EncodedText) -> EncodedText:
        assert text.length == whole.length if text.exact else text.length <= whole.length
        return replace(text, length=whole.length, exact=True)

    @FEW
    @given(LONGER, LONGER, st.integers(0, 20))
    def check(query: str, document: str, spare: int) -> None:
        nonlocal cut
        limit = least + spare
        # Longer texts where the template takes a hundred tokens.
        query, document = query * (1 + least // 20), document * (1 + least // 20)
        pair = layout.encode_queries([query], None, limit) + layout.encode_documents([document], limit)
        whole = layout.encode_queries([query], None) + layout.encode_documents([document])
        assert max(len(text.ids) for text in pair) <= limit
        cut += not (pair[0].exact and pair[1].exact)
        over = [int(layout.lengths(one[:1], one[1:], zero, zero)[0]) > limit for one in (pair, whole)]
        assert over[0] == over[1]
        if layout.undecided(pair[:1], pair[1:], zero, zero, limit)[0]:
            pair = [measured(text, full) for text, full in zip(pair, whole, strict=True)]
        found, expected = layout.join(pair[:1], pair[1:], limit)[0], layout.join(whole[:1], whole[1:], limit)[0]
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.first_segment == expected.first_segment

    check()
    assert cut > 5 or build is build_left


@pytest.mark.usefixtures("short_prefixes")
def test_single_cut_texts_equal_whole_texts(tmp_path: Path) -> None:
    layout = make_layout(read_model(str(models.build_bi_encoder(tmp_path, prompts={"query": "query: "}))))
    assert isinstance(layout, TextLayout)

    @FEW
    @given(LONGER, st.integers(layout.smallest_length(None), 64))
    def check(text: str, limit: int) -> None:
        for part, whole in (
            (layout.encode_queries([text], None, limit)[0], layout.encode_queries([text], None)[0]),
            (layout.encode_documents([text], limit)[0], layout.encode_documents([text])[0]),
        ):
            found, expected = layout.single(part, limit), layout.single(whole, limit)
            assert found[0].ids.tolist() == expected[0].ids.tolist()
            assert found[1] == expected[1]

    check()


@pytest.mark.parametrize("name", ["wordpiece", "qwen"])
def test_little_of_a_long_text_is_tokenized(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer: Tokenizer = TOKENIZERS[name]().backend_tokenizer  # type: ignore[attr-defined]
    draw = random.Random(0)
    words = [word for text in models.docstrings() for word in text.split() if word.isalpha()]
    text = " ".join(draw.choice(words) for _ in range(150_000))
    prefixes = PrefixTokenizer(tokenizer)
    tokenized: list[int] = []

    class Counting:
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> object:
            tokenized.extend(map(len, texts))
            return tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(prefixes, "_tokenizer", Counting())
    ((ids, exact),) = prefixes.tokenize([text], 256)
    assert len(ids) >= 256
    assert not exact
    assert sum(tokenized) < len(text) / 100
    # A prefix that gives too few tokens grows.
    tokenized.clear()
    ((ids, exact),) = prefixes.tokenize(["\n" * 5000 + text], 256)
    assert len(ids) >= 256
    assert sum(tokenized) < len(text) / 10


def _tokenizer(change: str) -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if change == "an added token with a space":
        tokenizer.add_tokens(["a b"])
    elif change == "a replacement of a letter and a space":
        tokenizer.normalizer = normalizers.Replace("a b", "x")
    elif change == "an unknown pattern":
        tokenizer.pre_tokenizer = pre_tokenizers.Split("a b|.", "isolated")
    elif change == "Metaspace without a split":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    elif change == "no split":
        tokenizer.pre_tokenizer = None
    elif change == "bytes without a split":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(use_regex=False)
    return tokenizer


@pytest.mark.parametrize(
    "change",
    [
        *("an added token with a space", "a replacement of a letter and a space", "an unknown pattern"),
        *("Metaspace without a split", "no split", "bytes without a split"),
    ],
)
def test_texts_are_not_cut_for_tokenizers_that_may_see_across_a_border(change: str) -> None:
    assert PrefixTokenizer(_tokenizer("nothing"))._border is not None
    assert PrefixTokenizer(_tokenizer(change))._border is None


@pytest.mark.usefixtures("short_prefixes")
@pytest.mark.parametrize("max_length", [40, 41])
def test_scores_and_counts_of_long_texts_are_those_of_whole_texts(
    max_length: int, cross_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a query", "a word " * 300, "a word " * 301, "short", "a b " * 12, "another word " * 299]

    async def scenario() -> tuple[list[list[int]], int, int]:
        spec = read_model(str(cross_encoder))
        engine = ControlledEngine()
        scorer = Scorer(spec, make_layout(spec), Scheduler(engine))
        options = replace(scorer.ranges.defaults, max_length=max_length, raw=True)
        table = TextTable(options, Ticket("a", False), texts)
        scored = await scorer.score(table, Pairs(np.arange(6), np.arange(6), grid=True))
        held = max(len(text.ids) for role in table.encoded.values() for text in role._values.values())
        scorer.close()
        return sorted(one.ids.tolist() for batch in engine.batches for one in batch), scored.usage.truncated_pairs, held

    cut = asyncio.run(scenario())
    monkeypatch.setattr(PrefixTokenizer, "_cut", lambda self, text, characters: None)
    whole = asyncio.run(scenario())
    assert cut == whole
    assert cut[2] == max_length
