"""Fuzzing and load, in a short form: no client can break the server. ``make fuzz`` runs the full form."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.message import DecodeError
from grpc import StatusCode

from reranker.v1 import reranker_pb2 as pb

from .fuzz import frames, load, messages, scripts
from .fuzz.mutation import mutated
from .fuzz.target import MIB, TEXTS, Target

# Machines of tests pause for seconds; the full form allows one second.
HEALTH_SECONDS = 8.0


@pytest.fixture(scope="module")
def target(cross_encoder: Path) -> Iterator[Target]:
    with Target(cross_encoder) as running:
        running.check_scores()
        yield running


@pytest.mark.parametrize("name", messages.RPCS)
def test_mutated_messages_end_with_a_proper_status(target: Target, name: str) -> None:
    with target.watched() as watch:
        codes = asyncio.run(messages.fuzz(target, name, range(150)))
        target.check_scores()
    watch.check(48 * MIB, HEALTH_SECONDS)
    target.settle()
    assert sum(codes.values()) == 150
    assert codes[StatusCode.OK] > 20
    assert codes[StatusCode.INVALID_ARGUMENT] > 20


def test_a_message_is_made_again_from_its_seed_and_number() -> None:
    assert [messages.message("Rerank", number, 1) for number in range(50)] == [
        messages.message("Rerank", number, 1) for number in range(50)
    ]
    assert len({messages.message("Rerank", number, seed) for number in range(50) for seed in (1, 2)}) > 80


def test_mutations_damage_and_spare_what_a_parser_looks_at() -> None:
    """Of many mutated requests, some are right, some are no message, and some have fields that are unknown or wrong."""
    seen = {"right": 0, "broken": 0, "changed": 0}
    request = pb.RerankRequest(query=TEXTS[0], documents=TEXTS[:3], top_n=2, options=pb.RerankOptions(max_length=9))
    for number in range(500):
        data = mutated(request, random.Random(number))
        try:
            parsed = pb.RerankRequest.FromString(data)
        except DecodeError:
            seen["broken"] += 1
        else:
            seen["right" if parsed == request else "changed"] += 1
    assert all(count > 40 for count in seen.values()), seen


def test_hostile_scripts_get_each_chunk_answered_once_and_right(cross_encoder: Path) -> None:
    with Target(cross_encoder, *scripts.FLAGS) as target:
        assert scripts.run(target, 320, messages.SEED) >= 320
        target.settle()


@pytest.mark.parametrize("name", frames.ATTACKS)
def test_broken_http2_costs_no_other_client_its_calls(target: Target, name: str) -> None:
    frames.run(target, name, messages.SEED, part=0.02, seconds=HEALTH_SECONDS)
    target.settle()


def test_load_leaves_nothing_behind(target: Target) -> None:
    report = load.run(
        target, seconds=3, clients=16, idle=100, half_sent=8, unread=4, seed=messages.SEED, health=HEALTH_SECONDS
    )
    assert report.pairs > 100
    assert {rpc for rpc, code in report.calls if code == "OK"} == {
        "Rerank",
        "RerankBatch",
        "RerankStream",
        "GetModelInfo",
    }
