"""A line of JSON for each finished request, in a file that is renamed when it is full."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from logging.handlers import RotatingFileHandler
from pathlib import Path

from energylens_vllm.serving.attribution import Account

MAX_BYTES = 64 * 2**20
BACKUPS = 4  #: full files that are kept: .1 is the latest


class RequestLog:
    """Appends to `path`. Raises OSError if that cannot be opened, and later if it cannot be written."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES, backups: int = BACKUPS) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handler = _Handler(path, maxBytes=max_bytes, backupCount=backups, encoding="utf-8")

    def __call__(self, accounts: Sequence[Account]) -> None:
        """Write the accounts of requests that have finished."""
        for account in accounts:
            line = json.dumps({"time": round(time.time(), 3), "request_id": account.request_id, **account.as_dict()})
            self._handler.emit(logging.makeLogRecord({"msg": line}))

    def close(self) -> None:
        self._handler.close()


class _Handler(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Called where an exception is being handled; print nothing, let it out."""
        raise
