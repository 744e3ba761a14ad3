"""Cache on disk: scores or embeddings in LMDB stores, shared by restarts and by all servers of a machine.

Each model has a store of its own, in a directory that is named after the model's fingerprint. Look-ups go to the cache
in memory first, then to this one, then to the engine. When the stores together have reached their limit, the store of
another model that was used least recently is deleted, unless a server uses it. Writes are skipped when that is not
possible, or when too many writes wait; the cost of a skipped write is that the score is computed again. Reads and
writes run on threads, not on the event loop. Directories and files can be read by their owner only.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import structlog

from .cache import scope_of

_MOST_WRITES_WAITING = 64
_OWNERS_DIRECTORY, _OWNERS_FILE = 0o700, 0o600
# A file in each store's directory: locked while a server uses the store, dated at the begin and end of each use.
_USED = "used"
# Files of the one store for all models that earlier versions had.
_OLD_FILES = {"data.mdb", "lock.mdb"}
# Room for the pages of LMDB's trees that a write changes.
_PAGE_BYTES = 64 << 10

log = structlog.get_logger()


class DiskCacheError(RuntimeError):
    """The store cannot be opened; the message names the flag."""


class DiskCache:
    """Bytes by key, for one model."""

    def __init__(self, directory: Path, max_bytes: int, fingerprint: str) -> None:
        """Open the store of a model, or make a new one.

        Args:
            directory: Directory of all stores; made if it does not exist. Several servers may use it, with any models.
            max_bytes: Largest size of all stores together.
            fingerprint: Fingerprint of the model; values written for another one are never found.

        Raises:
            DiskCacheError: The directory cannot be used, or its files are no LMDB store.
        """
        self._directory, self._max_bytes = directory, max_bytes
        try:
            directory.mkdir(mode=_OWNERS_DIRECTORY, parents=True, exist_ok=True)
            self._path = directory / scope_of(fingerprint).hex()
            self._use = _use(self._path)
            # Without metasync a crash of the machine may lose the last writes, but never the store.
            self._store = lmdb.open(
                str(self._path), map_size=max_bytes, metasync=False, readahead=False, mode=_OWNERS_FILE
            )
            # Frees the reader slots of servers that were killed.
            self._store.reader_check()
        except (OSError, lmdb.Error) as error:
            raise DiskCacheError(f"--cache-dir {directory}: {error}") from error
        self._full = False
        self._waiting = 0
        self._readers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk-cache-read")
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk-cache-write")

    @staticmethod
    def check(directory: Path) -> None:
        """Raise ``DiskCacheError`` if no store can be made in a directory; the directory is made."""
        try:
            directory.mkdir(mode=_OWNERS_DIRECTORY, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory) as probe:
                lmdb.open(probe, map_size=1 << 20).close()
        except (OSError, lmdb.Error) as error:
            raise DiskCacheError(f"--cache-dir {directory}: {error}") from error

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
        os.utime(self._path / _USED)
        os.close(self._use)

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
            return [transaction.get(key) for key in keys]

    def _put(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        try:
            if not self._make_room(_PAGE_BYTES + 2 * sum(map(len, (*keys, *values)))):
                raise lmdb.MapFullError("the stores have reached their limit")
            with self._store.begin(write=True) as transaction:
                for key, value in zip(keys, values, strict=True):
                    transaction.put(key, value)
        except lmdb.MapFullError:
            self._full = True
            log.warning("disk cache full", rule="no more is written; raise --cache-dir-bytes")
        except lmdb.Error as error:
            log.warning("disk cache not written", reason=str(error))
        finally:
            self._waiting -= 1

    def _make_room(self, wanted: int) -> bool:
        """Delete the stores of other models, oldest first, until there is room; false if there is none."""
        while True:
            sizes = {path: _size(path) for path in self._directory.iterdir() if path != self._path}
            if _size(self._path) + sum(sizes.values()) + wanted <= self._max_bytes:
                return True
            for path in sorted((path for path in sizes if _is_store(path)), key=_last_use):
                if _delete_unused(path):
                    log.info("store deleted from the disk cache", store=path.name, bytes=sizes[path])
                    break
            else:
                return False


def _use(path: Path) -> int:
    """Make a model's directory, and hold it as long as the file descriptor that is returned is open."""
    while True:
        path.mkdir(mode=_OWNERS_DIRECTORY, exist_ok=True)
        path.chmod(_OWNERS_DIRECTORY)
        used = os.open(path / _USED, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, _OWNERS_FILE)
        fcntl.flock(used, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(used), os.stat(path / _USED)):
                os.utime(path / _USED)
                return used
        # Another server has deleted the directory between the two steps.
        os.close(used)


def _delete_unused(path: Path) -> bool:
    """Delete a store, unless a server holds it."""
    if path.name in _OLD_FILES:
        path.unlink(missing_ok=True)
        return True
    try:
        used = os.open(path / _USED, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
    except OSError:
        return False
    finally:
        os.close(used)
    return True


def _is_store(path: Path) -> bool:
    return path.name in _OLD_FILES or (path / _USED).exists()


def _last_use(path: Path) -> float:
    """Time of a store's last use; the single store of earlier versions comes first."""
    return 0.0 if path.name in _OLD_FILES else _stat(path / _USED)[1]


def _size(path: Path) -> int:
    return _stat(path if path.is_file() else path / "data.mdb")[0]


def _stat(path: Path) -> tuple[int, float]:
    """Size and date of a file; zeros if there is none."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0.0
    return status.st_size, status.st_mtime
