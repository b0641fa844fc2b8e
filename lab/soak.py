"""`make soak`: clients that must not notice anything, over many checkpoints and restores.

redis, nginx, MariaDB and PostgreSQL run in a pod each, with a scale-down duration of 100 ms. Callers ask them at random
paces around that duration and around the end of the checkpoint that follows: on new connections, on open ones, and on
ones that were idle for many cycles; over IPv4, IPv6 and, from inside the pod, lo. Often several at once, so that some
come in the middle of a checkpoint or a restore. Each answer is checked, and so is, at the end, that each request was
served exactly once (`lab/dialogues.py`).

Exits with 1 if anything failed, or if the cycles weren't reached in time.
"""

import contextlib
import json
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from criproxy.api import control_pb2 as api
from criproxy.kernel.namespaces import in_network_namespace
from lab import LabError, dialogues, plot
from lab.console import Console, Table, arguments, milliseconds
from lab.containerd import Containerd
from lab.daemon import Daemon
from lab.dialogues import APPLICATIONS, Application, Session
from lab.figures import Figure
from lab.kubelet import Container, Kubelet, Pod

DURATION = 0.1
# Each cycle is one of a checkpoint: where that fails, it isn't frozen instead.
ANNOTATIONS = {"criproxy.io/scaledown-duration": f"{DURATION}s", "criproxy.io/tier": "checkpoint"}
KINDS = ("new", "open", "idle")
PATHS = ("IPv4", "IPv6", "lo")
# An idle caller asks again after so many cycles of its application (at least, at most).
IDLE_CYCLES = (5, 40)
LOOK_SECONDS = 0.05
# For so long it is waited for an application to sleep, before it is asked all the same.
MOST_SECONDS_UP = 3.0
# A run with this many failures tells nothing more by going on.
MOST_FAILURES = 20
# How many of the slowest requests of each application are told with what the daemon did meanwhile.
SLOWEST = 3
# The plot has a dot for each sample; of more than this it gets quantiles.
MOST_DOTS = 400
_TIME_FORMAT = "%Y-%m-%d %H:%M:%S.%f"


def main() -> int:
    parser = arguments("lab.soak", __doc__)
    parser.add_argument(
        "--cycles", type=int, default=1000, metavar="N", help="restores of all together (default: 1000)"
    )
    parser.add_argument("--seconds", type=float, default=1200, metavar="S", help="at most (default: 1200)")
    parser.add_argument("--applications", default=",".join(APPLICATIONS), metavar="A,B", help="which (default: all)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the random paces (default: another each time)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the result, with percentiles and failures")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="a plot of the latencies")
    options = parser.parse_args()
    names = options.applications.split(",")
    if unknown := set(names) - set(APPLICATIONS):
        parser.error(f"there is no application {', '.join(sorted(unknown))}; there are {', '.join(APPLICATIONS)}")
    console = Console()
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    soak = Soak(console, [APPLICATIONS[name] for name in names], seed)
    if code := console.attempt("the soak", lambda: soak.run(options.cycles, options.seconds)):
        return code
    soak.report()
    if options.json:
        options.json.write_text(json.dumps(soak.as_json(), indent=1))
    if options.svg:
        options.svg.write_text(plot.svg(soak.figures()))
    return 1 if soak.failures else 0


# --- one caller ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A request that was answered as it should: `seconds` from before connect() or send() to the end of the answer."""

    kind: str
    path: str
    seconds: float
    at: str
    connection: str


@dataclass(frozen=True)
class Failure:
    """What went wrong, and what the daemon wrote about the container around that time."""

    caller: str
    at: str
    after_seconds: float
    request: int
    connection: str
    error: str
    history: Sequence[str] = ()

    def __str__(self) -> str:
        return (
            f"{self.at} {self.caller}, request {self.request} on {self.connection}, after {self.after_seconds:.3f} s: "
            f"{self.error}"
        )


class CallFailed(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


class Caller:
    """Asks one application in one way. Used by one thread at a time."""

    def __init__(self, application: Application, kind: str, path: str, connect: Callable[[], socket.socket]) -> None:
        self.kind, self.path = kind, path
        self.name = f"{application.image}/{kind}/{path}"
        self.asked = 0
        self.due_at_cycle = 0
        self.connected_at_cycle = 0
        self._open = application.open
        self._connect = connect
        self._session: Session | None = None
        self._connection = ""

    def call(self, cycle: int) -> Sample:
        """The next request, on a new connection or on the one that is there. Raises CallFailed."""
        at, began = datetime.now().strftime(_TIME_FORMAT)[:-3], time.monotonic()
        try:
            if self._session is None:
                self._connection = "a connection that isn't there yet"
                sock = self._connect()
                self._connection = f"{_end(sock.getsockname())} to {_end(sock.getpeername())}"
                self._session = self._open(sock, self.name)
                self.connected_at_cycle = cycle
            # Also after a failure the number is used up: it may have been served.
            self.asked += 1
            self._session.ask(self.asked)
            seconds = time.monotonic() - began
        except Exception as error:  # whatever it is, it is what a client would see
            failure = Failure(
                self.name,
                at,
                time.monotonic() - began,
                self.asked,
                self._connection,
                f"{type(error).__name__}: {error}",
            )
            self.close()
            raise CallFailed(failure) from error
        if self.kind == "new":
            self.close()
        return Sample(self.kind, self.path, seconds, at, self._connection)

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(OSError):
                session.close()


def _end(address: Sequence[Any]) -> str:
    return f"{address[0]} port {address[1]}"


def connector(target: str, port: int, netns: Path | None = None) -> Callable[[], socket.socket]:
    """Makes connections, from inside the network namespace if there is one."""

    def connect() -> socket.socket:
        sock = socket.create_connection((target, port), dialogues.PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    return (lambda: in_network_namespace(netns, connect)) if netns else connect


# --- one application -------------------------------------------------------------------------------------------


class Conductor:
    """Decides when which callers of one application ask. Runs in a thread of its own."""

    def __init__(self, application: Application, pod: Pod, container: Container, seed: str) -> None:
        self.application = application
        self.container = container
        self.samples: list[Sample] = []
        self.failures: list[Failure] = []
        self.status = api.ContainerStatus(last_checkpoint_seconds=0.1)
        """What the daemon has said last of the container."""
        self.requests = 0
        self._random = random.Random(seed)
        addresses = {"IPv4": pod.ips[0], "IPv6": pod.ips[1]}
        self._connectors = {path: connector(ip, application.port) for path, ip in addresses.items()}
        # Inside of the pod there are three ways that all pass lo.
        self._local = [connector(ip, application.port, pod.netns) for ip in ("127.0.0.1", "::1", addresses["IPv4"])]
        self.callers = [Caller(application, kind, path, self._connector(path)) for kind in KINDS for path in PATHS]

    def _connector(self, path: str) -> Callable[[], socket.socket]:
        return (lambda: self._random.choice(self._local)()) if path == "lo" else self._connectors[path]

    def prepare(self) -> None:
        """Waits until it listens, and makes what the callers need. Raises LabError."""
        deadline = time.monotonic() + 30
        while True:
            try:
                sock = self._connectors["IPv4"]()
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise LabError(f"{self.application.image} doesn't listen: {error}") from error
                time.sleep(0.05)
        with contextlib.closing(sock):
            self.application.prepare(sock)

    def play(self, goal: int, over: threading.Event) -> None:
        """Until it was restored `goal` times, or it is over."""
        with ThreadPoolExecutor(len(self.callers), thread_name_prefix=self.application.image) as threads:
            # All connections are there before the first checkpoint.
            self._together(threads, self.callers, 0.0)
            while self.cycles < goal and not over.is_set():
                ready = [c for c in self.callers if c.kind != "idle" or c.due_at_cycle <= self.cycles]
                count = min(len(ready), self._random.choice((1, 1, 1, 2, 3, 5)))
                spread = self._random.choice((0.0, 0.02, 0.1, 0.25))
                self._together(threads, self._random.sample(ready, count), spread)
                self._pause(over)

    def _pause(self, over: threading.Event) -> None:
        """Now and then until before it is idle, often until it is being checkpointed, mostly until it sleeps."""
        draw = self._random.random()
        if draw < 0.1:
            over.wait(self._random.uniform(0, DURATION))
        elif draw < 0.4:
            over.wait(DURATION + self._random.uniform(-0.02, self.status.last_checkpoint_seconds))
        else:
            # How long that takes is the matter of the application, and of what else the machine does.
            over.wait(DURATION)
            deadline = time.monotonic() + MOST_SECONDS_UP
            while self.status.state != "scaled_down" and time.monotonic() < deadline and not over.is_set():
                over.wait(LOOK_SECONDS)
            over.wait(self._random.uniform(0, 0.25 if draw < 0.97 else 1.5))

    @property
    def cycles(self) -> int:
        return self.status.restores

    def _together(self, threads: ThreadPoolExecutor, callers: Sequence[Caller], spread: float) -> None:
        calls: list[Future[Sample]] = []
        for index, caller in enumerate(callers):
            if index and spread:
                time.sleep(self._random.uniform(0, spread))
            caller.due_at_cycle = self.cycles + self._random.randint(*IDLE_CYCLES)
            calls.append(threads.submit(caller.call, self.cycles))
        wait(calls)
        self.requests += len(calls)
        for call in calls:
            error = call.exception()
            if isinstance(error, CallFailed):
                self.failures.append(error.failure)
            elif error is not None:
                raise error
            else:
                self.samples.append(call.result())

    def oldest_connection(self) -> int:
        """Through how many cycles the connection has lived that lived longest."""
        return max(self.cycles - caller.connected_at_cycle for caller in self.callers if caller.kind != "new")

    def check_counts(self) -> None:
        """That each request was served exactly once; callers with a failure can't know."""
        now = datetime.now().strftime(_TIME_FORMAT)[:-3]
        failed = {failure.caller for failure in self.failures}
        try:
            served = self.application.counts(self._connectors["IPv4"](), self.container)
            wrong = [
                f"{caller.name} asked {caller.asked} times, served {served.get(caller.name, 0)}"
                for caller in self.callers
                if caller.name not in failed and served.get(caller.name, 0) != caller.asked
            ]
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"]
        self.failures += [Failure(self.application.image, now, 0.0, 0, "the count at the end", w) for w in wrong]

    def close(self) -> None:
        for caller in self.callers:
            caller.close()


# --- all of them -----------------------------------------------------------------------------------------------


@dataclass
class Soak:
    console: Console
    applications: Sequence[Application]
    seed: int
    conductors: list[Conductor] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """Checkpoints that failed: no client notices, but they shouldn't."""
    slowest: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def run(self, cycles: int, seconds: float) -> None:
        """Until there were so many cycles, or so many seconds are over. Raises LabError, grpc.RpcError, OSError."""
        images = ("pause", *(application.image for application in self.applications))
        with (
            Containerd(usual=images) as containerd,
            Daemon(containerd) as daemon,
            Kubelet(daemon.endpoint, containerd) as kubelet,
        ):
            self.console.say(f"{', '.join(images[1:])}, each to be scaled down after {DURATION * 1e3:.0f} ms")
            self.console.say(f"{cycles} cycles within {seconds:.0f} s, --seed {self.seed}, log {daemon.service.log}")
            for application in self.applications:
                pod = kubelet.run_pod(application.image, annotations=ANNOTATIONS)
                container = pod.run(application.image)
                self.conductors.append(Conductor(application, pod, container, f"{self.seed} {application.image}"))
            with contextlib.ExitStack() as stack:
                for conductor in self.conductors:
                    stack.callback(conductor.close)
                    conductor.prepare()
                began = time.monotonic()
                self._play(daemon, cycles, began + seconds)
                self.seconds = time.monotonic() - began
                self._look(daemon)
                for conductor in self.conductors:
                    conductor.check_counts()
            self._judge(daemon.service.output().splitlines(), cycles)

    def _play(self, daemon: Daemon, cycles: int, deadline: float) -> None:
        over = threading.Event()
        each = -(-cycles // len(self.conductors))
        with ThreadPoolExecutor(len(self.conductors)) as threads:
            playing = [threads.submit(conductor.play, each, over) for conductor in self.conductors]
            try:
                told = time.monotonic()
                while not all(play.done() for play in playing):
                    wait(playing, timeout=LOOK_SECONDS)
                    self._look(daemon)
                    failures = sum(len(conductor.failures) for conductor in self.conductors)
                    if time.monotonic() - told > 5 or failures > MOST_FAILURES:
                        told = time.monotonic()
                        self._tell(failures)
                    if time.monotonic() > deadline or failures > MOST_FAILURES:
                        break
            finally:
                over.set()
            for play in playing:
                play.result()

    def _look(self, daemon: Daemon) -> None:
        known = daemon.known()
        for conductor in self.conductors:
            conductor.status = known.get(conductor.container.id, conductor.status)

    def _tell(self, failures: int) -> None:
        each = ", ".join(f"{c.application.image} {c.cycles}" for c in self.conductors)
        requests = sum(conductor.requests for conductor in self.conductors)
        self.console.say(f"{self.cycles} cycles ({each}), {requests} requests, {failures or 'none'} failed")

    def _judge(self, log: Sequence[str], cycles: int) -> None:
        self.refused = [line for line in log if " failed, next try" in line]
        for conductor in self.conductors:
            ours = [line for line in log if conductor.container.id[:13] in line]
            self.failures += [
                replace(failure, history=tuple(_around(ours, failure.at, failure.after_seconds)))
                for failure in conductor.failures
            ]
            slowest = sorted(conductor.samples, key=lambda sample: sample.seconds)[-SLOWEST:]
            self.slowest += [
                {"application": conductor.application.image, **vars(s), "history": list(_around(ours, s.at, s.seconds))}
                for s in slowest
            ]
            lost = [line for line in ours if "started afresh" in line or "internal error" in line]
            self.failures += [Failure(conductor.application.image, line[:23], 0, 0, "its log", line) for line in lost]
        if self.cycles < cycles:
            now = datetime.now().strftime(_TIME_FORMAT)[:-3]
            each = ", ".join(f"{c.application.image} {c.cycles}" for c in self.conductors)
            self.failures.append(
                Failure("soak", now, 0, 0, "nothing", f"only {self.cycles} of {cycles} cycles: {each}")
            )

    # --- what came out ---------------------------------------------------------------------------------------

    @property
    def cycles(self) -> int:
        return sum(conductor.cycles for conductor in self.conductors)

    @property
    def requests(self) -> int:
        return sum(conductor.requests for conductor in self.conductors)

    def report(self) -> None:
        self.console.text()
        columns = (("", -12), ("connection", -10), ("requests", 8), ("p50", 8), ("p90", 8), ("p99", 8), ("max", 8))
        table = Table(self.console, columns)
        for conductor, kind, seconds in self._by_kind():
            quantiles = [milliseconds(_quantile(seconds, share)) for share in (0.5, 0.9, 0.99, 1)]
            table.row(conductor.application.image, kind, str(len(seconds)), *quantiles)
        self.console.text()
        for failure in self.failures[:MOST_FAILURES]:
            self.console.bad(str(failure))
            if failure.history:
                self.console.block("\n".join(failure.history))
        if self.refused:
            self.console.say(
                f"{len(self.refused)} checkpoints failed, unnoticed by clients; the first: {self.refused[0]}"
            )
        each = ", ".join(f"{c.application.image} {c.cycles}" for c in self.conductors)
        oldest = max(conductor.oldest_connection() for conductor in self.conductors)
        text = (
            f"{self.cycles} cycles ({each}), {self.requests} requests in {self.seconds:.0f} s, "
            f"{len(self.failures)} failures; one connection lived through {oldest} cycles"
        )
        (self.console.bad if self.failures else self.console.good)(text)

    def _by_kind(self) -> Iterator[tuple[Conductor, str, list[float]]]:
        for conductor in self.conductors:
            for kind in KINDS:
                if seconds := sorted(s.seconds for s in conductor.samples if s.kind == kind):
                    yield conductor, kind, seconds

    def as_json(self) -> dict[str, Any]:
        latencies: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
        for conductor in self.conductors:
            kinds = latencies.setdefault(conductor.application.image, {})
            for kind in KINDS:
                for path in PATHS:
                    found = sorted(s.seconds for s in conductor.samples if (s.kind, s.path) == (kind, path))
                    if found:
                        quantiles = {f"p{100 * q:g}": round(1e3 * _quantile(found, q), 2) for q in (0.5, 0.9, 0.99)}
                        summary = {"requests": len(found), **quantiles, "max": round(1e3 * found[-1], 2)}
                        kinds.setdefault(kind, {})[path] = summary
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "cycles": {conductor.application.image: conductor.cycles for conductor in self.conductors},
            "requests": self.requests,
            "oldest_connection_cycles": {c.application.image: c.oldest_connection() for c in self.conductors},
            "latencies_ms": latencies,
            "failed_checkpoints": self.refused,
            "slowest": self.slowest,
            "failures": [vars(failure) for failure in self.failures],
        }

    def figures(self) -> list[Figure]:
        """Of each application and kind, thinned to what a plot can show; the least and the most are among them."""
        figures = []
        for conductor, kind, seconds in self._by_kind():
            dots = min(len(seconds), MOST_DOTS)
            shown = [1e3 * _quantile(seconds, dot / max(1, dots - 1)) for dot in range(dots)]
            what = f"{conductor.application.image}, {kind} connection ({len(seconds)})"
            figures.append(Figure(f"{conductor.application.image}.{kind}", "", what, "ms", shown, None))
        return figures


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def _around(log: Sequence[str], at: str, seconds: float) -> Iterator[str]:
    """The lines from 1.5 s before a request until 0.5 s after its end."""
    began = datetime.strptime(at, _TIME_FORMAT).timestamp()
    for line in log:
        with contextlib.suppress(ValueError):
            moment = datetime.strptime(line[:23], _TIME_FORMAT).timestamp()
            if began - 1.5 < moment < began + seconds + 0.5:
                yield line


if __name__ == "__main__":
    sys.exit(main())
