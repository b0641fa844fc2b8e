"""`make up` and `make down`: a lab that stays, for people who want to try pods of their own.

    python -m lab.up            # starts it in the background, prints its sockets
    python -m lab.up --down     # ends it and removes everything

The background process owns the lab as any other program does, so that it is torn down however it ends.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lab import BUILD, CHECKOUT, LabError, image_name, recipes, requirements
from lab.containerd import Containerd
from lab.daemon import COMMAND, Daemon

# "PID STARTTIME LAB" while one is up: a pid alone may be somebody else's by now.
_RECORD = BUILD / "up"
_REPORT = BUILD / "up.txt"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.up", description="A lab with criproxy, left running")
    parser.add_argument("--down", action="store_true", help="end it")
    parser.add_argument("--stay", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.stay:
            _stay()
        elif options.down:
            _down()
        else:
            _up()
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _stay() -> None:
    with Containerd(usual=tuple(recipes.RECIPES)) as containerd, Daemon(containerd) as daemon:
        _RECORD.write_text(f"{os.getpid()} {_start_time(os.getpid())} {containerd.number}")
        unfinished = _REPORT.with_suffix(".unfinished")
        unfinished.write_text(_report(containerd, daemon))
        unfinished.rename(_REPORT)
        # `make down` sends SIGTERM, which leaves the block as an exception.
        while True:
            signal.pause()


def _report(containerd: Containerd, daemon: Daemon) -> str:
    names = ", ".join(image_name(name) for name in recipes.RECIPES)
    return (
        f"criproxy's CRI socket   {daemon.endpoint}\n"
        f"containerd's own        {containerd.endpoint}\n"
        f"images                  {names}\n"
        f"logs                    {containerd.logs}\n\n"
        f"  .venv/bin/python -m lab.pod run redis criproxy.io/scaledown-duration=10s\n"
        f"  {COMMAND.relative_to(CHECKOUT)} status --control {daemon.control}\n"
        f"  .venv/bin/python -m lab.pod remove redis\n"
        f"or with any CRI client, such as crictl --runtime-endpoint {daemon.endpoint}\n"
    )


def _up() -> None:
    requirements.check()
    if pid := _running():
        print(f"It is up already (pid {pid}); `make down` ends it.\n\n{_REPORT.read_text()}", end="")
        return
    _REPORT.unlink(missing_ok=True)
    log = BUILD / "up.log"
    print("Starting a private containerd and criproxy…", flush=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "lab.up", "--stay"],
            cwd=CHECKOUT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    while not _REPORT.exists():
        if process.poll() is not None:
            raise LabError(f"It didn't start:\n{log.read_text(errors='replace')}")
        time.sleep(0.05)
    print(_REPORT.read_text() + "\n`make down` ends it and removes everything.")


def _down() -> None:
    pid = _running()
    if pid is None:
        print("Nothing is up.")
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 60
    while _running():
        if time.monotonic() > deadline:
            raise LabError(f"It (pid {pid}) doesn't end within 60 s", f"its log is {BUILD / 'up.log'}")
        time.sleep(0.05)
    _RECORD.unlink(missing_ok=True)
    print("Ended, and nothing is left of it.")


def _running() -> int | None:
    """The pid of the lab that is up in this checkout."""
    with contextlib.suppress(OSError, ValueError):
        pid, start_time, _ = _RECORD.read_text().split()
        if _start_time(int(pid)) == start_time:
            return int(pid)
    return None


def lab() -> Containerd:
    """The lab that is up in this checkout. Raises LabError if there is none."""
    if _running() is None:
        raise LabError("No lab is up", "`make up` starts one")
    return Containerd.running(int(_RECORD.read_text().split()[2]))


def _start_time(pid: int) -> str:
    """In the kernel's words; raises OSError if there is no such process, ValueError if it has ended unreaped."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if fields[0] == "Z":
        raise ValueError(pid)
    return fields[19]


if __name__ == "__main__":
    sys.exit(main())
