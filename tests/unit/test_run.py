"""How processes are started: output, codes, time-outs, cancellation, descriptors."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from criproxy import run


async def test_output_and_code_come_back() -> None:
    completed = await run.spawn(["sh", "-c", "echo out; echo err >&2; exit 3"], timeout=60)
    assert (completed.returncode, completed.stdout, completed.stderr) == (3, b"out\n", b"err\n")


async def test_a_signal_is_a_negative_code() -> None:
    assert (await run.spawn(["sh", "-c", "kill -KILL $$"], timeout=60)).returncode == -signal.SIGKILL


async def test_more_output_than_a_pipe_holds_doesnt_block_the_child() -> None:
    completed = await run.spawn(["head", "-c", str(run.CAPTURE_LIMIT + 300_000), "/dev/zero"], timeout=60)
    assert completed.returncode == 0
    assert len(completed.stdout) == run.CAPTURE_LIMIT


async def test_a_child_has_ended_although_its_offspring_keeps_the_pipe_open() -> None:
    completed = await run.spawn(["sh", "-c", "sleep 600 & echo $!"], timeout=60)
    os.kill(int(completed.stdout), signal.SIGKILL)


async def test_the_time_out_kills_and_says_what_was_said_by_then() -> None:
    with pytest.raises(run.Expired, match=r"took longer than 2 s") as caught:
        await run.spawn(["sh", "-c", "echo so far; exec sleep 600"], timeout=2)
    assert caught.value.completed is not None
    assert caught.value.completed.stdout == b"so far\n"
    assert caught.value.completed.returncode == -signal.SIGKILL


async def test_cancellation_kills_and_reaps_before_it_goes_on(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    task = asyncio.create_task(run.spawn(["sh", "-c", f"echo $$ > {pid_file}; exec sleep 60"], timeout=None))
    while not pid_file.exists() or not pid_file.read_text():
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not Path(f"/proc/{pid_file.read_text().strip()}").exists()


async def test_no_descriptor_is_inherited_that_wasnt_named() -> None:
    with open("/dev/null") as named, open("/dev/null") as other:
        os.set_inheritable(other.fileno(), True)
        listing = [sys.executable, "-c", "import os; print(*sorted(os.listdir('/proc/self/fd'), key=int))"]
        completed = await run.spawn(listing, timeout=60, pass_fds=[named.fileno()])
        open_ones = {int(fd) for fd in completed.stdout.split()}
        assert named.fileno() in open_ones
        assert other.fileno() not in open_ones


async def test_a_missing_executable_is_named() -> None:
    with pytest.raises(run.CommandError, match="Cannot run /no/such/tool: No such file"):
        await run.spawn(["/no/such/tool"], timeout=1)


async def test_nothing_is_left_open() -> None:
    await run.spawn(["true"], timeout=60)
    before = os.listdir("/proc/self/fd")
    for _ in range(5):
        await run.spawn(["true"], timeout=60)
        with pytest.raises(run.CommandError):
            await run.spawn(["/no/such/tool"], timeout=60)
        with pytest.raises(run.Expired):
            await run.spawn(["sleep", "9"], timeout=0.01)
    assert os.listdir("/proc/self/fd") == before


async def test_two_can_wait_for_the_same_child() -> None:
    with run.start(["sleep", "0.1"]) as running:
        assert await asyncio.gather(running.wait(), running.wait()) == [0, 0]


def test_closing_kills() -> None:
    with run.start(["sleep", "60"]) as running:
        pass
    assert running.poll() == -signal.SIGKILL
    running.close()


def test_blocking_run_and_check() -> None:
    assert run.run(["echo", "hello"]).check().stdout == b"hello\n"
    with pytest.raises(run.CommandError, match=r"\(exit code 2\): what was wrong$"):
        run.run(["sh", "-c", "echo first; echo what was wrong >&2; exit 2"]).check()
    with pytest.raises(run.CommandError, match="SIGTERM"):
        run.run(["sh", "-c", "kill $$"]).check()
    with pytest.raises(run.Expired):
        run.run(["sleep", "60"], timeout=0.05)


def test_no_other_module_starts_processes() -> None:
    package = Path(run.__file__).parent
    starting = r"\b(subprocess|os\.(fork|exec|spawn|posix_spawn|system|popen)|create_subprocess)"
    command = ["grep", "-rlE", "--include=*.py", starting, package]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout.split() == [run.__file__]
