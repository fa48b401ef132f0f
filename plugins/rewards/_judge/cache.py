"""On-disk cache of a judge's replies, keyed by request, and locks that serialize equal requests."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import sqlite3
import threading
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from tenacity import Retrying, retry_if_exception_message, stop_after_delay, wait_fixed

logger = logging.getLogger(__name__)

TABLE = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, request TEXT NOT NULL, reply TEXT NOT NULL)"


class Replies:
    """SQLite file with a row per request. Several processes may share it; it can be copied and pickled."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None

    def __reduce__(self) -> Any:
        return Replies, (self.path,)

    def key(self, url: str, request: dict[str, Any]) -> str:
        """Return the SHA-256 of a request's URL and content."""
        return hashlib.sha256(json.dumps([url, request], sort_keys=True).encode()).hexdigest()

    def find(self, key: str) -> str | None:
        """Return the cached reply to a request, or None. Raises `ValueError` if the file is not such a cache."""
        with self._lock:
            try:
                row = self._open().execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
            except sqlite3.Error as error:
                raise ValueError(f"cache {self.path}: {error}. Use another file, or no cache") from error
        return None if row is None else str(row[0])

    def keep(self, key: str, request: dict[str, Any], reply: str) -> None:
        """Store a reply. A failed write logs a warning and leaves the score valid."""
        # lone surrogates cannot be stored as SQLite's UTF-8
        values = (key, json.dumps(request), reply.encode("utf-8", "replace").decode())
        with self._lock:
            try:
                with self._open() as database:
                    database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", values)
            except sqlite3.Error as error:
                logger.warning("rewards.judge: cannot store the reply in %s: %s", self.path, error)

    def close(self) -> None:
        """Close the file; a later call opens it again."""
        with self._lock:
            if self._database is not None:
                self._database.close()
            self._database = None

    def _open(self) -> sqlite3.Connection:
        if self._database is None:
            place = Path(self.path).expanduser()
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise sqlite3.OperationalError(str(error)) from error
            database = sqlite3.connect(place, timeout=30.0, check_same_thread=False)
            try:
                locked = retry_if_exception_message("database is locked")
                for attempt in Retrying(retry=locked, wait=wait_fixed(0.05), stop=stop_after_delay(30), reraise=True):
                    with attempt:  # another process that changes the mode is not waited for by SQLite
                        database.execute("PRAGMA journal_mode=WAL")
                database.execute("PRAGMA synchronous=NORMAL")
                database.execute(TABLE)
            except sqlite3.Error:
                database.close()
                raise
            self._database = database
        return self._database


class Turns:
    """Lock per pending request and event loop, so that equal requests wait for the first one's reply."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[Any, asyncio.Lock] = WeakValueDictionary()

    def __reduce__(self) -> Any:
        return Turns, ()

    def of(self, key: str) -> asyncio.Lock:
        """Return the lock of a request."""
        return self._locks.setdefault((asyncio.get_running_loop(), key), asyncio.Lock())
