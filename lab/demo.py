"""`make demo`: redis and nginx scale to zero and wake, five times over, while a person watches.

Everything is real: a private containerd with runc, criproxy in front of it, pods by the calls that kubelet makes,
packets over a bridge. It takes about half a minute, leaves nothing behind, and exits with 0 only if every step went
well.
"""

import itertools
import secrets
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from criproxy.api import cri_pb2 as cri
from criproxy.api.control_pb2 import ContainerStatus
from lab import LabError, client
from lab.client import Connection, Service
from lab.console import Console, Table, arguments, milliseconds, size
from lab.containerd import Containerd
from lab.daemon import COMMAND, Daemon
from lab.kubelet import Container, Kubelet
from lab.process import run

# Long enough to see a container awake, short enough not to be waited for.
IDLE = "1s"
# A container that isn't scaled down within these seconds won't be.
PATIENCE = 15.0
WARM_REQUESTS = 5

_COLUMNS = (
    ("cycle", 5),
    ("woken by", -23),
    ("checkpoint|took", 10),
    ("memory|awake", 8),
    ("memory|asleep", 8),
    ("first byte|asleep", 10),
    ("first byte|warm", 10),
    ("ratio", 5),
    ("answer", -23),
)


@dataclass
class App:
    container: Container
    service: Service
    awake: int
    """Bytes of memory before it was scaled down for the first time."""
    wakes: int = 0
    """How often it has been restored."""

    @property
    def name(self) -> str:
        return self.container.name


@dataclass
class Times:
    """Seconds to the first byte, one of each per cycle."""

    what: str
    asleep: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)


def main() -> int:
    parser = arguments("lab.demo", __doc__)
    parser.add_argument("--cycles", type=int, default=5, help="how often (default: 5)")
    options = parser.parse_args()
    console = Console()
    return console.attempt("the demo", lambda: _demonstrate(console, options.cycles))


def _demonstrate(console: Console, cycles: int) -> None:
    console.say("starting a private containerd; it touches no other one on this machine")
    with Containerd(usual=("pause", "redis", "nginx")) as containerd:
        console.say(f"  containerd listens on {containerd.socket}")
        console.say("starting criproxy between kubelet and containerd")
        with Daemon(containerd) as daemon:
            console.say(f"  criproxy listens on {daemon.endpoint.removeprefix('unix://')}")
            with Kubelet(daemon.endpoint, containerd) as kubelet:
                Demo(console, daemon, kubelet).show(cycles)
                console.say("cleaning up: the pods, criproxy, containerd")
    console.good("done: every step went well, and nothing is left behind")


class Demo:
    def __init__(self, console: Console, daemon: Daemon, kubelet: Kubelet) -> None:
        self._console = console
        self._daemon = daemon
        self._kubelet = kubelet

    def show(self, cycles: int) -> None:
        """Raises LabError, grpc.RpcError or OSError at the first step that goes wrong."""
        say = self._console.say
        say("as kubelet: RunPodSandbox, CreateContainer and StartContainer for a redis and an nginx pod")
        say(f'  all that is special about them is the annotation criproxy.io/scaledown-duration: "{IDLE}"')
        secret = secrets.token_hex(8)
        redis = self._run("redis", 6379, client.redis("PING", wanted="PONG"))
        nginx = self._run("nginx", 80, client.http(wanted="nginx in the lab\n"))
        with Connection(redis.service.address, redis.service.port) as connection:
            connection.ask(client.redis("SET", "secret", secret))
            say(f"redis: SET secret {secret}, on a connection that stays open from now on to the end")
            redis.service = Service(redis.service.address, 6379, client.redis("GET", "secret", wanted=secret))
            for app in (redis, nginx):
                # On a slow machine one may have slept while the other was started.
                app.wakes = self._daemon.seen(app.container.id).restores
            say(f"now nobody asks for anything; after {IDLE} they are checkpointed, and their memory is freed")
            self._until_asleep(redis, nginx)
            self._show_asleep(redis, nginx)
            say("now clients come: their times are from the first packet to the first byte of the answer")
            self._console.text()
            table = Table(self._console, _COLUMNS)
            measured = Times("redis, new connection"), Times("nginx, new connection"), Times("redis, open connection")
            requests = itertools.count(1)
            for cycle in range(1, cycles + 1):
                self._wake(redis, nginx, measured, cycle, table, secret)
                self._wake_by_open(redis, measured[2], cycle, table, connection, requests)
            self._console.text()
        self._conclude(redis, nginx, measured)

    def _run(self, name: str, port: int, request: client.Request) -> App:
        pod = self._kubelet.run_pod(name, annotations={"criproxy.io/scaledown-duration": IDLE})
        container = pod.run(name)
        service = Service(pod.ip, port, request)
        service.wait()
        app = App(container, service, container.memory())
        self._console.say(f"  {name} answers on {service.address}:{port} and uses {size(app.awake)}")
        return app

    def _until_asleep(self, *apps: App) -> list[ContainerStatus]:
        """What criproxy knows of them once all are scaled down, as often as they were woken and once more."""
        found = []
        for app in apps:
            status = self._daemon.wait_for(app.container.id, "scaled_down", timeout=PATIENCE)
            if (status.checkpoints, status.restores) != (app.wakes + 1, app.wakes):
                raise LabError(f"{app.name} was woken {app.wakes} times, but criproxy says: {status}")
            found.append(status)
        return found

    def _show_asleep(self, *apps: App) -> None:
        self._console.say("both are scaled down; `criproxy status`:")
        self._console.block(run([COMMAND, "status", "--control", self._daemon.control]))
        for app in apps:
            state = cri.ContainerState.Name(app.container.status().state)
            shrunk = f"{size(app.awake)} -> {size(app.container.memory())}"
            self._console.say(f"  {app.name}: memory {shrunk}; for kubelet it is {state} as before")

    def _wake(self, redis: App, nginx: App, measured: tuple[Times, ...], cycle: int, table: Table, secret: str) -> None:
        """By new connections."""
        sleeping = self._until_asleep(redis, nginx)
        answers = f"secret {secret}", "its page"
        for app, status, times, answer in zip((redis, nginx), sleeping, measured, answers, strict=False):
            figures = self._measure(app, status, times, app.service.first_byte)
            table.row(str(cycle), times.what, *figures, answer)

    def _wake_by_open(
        self, redis: App, times: Times, cycle: int, table: Table, connection: Connection, requests: Iterator[int]
    ) -> None:
        """By a request on the connection that was established before all of that."""
        (status,) = self._until_asleep(redis)
        request = 0

        def increment() -> float:
            nonlocal request
            request = next(requests)
            return connection.ask(client.redis("INCR", "requests", wanted=str(request)))

        figures = self._measure(redis, status, times, increment)
        table.row(str(cycle), times.what, *figures, f"INCR has come to {request}")

    def _measure(self, app: App, status: ContainerStatus, times: Times, ask: Callable[[], float]) -> tuple[str, ...]:
        """Wakes the application; returns what the table shows of it. `ask` raises LabError if the answer is wrong."""
        sleeping = app.container.memory()
        asleep = ask()
        app.wakes += 1
        warm = statistics.median(ask() for _ in range(WARM_REQUESTS))
        times.asleep.append(asleep)
        times.warm.append(warm)
        return (
            milliseconds(status.last_checkpoint_seconds),
            size(app.container.memory()),
            size(sleeping),
            milliseconds(asleep),
            milliseconds(warm),
            f"{asleep / warm:.0f}x",
        )

    def _conclude(self, redis: App, nginx: App, measured: tuple[Times, ...]) -> None:
        for app in (redis, nginx):
            restores = self._daemon.seen(app.container.id).restores
            if restores != app.wakes:
                raise LabError(f"{app.name} was woken {app.wakes} times, but criproxy says {restores}")
        say = self._console.say
        checkpoints = sum(len(times.asleep) for times in measured if times.what.startswith("redis"))
        say(f"the value, the counter and the open connection have lived through {checkpoints} checkpoints of redis")
        say("median time to the first byte:")
        for times in measured:
            asleep, warm = statistics.median(times.asleep), statistics.median(times.warm)
            self._console.good(f"  {times.what:23} {milliseconds(asleep):>8} asleep, {milliseconds(warm):>8} warm")


if __name__ == "__main__":
    sys.exit(main())
