"""kubelet's view of a pod that sleeps: probes of all four kinds each second, a relist each second, the event stream.

with View(containerd, daemon, kubelet) as view:
    view.settle()
    view.watch(30.0)       # raises LabError as soon as kubelet sees anything but a healthy pod, or one wakes
    view.visit()           # a client that isn't kubelet, from the same address, wakes each of them
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType

import grpc

from criproxy.api import cri_pb2 as cri
from lab import LabError, client, prober
from lab.console import Console, arguments
from lab.containerd import Containerd
from lab.daemon import Daemon
from lab.kubelet import Container, Kubelet
from lab.prober import Prober

ANNOTATIONS: Mapping[str, str] = {"criproxy.io/scaledown-duration": "1s"}
_RELIST_SECONDS = 1.0


def main() -> int:
    parser = arguments("lab.view", __doc__)
    parser.add_argument("--seconds", type=float, default=300, metavar="S", help="how long to watch (default: 300)")
    options = parser.parse_args()
    console = Console()
    return console.attempt("what kubelet sees", lambda: _view(console, options.seconds))


def _view(console: Console, seconds: float) -> None:
    with (
        Containerd() as lab,
        Daemon(lab) as daemon,
        Kubelet(daemon.endpoint, lab) as kubelet,
        View(lab, daemon, kubelet, console.say) as view,
    ):
        view.settle()
        view.watch(seconds)
        view.visit()
    console.good("to kubelet the pod was healthy all the time, and it slept")


class View:
    """The pod has redis (an exec and a TCP probe), nginx (HTTP) and etcd (gRPC)."""

    def __init__(
        self,
        lab: Containerd,
        daemon: Daemon,
        kubelet: Kubelet,
        say: Callable[[str], None] = lambda line: None,
        *,
        timeout: float = 1.0,
    ) -> None:
        """`say` is given lines for people on the progress; `timeout`: a probe's, in seconds (kubelet's default)."""
        self._daemon = daemon
        self._kubelet = kubelet
        self._say = say
        lab.load("etcd")
        self._pod = kubelet.run_pod("probed", annotations=ANNOTATIONS)
        self._redis, self._nginx, self._etcd = (self._pod.run(name) for name in ("redis", "nginx", "etcd"))
        address = self._pod.ip
        self._prober = Prober(
            lab,
            [
                prober.Exec.of("redis, exec", self._redis, "redis-cli", "ping", timeout=timeout),
                prober.Tcp("redis, TCP", address, 6379, timeout=timeout),
                prober.Http("nginx, HTTP", address, 80, timeout=timeout),
                prober.Grpc("etcd, gRPC", address, 2379, timeout=timeout),
            ],
        )
        self._events: list[cri.ContainerEventResponse] = []

    def __enter__(self) -> "View":
        self._prober.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._prober.__exit__(kind, error, traceback)
        self._pod.remove()

    @property
    def containers(self) -> tuple[Container, ...]:
        return self._redis, self._nginx, self._etcd

    def settle(self) -> None:
        """Until every probe succeeds and every container sleeps, the probes going on. Raises LabError."""
        self._prober.wait_for_success()
        self._say("every probe succeeds")
        # Each may still be woken once, by a probe that came before its first answer was known.
        deadline = time.monotonic() + 60
        while not all(self._sleeps(container) for container in self.containers):
            if time.monotonic() > deadline:
                raise LabError(f"They don't go to sleep under their probes: {self._states()}")
            time.sleep(0.2)
        self._say("every container sleeps")

    def watch(self, seconds: float) -> None:
        """Raises LabError as soon as kubelet would see anything else than a pod that runs and is ready, or anything has
        woken."""
        began = time.monotonic()
        before = self._counts()
        stop = threading.Event()
        listener = threading.Thread(target=self._listen, args=(stop, time.time_ns()), daemon=True)
        listener.start()
        while (past := time.monotonic() - began) < seconds:
            self._relist()
            if self._events:
                raise LabError(f"An event of a pod that nothing happens to: {self._events}")
            if (now := self._counts()) != before:
                raise LabError(f"They didn't sleep through: (checkpoints, restores) was {before}, is {now}")
            if failures := self._prober.failures(since=began):
                raise LabError(f"After {past:.1f} s a probe failed: {failures[0]}")
            time.sleep(_RELIST_SECONDS)
        stop.set()
        answered = self._prober.results(since=began)
        self._say(f"{len(answered)} probes in {seconds:.0f} s, all successful, and nothing woke")

    def visit(self) -> None:
        """Raises LabError if a client that isn't kubelet isn't served, or doesn't wake what it asks."""
        before = self._counts()
        client.Service(self._pod.ip, 80, client.http(wanted="nginx in the lab\n")).first_byte()
        client.Service(self._pod.ip, 6379, client.redis("PING", wanted="PONG")).first_byte()
        after = self._counts()
        for name in ("redis", "nginx"):
            if after[name][1] != before[name][1] + 1:
                raise LabError(f"A client didn't wake {name}: (checkpoints, restores) was {before}, is {after}")
        self._say("a client with the same address is served, and wakes them")

    # --- inside --------------------------------------------------------------------------------------------

    def _relist(self) -> None:
        """What kubelet's pod lifecycle event generator asks for."""
        sandboxes = self._kubelet.call("ListPodSandbox", cri.ListPodSandboxRequest(), cri.ListPodSandboxResponse)
        if [s.state for s in sandboxes.items if s.id == self._pod.id] != [cri.PodSandboxState.SANDBOX_READY]:
            raise LabError(f"The pod isn't ready: {sandboxes}")
        listed = self._kubelet.call("ListContainers", cri.ListContainersRequest(), cri.ListContainersResponse)
        states = {c.id: c.state for c in listed.containers}
        for container in self.containers:
            if states.get(container.id) != cri.ContainerState.CONTAINER_RUNNING:
                raise LabError(f"{container.id} doesn't run: {listed}")
            if container.status().state != cri.ContainerState.CONTAINER_RUNNING:
                raise LabError(f"{container.id} doesn't run: {container.status()}")

    def _listen(self, stop: threading.Event, since: int) -> None:
        # containerd 1.6 has no such stream. Others keep for a while what nobody has asked for, and begin with that.
        with contextlib.suppress(grpc.RpcError):
            for event in self._kubelet.events():
                if stop.is_set():
                    return
                if event.pod_sandbox_status.id == self._pod.id and event.created_at >= since:
                    self._events.append(event)

    def _sleeps(self, container: Container) -> bool:
        return self._daemon.seen(container.id).state == "scaled_down"

    def _counts(self) -> dict[str, tuple[int, int]]:
        """Checkpoints and restores of each container."""
        known = self._daemon.known()
        found = (known[container.id] for container in self.containers)
        return {s.container: (s.checkpoints, s.restores) for s in found}

    def _states(self) -> dict[str, str]:
        return {s.container: f"{s.state}: {s.reason}" for s in self._daemon.known().values()}


if __name__ == "__main__":
    sys.exit(main())
