"""How the daemon starts and stops, as far as that needs no root."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from criproxy.criu.bundle import BundleError
from criproxy.daemon import _unless

SLOW_TO_START = """
import asyncio, sys, time
from pathlib import Path
from criproxy import daemon
from criproxy.criu import bundle
from criproxy.kernel import bpf
from criproxy.config import Config

def prepare(*_, **__):
    print("preparing", flush=True)
    time.sleep(600)

bpf.is_bpffs = lambda path: True
bundle.prepare = prepare
folder = Path(sys.argv[1])
asyncio.run(daemon.serve(Config(state_dir=folder / "state", listen=folder / "run" / "criproxy.sock")))
"""


async def test_what_is_done_before_it_is_to_stop_is_returned_or_raised() -> None:
    def broken() -> int:
        raise BundleError("no CRIU")

    assert await _unless(asyncio.Event(), lambda: 7) == 7
    with pytest.raises(BundleError):
        await _unless(asyncio.Event(), broken)


async def test_what_takes_longer_is_not_waited_for() -> None:
    stop, late = asyncio.Event(), threading.Event()
    asyncio.get_running_loop().call_later(0.02, stop.set)
    assert await asyncio.wait_for(_unless(stop, late.wait), 60) is None
    late.set()
    await asyncio.sleep(0.05)  # what comes then is nobody's, and no error


def test_a_daemon_that_is_still_starting_stops_at_once(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_TO_START, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as daemon:
        try:
            assert daemon.stdout is not None
            assert daemon.stdout.readline() == "preparing\n"
            os.kill(daemon.pid, signal.SIGTERM)
            assert daemon.wait(60) == 0
        finally:
            daemon.kill()
