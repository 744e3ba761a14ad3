"""Cache on disk: scores or embeddings in one LMDB store, shared by restarts and by all servers of a machine.

Look-ups go to the cache in memory first, then to this one, then to the engine. Writes are skipped when the store is
full or too many writes wait; the cost of a skipped write is that the score is computed again. Reads and writes run on
threads, not on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import structlog

from .cache import scope_of

_MOST_WRITES_WAITING = 64

log = structlog.get_logger()


class DiskCacheError(RuntimeError):
    """The store cannot be opened; the message names the flag."""


class DiskCache:
    """Bytes by key, for one model."""

    def __init__(self, directory: Path, max_bytes: int, fingerprint: str) -> None:
        """Open the store, or make a new one.

        Args:
            directory: Directory of the store; made if it does not exist. Several servers may use it, with any models.
            max_bytes: Largest size of its file.
            fingerprint: Fingerprint of the model; values written for another one are never found.

        Raises:
            DiskCacheError: The directory cannot be used, or its files are no LMDB store.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # Without metasync a crash of the machine may lose the last writes, but never the store.
            self._store = lmdb.open(str(directory), map_size=max_bytes, metasync=False, readahead=False)
            # Frees the reader slots of servers that were killed.
            self._store.reader_check()
        except (OSError, lmdb.Error) as error:
            raise DiskCacheError(f"--cache-dir {directory}: {error}") from error
        self._model = scope_of(fingerprint)
        self._full = False
        self._waiting = 0
        self._readers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk-cache-read")
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk-cache-write")

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Values by key; ``None`` for unknown keys."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._get, keys)

    def put(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """Queue values for writing; returns at once."""
        if self._full or self._waiting >= _MOST_WRITES_WAITING:
            return
        self._waiting += 1
        self._writer.submit(self._put, keys, values)

    def close(self) -> None:
        """Finish writing and close the store."""
        self._readers.shutdown()
        self._writer.shutdown()
        self._store.close()

    def _get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        try:
            try:
                return self._read(keys)
            except lmdb.MapResizedError:
                # Another server, with a larger --cache-dir-bytes, has made the file grow. No transaction of this
                # process may be open during the change: this thread has none, and the writer makes the change itself.
                self._writer.submit(self._store.set_mapsize, 0).result()
                return self._read(keys)
        except lmdb.Error as error:
            log.warning("disk cache not read", reason=str(error))
            return [None] * len(keys)

    def _read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        with self._store.begin() as transaction:
            return [transaction.get(self._model + key) for key in keys]

    def _put(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        try:
            with self._store.begin(write=True) as transaction:
                for key, value in zip(keys, values, strict=True):
                    transaction.put(self._model + key, value)
        except lmdb.MapFullError:
            self._full = True
            log.warning("disk cache full", rule="no more is written; raise --cache-dir-bytes or empty the directory")
        except lmdb.Error as error:
            log.warning("disk cache not written", reason=str(error))
        finally:
            self._waiting -= 1
