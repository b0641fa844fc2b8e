"""Where log lines go: standard error, as text with the time, or as systemd's journal wants them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import TextIO

LEVELS: Mapping[str, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class JournalFormatter(logging.Formatter):
    """One `<N>` in front of every line, with syslog's numbers (sd-daemon(3)); the journal has the time itself."""

    def __init__(self) -> None:
        super().__init__("%(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_priority(record.levelno)}>"
        # A traceback is many lines, and the journal reads each for itself.
        return "\n".join(prefix + line for line in super().format(record).splitlines() or [""])


def _priority(level: int) -> int:
    if level >= logging.CRITICAL:
        return 2
    if level >= logging.ERROR:
        return 3
    if level >= logging.WARNING:
        return 4
    return 6 if level >= logging.INFO else 7


class TextFormatter(logging.Formatter):
    """Local time with milliseconds, as waking takes some of them."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")


def set_up(level: str, stream: TextIO | None = None, environment: Mapping[str, str] = os.environ) -> None:
    """Sends this process's log to `stream` (standard error) from `level` on, a key of `LEVELS`.

    A second call replaces the first.
    """
    stream = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(stream)
    journal = _is_journal(stream, environment.get("JOURNAL_STREAM", ""))
    handler.setFormatter(JournalFormatter() if journal else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(LEVELS[level])
    # Their debug lines (the selector it chose, the bytes it decodes) tell nobody anything about containers.
    for name in ("asyncio", "grpc", "hpack"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _is_journal(stream: TextIO, journal_stream: str) -> bool:
    """Whether `stream` is the very socket that systemd names in JOURNAL_STREAM (systemd.exec(5)): the variable is
    inherited by processes whose standard error is something else."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return journal_stream == f"{status.st_dev}:{status.st_ino}"
