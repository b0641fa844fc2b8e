"""The container's PID 1, in a PID namespace made by unshare(1): what an application sees, and who can steer it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import pytest
from box import until
from specimen import PATIENCE

from criproxy import LIBEXEC
from criproxy.criu import init
from criproxy.criu.errors import CheckpointError
from criproxy.kernel import processes

INIT = LIBEXEC / "init"


class Container:
    """Init as PID 1 of a namespace. Signals that a test sends come from outside of it.

    For an application that waits for the test: one that ends by itself may be gone before it is found (`run`).
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        until(lambda: processes.children(process.pid) or process.poll() is not None)
        self.pid = processes.children(process.pid)[0]
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self.stdin, self.stdout, self.stderr = process.stdin, process.stdout, process.stderr

    def line(self, stream: IO[bytes] | None = None) -> str:
        return (stream or self.stdout).readline().decode().rstrip("\n")

    def wait(self) -> int:
        return self._process.wait(PATIENCE)

    def application(self) -> int:
        until(lambda: init.application_pid(self.pid))
        found = init.application_pid(self.pid)
        assert found is not None
        return found

    def kill(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def running(self) -> bool:
        return self._process.poll() is None

    def heard(self) -> None:
        """Waits until init has taken every signal that it was sent."""
        until(lambda: not init._pending(self.pid))

    def tree_gone(self) -> None:
        until(lambda: not processes.children(self.pid))


@contextlib.contextmanager
def started(*argv: str, before: Sequence[str] = (), env: dict[str, str] | None = None) -> Iterator[Container]:
    process = subprocess.Popen(
        ["/usr/bin/unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *before, str(INIT), "--", *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
    )
    try:
        yield Container(process)
    finally:
        process.kill()
        for stream in (process.stdin, process.stdout, process.stderr):
            assert stream is not None
            stream.close()
        process.wait(PATIENCE)


def run(*argv: str, before: Sequence[str] = (), env: dict[str, str] | None = None) -> tuple[int, str, str]:
    done = subprocess.run(
        ["/usr/bin/unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *before, str(INIT), "--", *argv],
        capture_output=True,
        text=True,
        env=env,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


# --- What the application sees ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "code"), [("true", 0), ("exit 3", 3), ("kill -KILL $$", 137), ("kill -TERM $$", 143)]
)
def test_the_containers_code_is_the_applications(script: str, code: int) -> None:
    assert run("sh", "-c", script)[0] == code


def test_a_missing_command_is_said_and_ends_with_127() -> None:
    assert run("no-such-thing") == (127, "", 'criproxy-init: exec "no-such-thing": No such file or directory\n')
    assert run("/no/such/thing")[0] == 127


def test_what_isnt_executable_ends_with_126(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("#!/bin/sh\n")
    assert run(str(tmp_path / "plain"))[::2] == (126, f'criproxy-init: exec "{tmp_path}/plain": Permission denied\n')
    assert run("plain", env={"PATH": str(tmp_path)})[0] == 126
    assert run(str(tmp_path))[0] == 126


def test_the_path_is_searched_as_runc_does(tmp_path: Path) -> None:
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
    (tmp_path / "first/tool").mkdir()
    (tmp_path / "second/tool").write_text("not executable")
    (tmp_path / "third/tool").write_text("#!/bin/sh\necho third\n")
    (tmp_path / "third/tool").chmod(0o755)
    path = ":".join(str(tmp_path / name) for name in ("first", "missing", "second", "third"))
    assert run("tool", env={"PATH": path})[:2] == (0, "third\n")
    # A file without a known format is no shell script here: runc doesn't think so either.
    (tmp_path / "third/tool").write_text("echo third\n")
    assert run("tool", env={"PATH": path})[0] == 126


def test_arguments_environment_and_directory_are_the_containers() -> None:
    shell = 'echo "$0|$1|$X|$(pwd)"'
    env = {"PATH": os.environ["PATH"], "X": "a b"}
    assert run("sh", "-c", shell, "zero", "o n e", before=["--wd", "/usr"], env=env)[1] == "zero|o n e|a b|/usr\n"


def test_signal_mask_and_dispositions_are_those_that_init_was_given() -> None:
    show = ["grep", "^Sig[BIC]", "/proc/self/status"]
    before = ["env", "--block-signal=USR1,RTMIN", "--ignore-signal=CHLD,HUP", "--default-signal=PIPE"]
    plain = subprocess.run([*before, *show], capture_output=True, text=True, check=True).stdout
    assert run(*show, before=before) == (0, plain, "")


def test_it_leads_a_session_and_has_only_its_streams() -> None:
    code = (
        "import os; print(os.getpid() == os.getsid(0) == os.getpgid(0), sorted(map(int, os.listdir('/proc/self/fd'))))"
    )
    # 3 is the listing itself.
    assert run(*python(code))[1] == "True [0, 1, 2, 3]\n"


def test_stdin_is_the_applications() -> None:
    with started("head", "-n", "1") as container:
        container.stdin.write(b"hello\n")
        container.stdin.flush()
        assert container.line() == "hello"
        assert container.wait() == 0


def test_orphans_are_reaped_while_it_runs() -> None:
    script = "for i in 1 2 3; do (true & true & ) ; done; (setsid sh -c 'sleep 0.05 &' ); echo made; read line"
    with started("sh", "-c", script) as container:
        assert container.line() == "made"
        # Init, the guard and the shell; zombies would be among them.
        until(lambda: len(processes.tree(container.pid)) == 3)
        assert container.running()


def test_the_guard_takes_daemons_in_and_holds_nothing() -> None:
    with started("sh", "-c", "(setsid sleep 60 &) ; echo ready; exec sleep 60") as container:
        assert container.line() == "ready"
        guard = init.guard_pid(container.pid)
        assert guard is not None
        assert processes.children(container.pid) == [guard]
        until(lambda: len(processes.children(guard)) == 2)
        assert os.listdir(f"/proc/{guard}/fd") == []
        assert processes.ns_pid(container.application()) == int(processes.name(guard).split()[1])


# --- Signals ----------------------------------------------------------------------------------------------------------

ECHO = """
import signal, sys, time
def say(signum, frame):
    print(signum)
for signum in (1, 2, 10, 15, 34, 61, 63):
    signal.signal(signum, say)
print("ready")
while True:
    signal.pause()
"""


def test_signals_from_outside_reach_the_application() -> None:
    with started(*python(ECHO)) as container:
        assert container.line() == "ready"
        for signum in (1, 2, 10, 15, 34):
            container.kill(signum)
            assert container.line() == str(signum)


def test_a_signal_without_handler_ends_the_application() -> None:
    with started("sleep", "60") as container:
        container.application()
        container.kill(signal.SIGTERM)
        assert container.wait() == 143


def test_signals_to_pid_1_from_inside_reach_the_application() -> None:
    script = "trap 'echo got it; exit 4' USR1; kill -USR1 1; while :; do sleep 0.01; done"
    assert run("sh", "-c", script)[:2] == (4, "got it\n")


FORGE = """
import ctypes, os, signal, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def forge(signum, code):
    info = struct.pack("iiii", signum, 0, code, 0) + struct.pack("ii", 0, 0) + bytes(104)
    result = libc.syscall(129, 1, signum, info)  # rt_sigqueueinfo
    return ctypes.get_errno() if result else 0
signal.signal(61, signal.SIG_IGN)  # they are passed on
print(forge(61, 0), forge(61, -6), forge(61, -1))  # SI_USER and SI_TKILL are refused (EPERM), SI_QUEUE isn't
os.kill(1, 61)
pidfd = os.pidfd_open(1)
signal.pidfd_send_signal(pidfd, 61)
print("done")
os._exit(5)
"""


def test_orders_from_inside_are_no_orders() -> None:
    """Were one of these HOLDs obeyed, the container would go on after the application's end."""
    code, out, _err = run(*python(FORGE))
    assert (code, out) == (5, "1 1 0\ndone\n")


def test_killing_everyone_from_inside_spares_the_sender_as_without_us() -> None:
    """kill(-1) hits the guard; then the application belongs to init."""
    assert run(*python("import os, sys; os.kill(-1, 9); print('alive'); sys.exit(6)"))[:2] == (6, "alive\n")


def test_init_dies_by_sigkill_from_outside_and_takes_all_along() -> None:
    with started("sleep", "60") as container:
        application = container.application()
        container.kill(signal.SIGKILL)
        assert container.wait() != 0
        assert not Path(f"/proc/{application}").exists()


def test_who_may_be_signalled_follows_kill_2() -> None:
    drop = ["setpriv", "--reuid", "65534", "--clear-groups"]
    with started(*drop, "sleep", "60") as container:
        until(lambda: Path(f"/proc/{container.application()}").stat().st_uid == 65534)
        assert init.may_signal(container.pid, container.application())
    # The same without CAP_KILL, which is what many containers are started with.
    with started(
        *drop, "sleep", "60", before=["setpriv", "--bounding-set", "-kill", "--inh-caps", "-kill"]
    ) as container:
        until(lambda: Path(f"/proc/{container.application()}").stat().st_uid == 65534)
        assert not init.may_signal(container.pid, container.application())
        container.kill(signal.SIGTERM)
        container.heard()
        time.sleep(0.05)
        assert container.running()
        os.kill(container.application(), signal.SIGTERM)
        assert container.wait() == 143


# --- Orders -----------------------------------------------------------------------------------------------------------


def test_held_the_applications_end_isnt_the_containers() -> None:
    with started("sh", "-c", "read line; exit 7") as container:
        container.application()
        init.hold(container.pid)
        container.stdin.write(b"go\n")
        container.stdin.flush()
        container.tree_gone()
        assert container.running()
        init.release(container.pid)
        assert container.wait() == 7


def test_released_it_goes_on_as_before() -> None:
    with started("sh", "-c", "read line; exit 7") as container:
        container.application()
        init.hold(container.pid)
        init.release(container.pid)
        container.stdin.write(b"go\n")
        container.stdin.flush()
        assert container.wait() == 7


def test_started_afresh_it_is_a_new_one_that_counts() -> None:
    with started("sh", "-c", "trap 'exit 8' TERM; echo $$; while :; do sleep 0.01; done") as container:
        first = container.line()
        init.hold(container.pid)
        os.kill(container.application(), signal.SIGKILL)
        container.tree_gone()
        for _ in range(3):
            init.start(container.pid)
            second = container.line()
            assert second != first
            first = second
            init.hold(container.pid)
            guard = init.guard_pid(container.pid)
            assert guard is not None
            for pid in reversed(processes.tree(guard)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            container.tree_gone()
        init.start(container.pid)
        assert container.line() != first
        container.kill(signal.SIGTERM)
        assert container.wait() == 8


def test_started_afresh_what_is_left_of_the_old_one_is_killed() -> None:
    with started("sh", "-c", "echo $$; exec sleep 60") as container:
        container.line()
        old = container.application()
        init.hold(container.pid)
        init.start(container.pid)
        container.line()
        until(lambda: not Path(f"/proc/{old}").exists())
        assert container.application() != old


def test_signals_that_come_while_it_is_held_are_passed_on_when_it_goes_on() -> None:
    with started(*python(ECHO)) as container:
        assert container.line() == "ready"
        init.hold(container.pid)
        for signum in (15, 1, 34):
            container.kill(signum)
        container.heard()
        assert not init._pending(container.application())
        init.release(container.pid)
        assert {container.line() for _ in range(3)} == {"15", "1", "34"}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_asleep_it_ends_when_it_is_asked_to(signum: int) -> None:
    with started("sleep", "60") as container:
        container.application()
        init.hold(container.pid)
        os.kill(container.application(), signal.SIGKILL)
        container.tree_gone()
        container.kill(signal.SIGHUP)  # which asks for something else
        container.heard()
        assert container.running()
        container.kill(signum)
        assert container.wait() == 128 + signum


def test_asked_to_end_during_a_dump_it_does_so_after_it() -> None:
    with started("sleep", "60") as container:
        container.application()
        init.hold(container.pid)
        application = container.application()
        container.kill(signal.SIGTERM)
        container.heard()
        assert container.running()
        os.kill(application, signal.SIGKILL)
        assert container.wait() == 143


def test_not_held_a_start_is_ignored() -> None:
    with started("sh", "-c", "echo $$; exec sleep 60") as container:
        container.line()
        application = container.application()
        init.start(container.pid)
        container.heard()
        # Once it hears the next one it has done what it does for that.
        init.release(container.pid)
        container.heard()
        assert container.application() == application


def test_orders_are_obeyed_before_the_end_that_came_after_them() -> None:
    """However late init gets to run: here it is stopped meanwhile."""
    with started("sleep", "60") as container:
        application = container.application()
        container.kill(signal.SIGSTOP)
        init.hold(container.pid)
        os.kill(application, signal.SIGKILL)
        until(lambda: not processes.alive(application, processes.start_time(application)))
        container.kill(signal.SIGCONT)
        container.tree_gone()
        assert container.running()


def test_a_hold_waits_for_the_order_before_it() -> None:
    with started("sleep", "60") as container:
        container.application()
        init.hold(container.pid)
        container.heard()
        container.kill(signal.SIGSTOP)
        until(lambda: "T" in Path(f"/proc/{container.pid}/stat").read_text().split(")")[1])
        init.release(container.pid)
        with pytest.raises(CheckpointError, match="doesn't run"):
            init.hold(container.pid)


def test_orders_go_to_nobody_but_an_init() -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        with pytest.raises(ProcessLookupError):
            init.hold(other.pid)
        assert other.poll() is None
        other.kill()
    with pytest.raises(ProcessLookupError):
        init.release(other.pid)
