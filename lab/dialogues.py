"""What the soak's callers say to each application, in its own wire protocol, and how they know the answer to be right.

A caller counts its requests. Each application keeps the count as well (a counter, a line of its log, a row), so that
each answer tells whether all before it were served once and in order. Each also tells the address that it sees as the
caller's, which has to be the caller's own.

    with application.open(sock, "redis/open/IPv4") as session:
        session.ask(1)        # raises WrongAnswer, or whatever the protocol's client raises
"""

import contextlib
import re
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import pg8000.native
import pymysql

from lab.closing import Closing
from lab.kubelet import Container
from lab.recipes import LARGE_PAGE

# Seconds that a caller waits for an answer. A wake takes a tenth of one on a busy machine.
PATIENCE = 15.0
_TABLE = "CREATE TABLE IF NOT EXISTS soak (caller VARCHAR(40), n INT, peer VARCHAR(60), PRIMARY KEY (caller, n))"
_COUNTS = "SELECT caller, COUNT(*), MAX(n) FROM soak GROUP BY caller"


class WrongAnswer(Exception):
    """An answer came, but not the right one."""


class Session(Protocol):
    """One connection of a caller."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def ask(self, number: int) -> None:
        """The caller's request of this number. Raises WrongAnswer, OSError or an error of the protocol's client."""

    def close(self) -> None: ...


def own_address(sock: socket.socket) -> str:
    return str(sock.getsockname()[0])


class _Plain(Closing):
    """A session over a bare socket."""

    def __init__(self, sock: socket.socket, caller: str) -> None:
        self._socket = sock
        self._caller = caller
        self._address = own_address(sock)
        self._file = sock.makefile("rb")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def _line(self) -> str:
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError(f"closed in the middle of an answer, after {line!r}")
        return line.decode().rstrip("\r\n")

    def _exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) != size:
            raise ConnectionError(f"closed after {len(data)} of {size} bytes")
        return data


class RedisSession(_Plain):
    def ask(self, number: int) -> None:
        # Two commands in one segment: the counter, and who redis takes us for.
        self._socket.sendall(_resp("INCR", self._caller) + _resp("CLIENT", "INFO"))
        if (counted := self._line()) != f":{number}":
            raise WrongAnswer(f"INCR gave {counted} instead of :{number}")
        size = self._line()
        if not size.startswith("$"):
            raise WrongAnswer(f"CLIENT INFO gave {size}")
        info = self._exactly(int(size[1:]) + 2).decode()
        # IPv6 addresses come with or without brackets, by redis' version.
        found = re.search(r" addr=\[?(.*?)\]?:\d+ ", info)
        _same_address(found[1] if found else "", self._address)

    def client_id(self) -> int:
        """Redis' own number of this connection: no other has it."""
        self._socket.sendall(_resp("CLIENT", "ID"))
        return int(self._line().removeprefix(":"))

    def all_keys(self) -> list[str]:
        self._socket.sendall(_resp("KEYS", "*"))
        return [self._string() for _ in range(int(self._line()[1:]))]

    def get(self, key: str) -> str:
        self._socket.sendall(_resp("GET", key))
        return self._string()

    def _string(self) -> str:
        size = int(self._line()[1:])
        return self._exactly(size + 2)[:size].decode()


def _resp(*words: str) -> bytes:
    return f"*{len(words)}\r\n".encode() + b"".join(f"${len(w.encode())}\r\n{w}\r\n".encode() for w in words)


class HttpSession(_Plain):
    def ask(self, number: int) -> None:
        # Each third is large: it takes many segments, and a while.
        path, wanted = ("/large.txt", LARGE_PAGE) if number % 3 == 0 else ("/", "nginx in the lab\n")
        request = f"GET {path}?{self._caller}={number} HTTP/1.1\r\nHost: lab\r\n\r\n"
        self._socket.sendall(request.encode())
        if (status := self._line()) != "HTTP/1.1 200 OK":
            raise WrongAnswer(f"{path}: {status}")
        size = 0
        while header := self._line():
            name, _, value = header.partition(":")
            if name.lower() == "content-length":
                size = int(value)
        body = self._exactly(size).decode()
        if body != wanted:
            raise WrongAnswer(f"{path} has another body: {body[:80]!r}, {len(body)} characters")


class MariadbSession(Closing):
    def __init__(self, sock: socket.socket, caller: str) -> None:
        self._caller = caller
        self._address = own_address(sock)
        self._connection = pymysql.Connection(
            user="lab", password="lab", database="lab", autocommit=True, defer_connect=True,
            read_timeout=PATIENCE, write_timeout=PATIENCE,
        )  # fmt: skip
        self._connection.connect(sock)

    def run(self, statement: str, *values: Any) -> Any:
        with self._connection.cursor() as cursor:
            cursor.execute(statement, values or None)
            return cursor.fetchall()

    def ask(self, number: int) -> None:
        insert = "INSERT INTO soak VALUES (%s, %s, SUBSTRING_INDEX(USER(), '@', -1)) RETURNING n, peer"
        rows = self.run(insert, self._caller, number)
        _one_row(rows, number, self._address)

    def close(self) -> None:
        with contextlib.suppress(pymysql.Error):
            self._connection.close()


class PostgresqlSession(Closing):
    def __init__(self, sock: socket.socket, caller: str) -> None:
        self._caller = caller
        self._address = own_address(sock)
        self._connection = pg8000.native.Connection("lab", database="postgres", sock=sock)

    def run(self, statement: str, **values: Any) -> Any:
        return self._connection.run(statement, **values)

    def ask(self, number: int) -> None:
        insert = "INSERT INTO soak VALUES (:caller, :number, host(inet_client_addr())) RETURNING n, peer"
        _one_row(self.run(insert, caller=self._caller, number=number), number, self._address)

    def close(self) -> None:
        with contextlib.suppress(pg8000.native.Error, OSError):
            self._connection.close()


def _one_row(rows: Any, number: int, address: str) -> None:
    if len(rows) != 1 or rows[0][0] != number:
        raise WrongAnswer(f"the row {number} came back as {rows}")
    _same_address(rows[0][1], address)


def _same_address(seen: str, own: str) -> None:
    if seen.removeprefix("::ffff:") != own:
        raise WrongAnswer(f"it takes {seen} for the caller, which is {own}")


@dataclass(frozen=True)
class Application:
    """An image of the lab, with what is said to it. `counts` tells how many requests of each caller it has served;
    `prepare` what a new one needs first."""

    image: str
    port: int
    open: Callable[[socket.socket, str], Session]
    prepare: Callable[[socket.socket], None]
    counts: Callable[[socket.socket, Container], dict[str, int]]
    """By caller. Raises WrongAnswer if a request was served twice or left out."""


def _nothing(sock: socket.socket) -> None:
    """Where a bare connection shows that it is ready."""


def _redis_counts(sock: socket.socket, container: Container) -> dict[str, int]:
    with RedisSession(sock, "") as session:
        return {key: int(session.get(key)) for key in session.all_keys()}


def _nginx_counts(sock: socket.socket, container: Container) -> dict[str, int]:
    """From its log: each request once, from the right address, in order."""
    sock.close()
    # Its last lines are still on their way through the shim.
    time.sleep(0.5)
    lines = re.findall(r'^(\S+) .*"GET /\S*\?(\S+)=(\d+) HTTP', container.logs(), re.MULTILINE)
    numbers: dict[str, list[int]] = {}
    for _, caller, number in lines:
        numbers.setdefault(caller, []).append(int(number))
    for caller, found in numbers.items():
        twice = [number for number, times in Counter(found).items() if times > 1]
        missing = sorted(set(range(1, max(found) + 1)) - set(found))
        if twice or missing:
            raise WrongAnswer(f"nginx's log has requests of {caller} twice: {twice}, or not at all: {missing}")
    return {caller: len(found) for caller, found in numbers.items()}


def _database_counts(session: MariadbSession | PostgresqlSession) -> dict[str, int]:
    with session:
        rows = session.run(_COUNTS)
    for caller, count, last in rows:
        if count != last:
            raise WrongAnswer(f"{caller} has {count} rows up to number {last}")
    return {caller: int(count) for caller, count, _ in rows}


def _prepare_database(open_session: Callable[[socket.socket, str], Any]) -> Callable[[socket.socket], None]:
    def prepare(sock: socket.socket) -> None:
        with open_session(sock, "") as session:
            session.run(_TABLE)

    return prepare


APPLICATIONS = {
    "redis": Application("redis", 6379, RedisSession, _nothing, _redis_counts),
    "nginx": Application("nginx", 80, HttpSession, _nothing, _nginx_counts),
    "mariadb": Application(
        "mariadb", 3306, MariadbSession, _prepare_database(MariadbSession),
        lambda sock, _: _database_counts(MariadbSession(sock, "")),
    ),
    "postgresql": Application(
        "postgresql", 5432, PostgresqlSession, _prepare_database(PostgresqlSession),
        lambda sock, _: _database_counts(PostgresqlSession(sock, "")),
    ),
}  # fmt: skip
