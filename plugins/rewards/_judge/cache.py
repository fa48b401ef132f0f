"""Replies of a judge on disk, found again by what was asked, and equal requests one after the other."""

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

logger = logging.getLogger(__name__)

TABLE = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, request TEXT NOT NULL, reply TEXT NOT NULL)"


class Replies:
    """A file of SQLite with a row per request. Several processes may share it. It can be copied and pickled."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None

    def __reduce__(self) -> Any:
        return Replies, (self.path,)

    def key(self, url: str, request: dict[str, Any]) -> str:
        """SHA-256 of where a request goes and all that it says."""
        return hashlib.sha256(json.dumps([url, request], sort_keys=True).encode()).hexdigest()

    def find(self, key: str) -> str | None:
        """The reply to a request, None where it is not known. Raises `ValueError` where the file is no such cache."""
        with self._lock:
            try:
                row = self._open().execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
            except sqlite3.Error as error:
                raise ValueError(f"cache {self.path}: {error}; name another file, or none") from error
        return None if row is None else str(row[0])

    def keep(self, key: str, request: dict[str, Any], reply: str) -> None:
        """Write a reply down. One that cannot be written costs another request one day, and no score now."""
        # surrogates: half of a pair, which SQLite's UTF-8 cannot hold
        values = (key, json.dumps(request), reply.encode("utf-8", "replace").decode())
        with self._lock:
            try:
                with self._open() as database:
                    database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", values)
            except sqlite3.Error as error:
                logger.warning("rewards.judge: the reply is not kept in %s: %s", self.path, error)

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
                database.execute("PRAGMA journal_mode=WAL")
                database.execute("PRAGMA synchronous=NORMAL")
                database.execute(TABLE)
            except sqlite3.Error:
                database.close()
                raise
            self._database = database
        return self._database


class Turns:
    """A lock for each request that is under way, in each event loop: who asks the same waits for the first one's reply."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[Any, asyncio.Lock] = WeakValueDictionary()

    def __reduce__(self) -> Any:
        return Turns, ()

    def of(self, key: str) -> asyncio.Lock:
        """The lock of a request."""
        return self._locks.setdefault((asyncio.get_running_loop(), key), asyncio.Lock())
