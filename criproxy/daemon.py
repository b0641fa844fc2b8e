"""`criproxy serve`: puts the parts together and runs them until a signal comes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from criproxy import LIBEXEC, control
from criproxy.config import Config
from criproxy.cri import forensic
from criproxy.cri.interceptors import Interceptors
from criproxy.cri.listen import ListenError
from criproxy.cri.proxy import Proxy
from criproxy.cri.runtime import Runtime
from criproxy.cri.seccomp import Profiles
from criproxy.criu import bundle
from criproxy.criu.bundle import BundleError
from criproxy.criu.checkpoint import Criu
from criproxy.kernel import bpf, page_cache
from criproxy.kernel.bpf import BpfError
from criproxy.kubelet.connections import Kubelet
from criproxy.node import Node

log = logging.getLogger(__name__)

CANT_BEGIN = (BundleError, BpfError, ListenError)
"""What `serve` raises when it can't begin: a sentence for people each."""

_Result = TypeVar("_Result")


async def serve(config: Config) -> None:
    """Serves until SIGTERM or SIGINT. Scaled-down containers stay so; the next daemon carries on.

    Raises one of CANT_BEGIN.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)

    config.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    config.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    pins = config.run_dir / "bpf"
    if not bpf.is_bpffs(pins):
        bpf.mount_bpffs(pins)
    criu_root = None if config.criu_root == Path("/") else config.criu_root
    prepared = await _unless(stop, lambda: bundle.prepare(LIBEXEC, config.state_dir, criu_root=criu_root))
    if prepared is None:
        log.info("stopping before the start was complete; containers stay as they are")
        return
    log.info("CRIU %s in %s", prepared.version, prepared.path)
    # Before any container touches it, which would be charged for it; and no wake waits for the disk to read it.
    page_cache.keep(path for path in prepared.path.iterdir() if path.is_file())

    async with contextlib.AsyncExitStack() as stack:
        runtime = await stack.enter_async_context(Runtime(str(config.runtime_endpoint)))
        node = Node(config, runtime, Criu(prepared), pins)
        profiles = Profiles(config.state_dir / "seccomp")
        # Before any pod: the hooks look into its maps.
        kubelet = stack.enter_context(contextlib.closing(Kubelet(config, pins)))
        kubelet.look(called=False)
        interceptors = Interceptors(config, node, runtime, prepared, profiles, kubelet)
        stack.push_async_callback(node.close)
        stack.push_async_callback(interceptors.close)
        await node.adopt()
        forensic.clean(config.state_dir)
        in_use = {prepared.path, *(Path(m.record.bundle) for m in node.members() if m.record.bundle)}
        for folder in bundle.collect_garbage(config.state_dir, in_use):
            log.info("removed %s, which no container uses any more", folder)
        await stack.enter_async_context(control.serve(config.control, node))
        await stack.enter_async_context(
            Proxy(str(config.listen), str(config.runtime_endpoint), interceptors.by_method())
        )
        # What is there by now stays: looking through it for garbage would stop a wake for 15 ms, again and again.
        gc.collect()
        gc.freeze()
        log.info("serving CRI on %s for %s", config.listen, config.runtime_endpoint)
        _notify("READY=1")
        await stop.wait()
        _notify("STOPPING=1")
        log.info("stopping; containers stay as they are")


async def _unless(stop: asyncio.Event, work: Callable[[], _Result]) -> _Result | None:
    """What `work`, which may take minutes, returns or raises in a thread; None if `stop` is set before.

    The thread ends with the process then, which wouldn't end before one of asyncio's own. What it has begun must bear
    that.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[_Result] = loop.create_future()

    def conclude(value: _Result | None, error: Exception | None) -> None:
        if result.done():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(cast(_Result, value))

    def run() -> None:
        value, error = None, None
        try:
            value = work()
        except Exception as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(conclude, value, error)

    threading.Thread(target=run, daemon=True).start()
    stopping = asyncio.ensure_future(stop.wait())
    try:
        either: list[asyncio.Future[Any]] = [result, stopping]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return result.result() if result.done() else None
    finally:
        stopping.cancel()
        result.cancel()


def _notify(state: str) -> None:
    """Tells systemd (sd_notify(3)), if it started us with Type=notify."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    # An abstract socket's name begins with a zero byte, which the environment can't hold.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, contextlib.suppress(OSError):
        notify.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
