"""Dump and restore in place, with runc and CRIU alone: what survives, what is refused, and what nobody can break."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
import textwrap
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from box import CAPABILITIES, Box, ask, redis, until
from specimen import PATIENCE

from criproxy import run
from criproxy.criu import command, init, store
from criproxy.criu.bundle import Bundle
from criproxy.criu.checkpoint import Criu
from criproxy.criu.errors import CheckpointError, RestoreError
from criproxy.criu.saved import AttributesChanged
from criproxy.kernel import processes

# Debian's redis-tools has the server too, under the name of its checker; argv[0] decides what it is.
REDIS = ["bash", "-c", 'exec -a redis-server redis-check-rdb "$@"', "redis", "--save", "", "--dir", "/data"]


def python(code: str) -> list[str]:
    return ["/usr/bin/python3", "-u", "-c", code]


async def cycle(criu: Criu, box: Box, images: Path, times: int = 3) -> None:
    for _ in range(times):
        await criu.dump(box.pid, images)
        assert processes.children(box.pid) == []
        assert box.running()
        await criu.restore(box.pid, images)
        assert await criu.verify(box.pid, images) == []


# --- What survives ----------------------------------------------------------------------------------------------------


async def test_redis_keeps_its_data(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    container = box(*REDIS)
    with redis(container) as connection:
        assert ask(connection, "SET key value") == "+OK"
    before = _pids(container)
    await cycle(criu, container, images, 5)
    assert _pids(container) == before
    with redis(container) as connection:
        assert ask(connection, "GET key").endswith("value")
    os.kill(container.pid, signal.SIGTERM)
    assert container.wait() == 0


async def test_an_open_connection_is_the_same_afterwards(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    container = box(*REDIS)
    with redis(container) as connection:
        for number in range(3):
            assert ask(connection, f"SET key {number}") == "+OK"
            await _silence(container)
            await cycle(criu, container, images, 1)
            assert ask(connection, "GET key").endswith(str(number))


async def test_nginx_with_workers_of_another_user(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    config = (
        "daemon off; master_process on; worker_processes 2; user www-data; pid /tmp/pid; error_log stderr;"
        "events {} http { access_log off; server { listen 80; return 200 hello; } }"
    )
    for name in ("body", "proxy", "fastcgi", "uwsgi", "scgi"):
        config = config.replace("http {", f"http {{ {name_of_path(name)} /tmp/{name};", 1)
    script = f"mkdir -p /tmp/log; echo '{config}' > /tmp/nginx.conf; exec nginx -e stderr -c /tmp/nginx.conf"
    container = box("sh", "-c", script)
    # Two workers, which have become www-data.
    until(lambda: [thread.cap_prm for thread in _attributes(container).values()].count(0) == 2)
    await cycle(criu, container, images)
    with container.connect(80) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = b""
        while chunk := connection.recv(4096):
            answer += chunk
    assert answer.endswith(b"hello")
    os.kill(container.pid, signal.SIGQUIT)
    assert container.wait() == 0


THREADS = """
import os, threading, time
processors = sorted(os.sched_getaffinity(0))
chosen = threading.Barrier(6)
def work(number):
    os.sched_setaffinity(0, {processors[number % len(processors)]})
    chosen.wait()
    while True:
        time.sleep(0.01)
for number in range(5):
    threading.Thread(target=work, args=(number,), daemon=True).start()
chosen.wait()
print("ready")
for line in open(0):
    print(threading.active_count())
"""


async def test_threads_and_their_processors(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    container = box(*python(THREADS))
    container.hear("ready")
    before = _attributes(container)
    assert len(before) == 7  # and the guard
    await cycle(criu, container, images)
    assert _attributes(container) == before
    os.write(container.stdin, b"\n")
    container.hear("6")


DAEMONS = """
import os, sys, time
for number in range(2):
    if (child := os.fork()) == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        while True:
            time.sleep(0.01)
    # Ended, and not awaited: it stays as a zombie.
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
os.setgid(65534), os.setuid(65534)
print("ready")
for line in open(0):
    print(os.getuid(), os.getpid())
sys.exit(9)
"""


async def test_daemons_and_another_user(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    container = box(*python(DAEMONS))
    container.hear("ready")
    before, attributes = _pids(container), _attributes(container)
    assert len(before) >= 4
    await cycle(criu, container, images)
    assert _pids(container) == before
    assert _attributes(container) == attributes
    os.write(container.stdin, b"\n")
    container.hear("65534")
    # Standard input is the same pipe, and so is its end.
    os.close(container.stdin)
    container.stdin = os.open("/dev/null", os.O_RDONLY)
    assert container.wait() == 9


async def test_a_closed_stdin_doesnt_block_the_restore(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    container = box(*python("import time\nprint('ready')\nwhile True: time.sleep(0.01)"))
    container.hear("ready")
    os.close(container.stdin)
    container.stdin = os.open("/dev/null", os.O_RDONLY)
    await cycle(criu, container, images)


async def test_output_is_neither_lost_nor_doubled(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    code = "import itertools, time\nfor n in itertools.count():\n  print(f'{n};')\n  time.sleep(0.001)"
    container = box(*python(code))
    heard = container.hear("5;")
    # Nobody reads meanwhile: what was written before the dump is still in the pipe.
    await cycle(criu, container, images, 5)
    heard += container.hear("9;")
    numbers = heard.split()[:-1]
    assert numbers == [f"{number};" for number in range(len(numbers))]


async def test_confinement_is_as_before(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    def confine(config: dict[str, Any]) -> None:
        config["linux"]["seccomp"] = {
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64" if os.uname().machine == "x86_64" else "SCMP_ARCH_AARCH64"],
            "syscalls": [{"names": ["io_uring_setup"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}],
        }
        config["process"]["oomScoreAdj"] = 500

    container = box(
        *REDIS, user=(999, 999), capabilities=["CAP_NET_BIND_SERVICE"], no_new_privs=True, change=confine
    )  # fmt: skip
    with redis(container):
        pass
    before = _attributes(container)
    one = next(iter(before.values()))
    assert (one.seccomp, one.no_new_privs, one.oom_score_adj, one.cap_bnd) == (2, True, 500, 1 << 10)
    await cycle(criu, container, images)
    assert _attributes(container) == before


async def test_nothing_of_ours_is_inherited(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    """Neither descriptors nor the cgroup, the keyring or the oom_score_adj of whoever restores."""
    container = box(*python("import time\nprint('ready')\nwhile True: time.sleep(0.01)"))
    container.hear("ready")
    application = init.application_pid(container.pid)
    assert application is not None
    before = sorted(os.listdir(f"/proc/{application}/fd")), Path(f"/proc/{application}/cgroup").read_text()
    ours = Path("/proc/self/oom_score_adj")
    was = ours.read_text()
    ours.write_text("100")
    try:
        await cycle(criu, container, images)
    finally:
        with contextlib.suppress(PermissionError):
            ours.write_text(was)
    application = init.application_pid(container.pid)
    assert application is not None
    assert (sorted(os.listdir(f"/proc/{application}/fd")), Path(f"/proc/{application}/cgroup").read_text()) == before
    assert os.listdir(f"/proc/{init.guard_pid(container.pid)}/fd") == []


@pytest.mark.parametrize("stop", [True, False], ids=["stop", "continue"])
async def test_the_monotonic_clock(stop: bool, box: Callable[..., Box], criu: Criu, images: Path) -> None:
    """Either way it never goes back, and a sleep that was under way lasts for as long as it should by it."""
    code = """
        import threading, time
        def sleep():
            began = time.monotonic()
            time.sleep(1.5)
            print(f"slept {time.monotonic() - began}")
        sleeping = threading.Thread(target=sleep)
        sleeping.start()
        print("ready")
        for _ in range(2):
            input()
            print(f"now {time.monotonic()}")
        sleeping.join()
    """
    container = box(*python(textwrap.dedent(code)))
    container.hear("ready\n")
    heard = ""

    def now() -> tuple[float, float, float]:
        """By its clock, and by ours before it was asked and after it has answered."""
        nonlocal heard
        before = time.monotonic()
        os.write(container.stdin, b"\n")
        said = ""
        while "now " not in said:
            said += container.hear("\n")
        heard += said
        return before, float(said.split("now ")[1].split()[0]), time.monotonic()

    earliest, began, first_answer = now()
    asleep = 0.0
    for _ in range(2):
        await criu.dump(container.pid, images, stop_clock=stop)
        dumped = time.monotonic()
        await asyncio.sleep(0.4)
        asleep += time.monotonic() - dumped
        await criu.restore(container.pid, images)
    last_question, ended, latest = now()
    if stop:
        assert 0 < ended - began < latest - earliest - asleep
    else:
        assert last_question - first_answer <= ended - began <= latest - earliest
    assert container.wait() == 0
    heard += container.said()
    assert float(heard.split("slept ")[1].split()[0]) >= 1.5


async def test_the_exit_code_after_cycles(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    container = box("sh", "-c", "trap 'exit 11' TERM; echo ready; while :; do sleep 0.01; done")
    container.hear("ready")
    await cycle(criu, container, images)
    os.kill(container.pid, signal.SIGTERM)
    assert container.wait() == 11


async def test_a_crash_right_after_a_restore_is_a_crash(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    container = box("sleep", "1000")
    await criu.dump(container.pid, images)
    real = init.release

    def crash_first(init_pid: int) -> None:
        application = init.application_pid(init_pid)
        assert application is not None
        os.kill(application, signal.SIGSEGV)
        until(lambda: not processes.children(init_pid))
        real(init_pid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init, "release", crash_first)
        await criu.restore(container.pid, images)
    assert container.wait() == 128 + signal.SIGSEGV


async def test_started_afresh_after_a_dump(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    container = box(*REDIS)
    with redis(container) as connection:
        ask(connection, "SET key value")
    await criu.dump(container.pid, images)
    store.discard(images)
    assert not store.complete(images)
    init.start(container.pid)
    with redis(container) as connection:
        assert ask(connection, "GET key") == "$-1"
    await cycle(criu, container, images)
    os.kill(container.pid, signal.SIGTERM)
    assert container.wait() == 0


async def test_killing_a_checkpointed_container_leaves_nothing(
    box: Callable[..., Box], criu: Criu, images: Path
) -> None:
    container = box("sleep", "1000")
    await criu.dump(container.pid, images)
    assert images.stat().st_mode & 0o777 == 0o700
    os.kill(container.pid, signal.SIGKILL)
    assert container.wait() == 137
    with pytest.raises(RestoreError, match="has ended"):
        await criu.restore(container.pid, images)
    store.discard(images)
    assert not images.exists()


# --- What is refused --------------------------------------------------------------------------------------------------


async def test_a_wait_that_a_signal_ends_is_over(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    code = """
import select, signal
def handler(*_):
    raise InterruptedError
signal.signal(signal.SIGUSR1, handler)
try:
    print("ready")
    select.poll().poll(100_000)
except InterruptedError:
    print("woken")
"""
    container = box(*python(code))
    container.hear("ready")
    application = init.application_pid(container.pid)
    assert application is not None
    until(lambda: Path(f"/proc/{application}/stat").read_text().split(") ")[1][0] == "S")
    # Stopped, so that its handler can't run before the dump.
    os.kill(application, signal.SIGSTOP)
    until(lambda: Path(f"/proc/{application}/stat").read_text().split(") ")[1][0] == "T")
    os.kill(application, signal.SIGUSR1)
    await criu.dump(container.pid, images)
    await criu.restore(container.pid, images)
    application = init.application_pid(container.pid)
    assert application is not None
    os.kill(application, signal.SIGCONT)
    container.hear("woken")


IO_URING = """
import ctypes, time
fd = ctypes.CDLL(None).syscall(425, 4, ctypes.create_string_buffer(512))
assert fd >= 0
print("ready")
while True:
    time.sleep(0.01)
"""

REFUSED = {
    "uses io_uring": IO_URING,
    "it listens with MPTCP": """
import socket, time
s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
s.bind(("", 8080))
s.listen()
print("ready")
while True:
    time.sleep(0.01)
""",
    "a unix socket of it is connected to a process outside": """
import socket, time
s = socket.socket(socket.AF_UNIX)
s.connect("/data/socket")
print("ready")
while True:
    time.sleep(0.01)
""",
}


@pytest.mark.parametrize("reason", REFUSED)
async def test_what_cant_be_dumped_goes_on_and_says_why(
    reason: str, box: Callable[..., Box], criu: Criu, images: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as outside:

        def listen(config: dict[str, Any]) -> None:
            path = Path(next(m["source"] for m in config["mounts"] if m["destination"] == "/data")) / "socket"
            outside.bind(str(path))
            outside.listen()

        try:
            container = box(*python(REFUSED[reason]), change=listen)
            container.hear("ready")
        except AssertionError as error:
            if "Protocol not" in str(error) or "AssertionError" in str(error):
                pytest.skip(f"this kernel doesn't have it: {error}")
            raise
        for _ in range(2):
            with pytest.raises(CheckpointError, match=reason):
                await criu.dump(container.pid, images)
            assert not images.exists()
            application = init.application_pid(container.pid)
            assert application is not None
            until(lambda pid=application: Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] in "SR")  # type: ignore[misc]
        # It isn't held any more.
        os.kill(application, signal.SIGKILL)
        assert container.wait() == 137


async def test_where_no_connection_can_be_kept_one_is_a_refusal(
    box: Callable[..., Box], criu: Criu, images: Path
) -> None:
    code = """
import socket, time
server = socket.create_server(("127.0.0.1", 8080))
client = socket.create_connection(("127.0.0.1", 8080))
accepted, _ = server.accept()
print("ready")
while True:
    client.sendall(b"?")
    assert accepted.recv(1) == b"?"
    time.sleep(0.01)
"""
    container = box(*python(code))
    container.hear("ready")
    with pytest.raises(CheckpointError, match="it has an open connection, which can't be kept"):
        await criu.dump(container.pid, images, keep=False)
    assert not images.exists()
    assert init.application_pid(container.pid) is not None
    await criu.dump(container.pid, images)


async def test_who_could_trace_criu_isnt_dumped(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    container = box("sleep", "1000", capabilities=[*CAPABILITIES, "CAP_SYS_PTRACE"])
    with pytest.raises(CheckpointError, match="CAP_SYS_PTRACE"):
        await criu.dump(container.pid, images)
    assert container.running()


async def test_a_restore_that_fails_can_be_tried_again(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    container = box(*python("import time\nf = open('/root/file', 'w')\nprint('ready')\nwhile True: time.sleep(0.01)"))
    container.hear("ready")
    await criu.dump(container.pid, images)
    folder = container.folder / "root/root"
    (folder / "file").rename(folder / "moved")
    for _ in range(2):
        with pytest.raises(RestoreError, match="a file that it has open is gone"):
            await criu.restore(container.pid, images)
        assert container.running()
    (folder / "moved").rename(folder / "file")
    await criu.restore(container.pid, images)
    os.kill(container.pid, signal.SIGTERM)
    assert container.wait() == 143


async def test_attributes_that_grew_are_an_error_and_others_are_put_back(
    box: Callable[..., Box], criu: Criu, images: Path
) -> None:
    container = box("sleep", "1000")
    every = os.sched_getaffinity(container.pid)
    application = init.application_pid(container.pid)
    assert application is not None
    os.sched_setaffinity(application, {min(every)})
    await cycle(criu, container, images, 1)
    saved = images.with_name("checkpoint.json")
    data = json.loads(saved.read_text())
    application = init.application_pid(container.pid)
    assert application is not None
    os.sched_setaffinity(application, every)
    assert await criu.verify(container.pid, images) == []
    assert os.sched_getaffinity(application) == {min(every)}

    def grew(**fields: object) -> None:
        changed = {tid: thread | fields for tid, thread in data["threads"].items()}
        saved.write_text(json.dumps(data | {"threads": changed}))

    for field, value, text in (
        ("cap_eff", 1, "capabilities"),
        ("no_new_privs", True, "NoNewPrivs"),
        ("seccomp", 2, "seccomp"),
        ("label", "confined", "label"),
    ):
        grew(**{field: value})
        with pytest.raises(AttributesChanged, match=text):
            await criu.verify(container.pid, images)


# --- What goes wrong --------------------------------------------------------------------------------------------------


async def test_whoever_is_cancelled_waits_for_the_end(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    container = box(*REDIS)
    with redis(container) as connection:
        ask(connection, "SET key value")
        for milliseconds in range(1, 30, 4):
            await _silence(container)
            # The dump waits for that, and may still be cancelled then.
            until(lambda: not init._pending(container.pid))
            await _cancel(criu.dump(container.pid, images), milliseconds)
            assert store.complete(images)
            await _cancel(criu.restore(container.pid, images), milliseconds)
            assert ask(connection, "GET key").endswith("value")


async def test_whoever_is_cancelled_is_told_so_also_when_the_container_is_killed(
    box: Callable[..., Box], criu: Criu, images: Path
) -> None:
    for milliseconds in range(2, 12, 3):
        caught = False
        while not caught:
            container = box(*REDIS)
            dumping = asyncio.ensure_future(criu.dump(container.pid, images))
            await asyncio.sleep(milliseconds / 1000)
            # On a busy machine CRIU may be faster than we are.
            caught = not dumping.done()
            os.kill(container.pid, signal.SIGKILL)
            if caught:
                dumping.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await dumping
            else:
                await dumping


@pytest.mark.parametrize("who", ["the time-out", "somebody"])
async def test_a_criu_killed_in_the_middle_of_a_dump_leaves_nothing_hanging(
    who: str, box: Callable[..., Box], criu: Criu, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it writes memory: the application's sockets are in repair mode then, and CRIU's code is in it.

    Most often all goes on, connections included. In some of its moments CRIU's death is also the application's; then
    the container ends, as after any crash.
    """
    real = command._to_the_end

    async def until_killed(
        running: run.Running, timeout: float, _loader: object = None
    ) -> tuple[int | None, asyncio.CancelledError | None]:
        while timeout > 1 and not (images / "pages-2.img").exists() and running.poll() is None:
            await asyncio.sleep(0)
        if timeout > 1 and who == "the time-out":
            return None, None
        # It may have ended by itself.
        with contextlib.suppress(ProcessLookupError):
            for pid in processes.children(running.pid):
                os.kill(pid, signal.SIGKILL)
        return await real(running, timeout)

    survived = 0
    while survived < 4:
        container = box(*REDIS)
        with redis(container) as connection:
            for number in range(2):
                assert ask(connection, f"SET key {number}") == "+OK"
                await _silence(container)
                with monkeypatch.context() as patch:
                    patch.setattr(command, "_to_the_end", until_killed)
                    try:
                        await criu.dump(container.pid, images)
                    except CheckpointError:
                        assert not images.exists()
                if images.exists():  # it was faster
                    await criu.restore(container.pid, images)
                try:
                    assert ask(connection, "GET key").endswith(str(number))
                except (OSError, AssertionError):
                    assert container.wait() > 128
                    break
                survived += 1


async def test_a_restore_that_was_killed_can_be_done_again(
    box: Callable[..., Box], criu_bundle: Bundle, images: Path
) -> None:
    container = box(*REDIS)
    with redis(container) as connection:
        ask(connection, "SET key value")
    await Criu(criu_bundle).dump(container.pid, images)
    killed = 0
    for milliseconds in range(2, 30, 2):
        try:
            await Criu(criu_bundle, restore_timeout=milliseconds / 1000).restore(container.pid, images)
        except RestoreError:
            killed += 1
            assert processes.children(container.pid) == []
        else:
            await Criu(criu_bundle).dump(container.pid, images)
    assert killed
    await Criu(criu_bundle).restore(container.pid, images)
    with redis(container) as connection:
        assert ask(connection, "GET key").endswith("value")


async def test_the_container_cant_slip_code_or_configuration_to_criu(
    box: Callable[..., Box], criu: Criu, images: Path
) -> None:
    """CRIU runs in its mounts with the host's rights; every file it would take there by itself is a way out."""
    container = box(*REDIS)
    with redis(container):
        pass
    root = container.folder / "root"
    for path in ("etc/ld.so.preload", "etc/ld.so.cache", "etc/criu/default.conf", "root/.criu/default.conf"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("/evil.so\naction-script /evil\nno-such-option\n")
    opened = _opened_inside(container, root)
    with opened as paths:
        await cycle(criu, container, images)
    assert not [path for path in paths if path.startswith("/etc/") or "/.criu" in path or path.endswith(".so")], paths


# --- Inside -----------------------------------------------------------------------------------------------------------


def _pids(container: Box) -> list[int]:
    guard = init.guard_pid(container.pid)
    assert guard is not None
    numbers = []
    for pid in processes.tree(guard):
        with contextlib.suppress(ProcessLookupError):
            numbers.append(processes.ns_pid(pid))
    return sorted(numbers)


def _attributes(container: Box) -> dict[int, processes.ThreadAttributes]:
    guard = init.guard_pid(container.pid)
    assert guard is not None
    return processes.attributes(processes.tree(guard))


async def _silence(container: Box) -> None:
    """Until the client's kernel has acknowledged the last answer, some 40 ms after it: nobody parks packets here."""

    def unacknowledged() -> list[str]:
        lines = [line.split() for line in Path(f"/proc/{container.pid}/net/tcp").read_text().splitlines()[1:]]
        # Established connections (01) with bytes in one of their queues.
        return [line[1] for line in lines if line[3] == "01" and line[4] != "00000000:00000000"]

    deadline = time.monotonic() + PATIENCE
    while unacknowledged():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def _cancel(what: Coroutine[object, object, object], milliseconds: int) -> None:
    task = asyncio.ensure_future(what)
    await asyncio.sleep(milliseconds / 1000)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def name_of_path(name: str) -> str:
    return "client_body_temp_path" if name == "body" else f"{name}_temp_path"


@contextlib.contextmanager
def _opened_inside(container: Box, root: Path) -> Iterator[Sequence[str]]:
    """The files below `etc` and `root` of a container that were opened meanwhile (inotify)."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    # Through the container's own root: a watch follows the inode, and bind mounts have the same one.
    inside = Path(f"/proc/{container.pid}/root")
    folders: dict[int, str] = {}
    for folder in ("/etc", "/etc/criu", "/root/.criu"):
        number = libc.inotify_add_watch(watch, os.fsencode(str(inside) + folder), 0x20)  # IN_OPEN
        assert number > 0, os.strerror(ctypes.get_errno())
        folders[number] = folder
    paths: list[str] = []
    try:
        yield paths
        with contextlib.suppress(BlockingIOError):
            events = os.read(watch, 65536)
            while events:
                number, _mask, _cookie, length = struct.unpack_from("iIII", events)
                name = events[16 : 16 + length].rstrip(b"\0").decode()
                if name:
                    paths.append(f"{folders[number]}/{name}")
                events = events[16 + length :]
    finally:
        os.close(watch)
