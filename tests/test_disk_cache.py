"""Scores on disk outlive the server: the same model reuses them after a restart, another model does not."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import grpc
import pytest

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc
from reranker_service.scoring.disk import DiskCache, DiskCacheError

from . import forked
from .servers import ServerProcess

REQUEST = pb.RerankRequest(query="parse a date", documents=[f"document {i}" for i in range(50)])


def ask(model: Path, directory: Path, *flags: str) -> pb.RerankResponse:
    """One call to a new server, which ends afterwards."""
    flags = ("--model", str(model), "--engine", "torch", "--threads", "1", "--cache-dir", str(directory), *flags)
    with ServerProcess(*flags) as server, grpc.insecure_channel(server.address) as channel:
        return rpc.RerankerServiceStub(channel).Rerank(REQUEST)


def scores(response: pb.RerankResponse) -> list[tuple[int, float]]:
    return [(one.index, one.score) for one in response.results]


def test_a_restarted_server_computes_nothing_again(cross_encoder: Path, tmp_path: Path) -> None:
    first, second = ask(cross_encoder, tmp_path), ask(cross_encoder, tmp_path)
    assert (first.usage.cached_pairs, second.usage.cached_pairs, second.usage.tokens) == (0, 50, 0)
    assert scores(first) == scores(second)


def test_another_model_reuses_no_scores(tmp_path: Path) -> None:
    def get(fingerprint: str) -> list[bytes | None]:
        store = DiskCache(tmp_path, 1 << 20, fingerprint)
        found = asyncio.run(store.get([b"key"]))
        store.put([b"key"], [fingerprint.encode()])
        store.close()
        return found

    assert [get(name) for name in ("one", "other", "one", "other")] == [[None], [None], [b"one"], [b"other"]]


def test_it_works_without_the_cache_in_memory_and_for_embeddings(bi_encoder: Path, tmp_path: Path) -> None:
    first, second = (ask(bi_encoder, tmp_path, "--cache-bytes", "0") for _ in range(2))
    assert (first.usage.cached_pairs, second.usage.cached_pairs, second.usage.tokens) == (0, 50, 0)
    assert scores(first) == scores(second)


def test_a_store_that_another_server_made_grow_is_still_read(tmp_path: Path) -> None:
    writer = """
import sys
from pathlib import Path
from reranker_service.scoring.disk import DiskCache
store = DiskCache(Path(sys.argv[1]), 64 << 20, "model")
for number in range(40):
    store.put([b"key %d %d" % (number, i) for i in range(100)], [b"x" * 1000] * 100)
store.close()
"""

    store = DiskCache(tmp_path, 1 << 20, "model")
    assert asyncio.run(store.get([b"key 39 0"])) == [None]
    forked.run([sys.executable, "-c", writer, str(tmp_path)], timeout=120).check_returncode()
    assert asyncio.run(store.get([b"key 39 0", b"nothing"])) == [b"x" * 1000, None]
    store.close()


def test_a_full_store_keeps_what_it_has_and_grows_no_further(tmp_path: Path) -> None:
    async def scenario() -> list[bytes | None]:
        store = DiskCache(tmp_path, 1 << 20, "model")
        for number in range(40):
            store.put([b"key %d %d" % (number, i) for i in range(100)], [b"x" * 1000] * 100)
        store.close()  # waits for pending writes
        store = DiskCache(tmp_path, 1 << 20, "model")
        found = await store.get([b"key 0 0", b"key 39 0"])
        store.close()
        return found

    assert asyncio.run(scenario()) == [b"x" * 1000, None]
    assert size(tmp_path) <= 1 << 20


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("data.mdb"))


def fill(directory: Path, model: str, kibibytes: int) -> None:
    store = DiskCache(directory, 1 << 20, model)
    for number in range(kibibytes // 16):
        store.put([b"key %d %d" % (number, i) for i in range(16)], [b"x" * 1000] * 16)
    store.close()


def known(directory: Path, model: str) -> bool:
    store = DiskCache(directory, 1 << 20, model)
    found = asyncio.run(store.get([b"key 0 0"]))
    store.close()
    return found != [None]


def test_a_full_cache_drops_the_model_that_was_used_least_recently(tmp_path: Path) -> None:
    for model in ("first", "second", "third"):
        fill(tmp_path, model, 128)
    assert known(tmp_path, "first")  # now "second" is the oldest
    fill(tmp_path, "fourth", 256)
    assert size(tmp_path) <= 1 << 20
    assert [known(tmp_path, model) for model in ("first", "second", "third", "fourth")] == [True, False, True, True]


def test_a_model_that_a_server_uses_is_not_dropped(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(bytes(300 << 10))  # of an earlier version
    fill(tmp_path, "used", 200)
    assert (tmp_path / "data.mdb").exists()
    used = DiskCache(tmp_path, 1 << 20, "used")
    fill(tmp_path, "other", 400)
    assert not (tmp_path / "data.mdb").exists()
    fill(tmp_path, "more", 800)
    assert size(tmp_path) <= 1 << 20
    assert asyncio.run(used.get([b"key 0 0"])) != [None]
    used.close()
    assert known(tmp_path, "more")
    assert not known(tmp_path, "other")


def test_only_the_owner_can_read_the_cache(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        DiskCache.check(tmp_path / "cache")
        fill(tmp_path / "cache", "model", 16)
    finally:
        os.umask(before)
    paths = [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]
    assert len(paths) == 5
    assert [path for path in paths if path.stat().st_mode & 0o077] == []


def test_two_processes_share_a_store(tmp_path: Path) -> None:
    """Two environments of one process are refused by LMDB itself, so the other one is a process."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom reranker_service.scoring.disk import DiskCache\n"
        "store = DiskCache(Path(sys.argv[1]), 1 << 20, 'model')\nstore.put([b'key'], [b'value'])\nstore.close()"
    )

    async def scenario() -> list[bytes | None]:
        store = DiskCache(tmp_path, 1 << 20, "model")
        assert await store.get([b"key"]) == [None]
        command = [sys.executable, "-c", program, str(tmp_path)]
        (await asyncio.to_thread(forked.run, command, timeout=60)).check_returncode()
        found = await store.get([b"key", b"other"])
        store.close()
        return found

    assert asyncio.run(scenario()) == [b"value", None]


def test_a_directory_that_cannot_be_used_is_a_clear_error_at_once(cross_encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(DiskCacheError, match=r"--cache-dir .*file"):
        DiskCache(tmp_path / "file", 1 << 20, "model")
    flags = ["--model", str(cross_encoder), "--engine", "torch", "--cache-dir", str(tmp_path / "file")]
    with ServerProcess(*flags, ready=False) as server:
        server.line("--cache-dir")
        assert server.wait() == 1
        assert not any("event=loading" in line for line in server.lines)
