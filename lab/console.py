"""The frame of the lab's commands: their arguments, how they end, and what they show: lines with the time since the
start, and tables. Colour only on a terminal."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence

import grpc

from lab import LabError, requirements

_BOLD, _DIM, _GREEN, _RED, _PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[32m", "\x1b[31m", "\x1b[0m"


def arguments(module: str, doc: str | None) -> argparse.ArgumentParser:
    """For a module that is run by `python -m`, described by the first line of its docstring."""
    return argparse.ArgumentParser(prog=f"python -m {module}", description=(doc or "").partition("\n")[0])


class Console:
    """Writes to stdout, each line at once."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

    def say(self, text: str = "") -> None:
        """A line of what is being done, with the seconds since the start."""
        clock = f"{time.monotonic() - self._began:5.1f} s"
        self._write(f"{self._in(_DIM, clock)}  {text}" if text else "")

    def good(self, text: str) -> None:
        self.say(self._in(_GREEN, text))

    def bad(self, text: str) -> None:
        self.say(self._in(_RED, text))

    def block(self, text: str) -> None:
        """Lines of somebody else, indented as what is said."""
        self._write("\n" + "\n".join(f"         {line}" for line in text.rstrip().splitlines()) + "\n")

    def headline(self, text: str) -> None:
        self._write(self._in(_BOLD, text))

    def text(self, text: str = "") -> None:
        self._write(text)

    def attempt(self, what: str, work: Callable[[], object], *more: type[Exception]) -> int:
        """Does a command's work; returns its exit code. Of errors that may come, `more` are added to the usual ones."""
        errors: tuple[type[Exception], ...] = (LabError, grpc.RpcError, OSError, *more)
        try:
            requirements.check()
            work()
        except errors as error:
            self.bad(f"{what} failed: {sentence(error)}")
            return 1
        except KeyboardInterrupt:
            self.bad("interrupted; everything is cleaned up")
            return 130
        return 0

    def _in(self, colour: str, text: str) -> str:
        return f"{colour}{text}{_PLAIN}" if self._colour else text

    def _write(self, text: str) -> None:
        print(text, flush=True)


class Table:
    """A table that grows row by row. Columns are (heading, width); a heading's `|` breaks it into two lines, and a
    negative width aligns to the left."""

    def __init__(self, console: Console, columns: Sequence[tuple[str, int]]) -> None:
        self._console = console
        self._columns = columns
        upper, lower = zip(
            *((*heading.split("|"), "")[:2] if "|" in heading else ("", heading) for heading, _ in columns), strict=True
        )
        if any(upper):
            console.headline(self._line(upper))
        console.headline(self._line(lower))

    def row(self, *cells: str) -> None:
        self._console.text(self._line(cells))

    def _line(self, cells: Sequence[str]) -> str:
        aligned = (
            cell.ljust(-width) if width < 0 else cell.rjust(width)
            for cell, (_, width) in zip(cells, self._columns, strict=True)
        )
        return "  ".join(aligned).rstrip()


def sentence(error: BaseException) -> str:
    """What went wrong, also where it is an answer of gRPC, or an error that says nothing but its name."""
    if isinstance(error, grpc.RpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__


def milliseconds(seconds: float) -> str:
    """`0.42 ms`, `18.3 ms`, `412 ms`: three digits are what these numbers are worth."""
    value = seconds * 1e3
    return f"{value:.2f} ms" if value < 9.995 else f"{value:.1f} ms" if value < 99.95 else f"{value:.0f} ms"


def size(count: float) -> str:
    """Bytes as MiB, or KiB below a tenth of one."""
    return f"{count / 2**20:.1f} MiB" if count >= 0.1 * 2**20 else f"{count / 2**10:.0f} KiB"
