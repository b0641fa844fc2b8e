"""`make bench`: how long a client waits for what is scaled down, beside how long it waits for what is awake.

All of it on this machine, in one run, with a private containerd, real packets and nothing simulated. Each asleep figure
stands beside the same request to the same application awake, made in the same cycles with a pause before it, as by a
client that comes now and then. The spread is shown because a median alone flatters.

Exits with 1 if something went wrong, or if the median time to the first byte of redis is over `--limit`.
"""

import contextlib
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from criproxy.api import control_pb2 as api
from criproxy.api import cri_pb2 as cri
from lab import LabError, client, plot
from lab.client import Connection, Service
from lab.console import Console, arguments
from lab.containerd import Containerd
from lab.daemon import Daemon
from lab.figures import Figures
from lab.kubelet import Container, Kubelet, Pod
from lab.process import run

# Seconds until a container is scaled down.
IDLE = 0.3
# After the checkpoint and before a measured request: whatever is still going on then belongs to nobody's wake.
SETTLE = 0.25
PATIENCE = 60.0
CALLS = 500
LIMIT_MS = 35.0
# How many times an empty one's wait that of 1 GiB may be (medians), and the p99 of the wait for a dump.
RATIO = 1.5
DURING_MS = 150.0
MIB = 1 << 20

FIRST_BYTE = "Time to the first byte of the answer"
DURING = "Wait of a request that comes in the middle of a dump"
CHECKPOINT = "Duration of a checkpoint"
CALL = "CRI calls"
DAEMON = "criproxy itself"
ZEROPOD = "zeropod's README says of its restores that they take tens to a few hundred milliseconds, by size."


def main() -> int:
    parser = arguments("lab.bench", __doc__)
    parser.add_argument("--cycles", type=int, default=30, metavar="N", help="of each small application (default: 30)")
    parser.add_argument("--large", type=int, default=8, metavar="N", help="with much memory; 0: none (default: 8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all samples, for whoever compares runs")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="a plot of the distributions")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_MS, metavar="MS",
        help=f"for the median of a checkpointed redis, new connection; 0: none (default: {LIMIT_MS:g})",
    )  # fmt: skip
    options = parser.parse_args()
    if options.cycles < 1 or options.large < 0:
        parser.error("--cycles takes a number from 1 on, --large one from 0 on")
    console = Console()
    bench = Bench(console)
    if code := console.attempt("the benchmark", lambda: bench.run(options.cycles, options.large)):
        return code
    bench.report(options.limit)
    if options.json:
        options.json.write_text(json.dumps(bench.as_json(), indent=1))
    if options.svg:
        options.svg.write_text(plot.svg([f for f in bench.figures if f.unit == "ms" and len(f.samples) > 1]))
    median = bench.figures["redis.new"].median
    return 1 if options.limit and median > options.limit else 0


class Bench:
    def __init__(self, console: Console) -> None:
        self._console = console
        self.figures = Figures()
        self.machine: dict[str, Any] = {}

    def run(self, cycles: int, large: int) -> None:
        """Raises LabError, grpc.RpcError or OSError."""
        say = self._console.say
        self.machine = _machine()
        say(f"{self.machine['system']}, {self.machine['processors']} processors")
        self._say_load("before")
        pause = f"{SETTLE * 1e3:.0f} ms"
        say(f"containers sleep after {IDLE * 1e3:.0f} ms; requests come at least {pause} after a checkpoint")
        # Debug lines would be a part of every wake.
        settings = {"log-level": "info"}
        with Containerd(usual=("pause", "redis", "nginx")) as containerd, Daemon(containerd, settings) as daemon:
            self.machine["versions"] = _versions(daemon)
            say(", ".join(f"{name} {version}" for name, version in self.machine["versions"].items()))
            with Kubelet(daemon.endpoint, containerd) as kubelet, Kubelet(containerd.endpoint, containerd) as direct:
                self._calls(kubelet, direct)
                self._redis(kubelet, daemon, cycles)
                self._nginx(kubelet, daemon, cycles)
                self._resting(daemon)
                for pod in list(kubelet.pods):
                    pod.remove()
                for mebibytes in (100, 512, 1024) if large else ():
                    self._large(kubelet, daemon, mebibytes, large)
                if large:
                    self._during(kubelet, daemon, 100, 8 * large)
        self._say_load("after")

    # --- calls ---------------------------------------------------------------------------------------------

    def _calls(self, through: Kubelet, direct: Kubelet) -> None:
        self._console.say(f"CRI calls: {CALLS} x Version to containerd and through criproxy, in turn")
        for kubelet in (through, direct) * 10:
            kubelet.call("Version", cri.VersionRequest(), cri.VersionResponse)
        times: dict[str, list[float]] = {"through": [], "direct": []}
        for _ in range(CALLS):
            for name, kubelet in (("direct", direct), ("through", through)):
                began = time.monotonic()
                kubelet.call("Version", cri.VersionRequest(), cri.VersionResponse)
                times[name].append((time.monotonic() - began) * 1e3)
        self.figures.add("call.direct", CALL, "Version, from containerd itself", times["direct"])
        self.figures.add("call.through", CALL, "Version, through criproxy", times["through"], beside="call.direct")

    # --- small applications --------------------------------------------------------------------------------

    def _redis(self, kubelet: Kubelet, daemon: Daemon, cycles: int) -> None:
        self._console.say(f"redis: 2 x {cycles} cycles, woken by a new connection and by one that is open all the time")
        sleeper = Sleeper(kubelet, daemon, "redis", 6379, client.redis("GET", "key", wanted="value"), self._fill(0))
        new, warm_new, opened, warm_opened, cold, checkpoints = _lists(6)
        before = _cpu(daemon.service.pid)
        with Connection(sleeper.service.address, 6379) as connection:
            ask = lambda: connection.ask(sleeper.service.request)  # noqa: E731
            for _ in range(cycles):
                checkpoints.append(sleeper.until_asleep())
                new.append(sleeper.wake(sleeper.service.first_byte))
                warm_new.append(sleeper.warm(sleeper.service.first_byte))
                warm_opened.append(sleeper.warm(ask))
                checkpoints.append(sleeper.until_asleep())
                opened.append(sleeper.wake(ask))
        after = _cpu(daemon.service.pid)
        few = max(1, cycles // 3)
        self._console.say(f"redis: {few} cycles more, with the checkpoint on the disk and not in the page cache")
        for _ in range(few):
            sleeper.until_asleep()
            sleeper.forget_images()
            cold.append(sleeper.wake(sleeper.service.first_byte))
        add = self.figures.add
        add("redis.new.warm", FIRST_BYTE, "redis awake, new connection", warm_new)
        add("redis.new", FIRST_BYTE, "redis asleep, new connection", new, beside="redis.new.warm")
        add("redis.cold", FIRST_BYTE, "redis asleep, checkpoint only on disk", cold, beside="redis.new.warm")
        add("redis.open.warm", FIRST_BYTE, "redis awake, open connection", warm_opened)
        add("redis.open", FIRST_BYTE, "redis asleep, open connection", opened, beside="redis.open.warm")
        inside = sleeper.restores[: 2 * cycles]
        add("redis.restore", FIRST_BYTE, "of these two, from packet parked to sent again", inside)
        add("redis.checkpoint", CHECKPOINT, f"checkpoint of redis, {sleeper.size}", checkpoints)
        own, children = ((a - b) * 1e3 / (2 * cycles) for a, b in zip(after, before, strict=True))
        add("criproxy.cycle", DAEMON, "processor time per redis cycle, Python", [own])
        add("criu.cycle", DAEMON, "processor time per redis cycle, CRIU", [children])

    def _nginx(self, kubelet: Kubelet, daemon: Daemon, cycles: int) -> None:
        self._console.say(f"nginx (a master and 3 workers): {cycles} cycles")
        sleeper = Sleeper(kubelet, daemon, "nginx", 80, client.http(wanted="nginx in the lab\n"))
        asleep, warm, checkpoints = self._cycles(sleeper, cycles)
        self.figures.add("nginx.new.warm", FIRST_BYTE, "nginx awake, new connection", warm)
        self.figures.add("nginx.new", FIRST_BYTE, "nginx asleep, new connection", asleep, beside="nginx.new.warm")
        self.figures.add("nginx.checkpoint", CHECKPOINT, f"checkpoint of nginx, {sleeper.size}", checkpoints)

    # --- much memory ---------------------------------------------------------------------------------------

    def _large(self, kubelet: Kubelet, daemon: Daemon, mebibytes: int, cycles: int) -> None:
        self._console.say(f"redis with {mebibytes} MiB of values: {cycles} cycles")
        request = client.redis("GET", "key", wanted="value")
        sleeper = Sleeper(kubelet, daemon, "redis", 6379, request, self._fill(mebibytes))
        # In the same cycles, so that both have the same share of a busy machine.
        empty = Sleeper(kubelet, daemon, "redis", 6379, request, self._fill(0))
        asleep, asleep_empty, warm, checkpoints = _lists(4)
        for _ in range(cycles):
            checkpoints.append(sleeper.until_asleep())
            empty.until_asleep()
            asleep_empty.append(empty.wake(empty.service.first_byte))
            # It has nothing left to do then.
            time.sleep(0.1)
            asleep.append(sleeper.wake(sleeper.service.first_byte))
            warm.append(sleeper.warm(sleeper.service.first_byte))
        key, what = f"redis{mebibytes}", f"redis, {mebibytes} MiB of values"
        self.figures.add(f"{key}.new.warm", FIRST_BYTE, f"{what}, awake", warm)
        self.figures.add(f"{key}.new.empty", FIRST_BYTE, "redis without values beside it, asleep", asleep_empty)
        self.figures.add(f"{key}.new", FIRST_BYTE, f"{what}, asleep", asleep, beside=f"{key}.new.empty")
        self.figures.add(f"{key}.checkpoint", CHECKPOINT, f"checkpoint of redis, {sleeper.size}", checkpoints)
        empty.pod.remove()
        sleeper.pod.remove()

    def _during(self, kubelet: Kubelet, daemon: Daemon, mebibytes: int, requests: int) -> None:
        self._console.say(f"redis with {mebibytes} MiB of values: {requests} requests at random moments of its dump")
        request = client.redis("GET", "key", wanted="value")
        sleeper = Sleeper(kubelet, daemon, "redis", 6379, request, self._fill(mebibytes))
        warm = [sleeper.warm(sleeper.service.first_byte) for _ in range(20)]
        lengths = []
        for _ in range(5):
            lengths.append(sleeper.until_asleep())
            sleeper.wake(sleeper.service.first_byte)
        waits: list[float] = []
        deadline = time.monotonic() + PATIENCE + 2 * requests
        while len(waits) < requests and time.monotonic() < deadline:
            sleeper.until_written("checkpointing")
            time.sleep(random.uniform(0, max(lengths) / 1e3))
            # One that came after the dump is a wake like any other.
            if sleeper.written() == "checkpointing":
                waits.append(sleeper.service.first_byte() * 1e3)
            else:
                sleeper.service.first_byte()
        what = f"redis, {mebibytes} MiB of values"
        self.figures.add("during.warm", DURING, f"{what}, awake", warm)
        self.figures.add("during", DURING, f"{what}, sent during its dump", waits, beside="during.warm")
        sleeper.pod.remove()

    @staticmethod
    def _fill(mebibytes: int) -> Callable[[Service], None]:
        def fill(service: Service) -> None:
            with Connection(service.address, service.port) as connection:
                connection.ask(client.redis("SET", "key", "value"))
                for number in range(mebibytes):
                    # Nothing that a file system or a kernel could store as less.
                    connection.ask(client.redis("SET", f"large-{number}", os.urandom(MIB)))

        return fill

    @staticmethod
    def _cycles(sleeper: "Sleeper", cycles: int) -> tuple[list[float], list[float], list[float]]:
        asleep, warm, checkpoints = _lists(3)
        for _ in range(cycles):
            checkpoints.append(sleeper.until_asleep())
            asleep.append(sleeper.wake(sleeper.service.first_byte))
            warm.append(sleeper.warm(sleeper.service.first_byte))
        return asleep, warm, checkpoints

    # --- the daemon ----------------------------------------------------------------------------------------

    def _resting(self, daemon: Daemon, seconds: float = 5.0) -> None:
        self._console.say(f"memory, and processor time over {seconds:g} s in which everything sleeps")
        shares = {}
        # Both are back asleep long before that.
        time.sleep(1)
        pids = {"containerd": daemon.lab.service.pid, "criproxy": daemon.service.pid}
        before = {name: sum(_cpu(pid)) for name, pid in pids.items()}
        time.sleep(seconds)
        for name, pid in pids.items():
            shares[name] = (sum(_cpu(pid)) - before[name]) / seconds * 100
        for unit, key, what, values in (
            ("MiB", "memory", "resident memory", {name: _resident(pid) / MIB for name, pid in pids.items()}),
            ("%", "idle", "processor while all sleep", shares),
        ):
            for name, beside in (("containerd", None), ("criproxy", f"containerd.{key}")):
                self.figures.add(f"{name}.{key}", DAEMON, f"{what}, {name}", [values[name]], unit=unit, beside=beside)

    # --- results -------------------------------------------------------------------------------------------

    def report(self, limit: float) -> None:
        console = self._console
        console.text()
        self.figures.show(console, (FIRST_BYTE, CHECKPOINT, CALL, DAEMON))
        console.text()
        console.text("beside: the median of the same request awake, or of containerd; ratio: between the medians.")
        console.text(f"For orientation: {ZEROPOD}")
        if self.machine["load"]["before"] > 10 or self.machine["load"]["after"] > 10:
            console.text("Others used this machine meanwhile, see above: on an idle one the figures are better.")
        if "redis1024.new" in self.figures:
            ratio = self.figures["redis1024.new"].ratio or 0.0
            verdict = f"1 GiB of redis answers after {ratio:.2f} times the time of an empty one; the aim is {RATIO:g}"
            (console.good if ratio <= RATIO else console.bad)(verdict)
        if "during" in self.figures:
            extra = [self.figures["during"].percentile(p) - self.figures["during.warm"].median for p in (50, 99)]
            verdict = f"a request in the middle of a dump of 100 MiB waits {extra[0]:.0f} ms longer (median), "
            verdict += f"{extra[1]:.0f} ms (p99); zeropod's: 283 to 335 ms, the aim is {DURING_MS:g} ms"
            (console.good if extra[1] <= DURING_MS else console.bad)(verdict)
        if limit:
            median = self.figures["redis.new"].median
            verdict = f"first byte of a checkpointed redis, median: {median:.1f} ms; the limit is {limit:g} ms"
            (console.good if median <= limit else console.bad)(verdict)

    def as_json(self) -> dict[str, Any]:
        return {"machine": self.machine, "figures": self.figures.as_json()}

    def _say_load(self, when: str) -> None:
        busy = _busy()
        self.machine.setdefault("load", {})[when] = round(busy, 1)
        self._console.say(f"{when} the benchmark, others use {busy:.0f} % of this machine's processors")


class Sleeper:
    """An application that is scaled down and woken again and again."""

    def __init__(
        self,
        kubelet: Kubelet,
        daemon: Daemon,
        image: str,
        port: int,
        request: client.Request,
        prepare: Callable[[Service], None] | None = None,
    ) -> None:
        self._daemon = daemon
        self.pod: Pod = kubelet.run_pod(annotations={"criproxy.io/scaledown-duration": f"{IDLE * 1e3:.0f}ms"})
        self.container: Container = self.pod.run(image)
        self.service = Service(self.pod.ip, port, request)
        self.size = ""
        self.restores: list[float] = []
        """Milliseconds from the packet's arrival in criproxy to its delivery, of each wake."""
        self._asked = 0.0
        if prepare:
            Service(self.pod.ip, port, client.redis("PING", wanted="PONG")).wait()
            prepare(self.service)
        self.service.wait()
        # It may have slept while it was prepared.
        self._wakes = self._status().restores

    def until_asleep(self) -> float:
        """Milliseconds that its checkpoint took."""
        # The daemon is left alone as long as the answer is known.
        time.sleep(max(0.0, self._asked + IDLE - time.monotonic()))
        deadline = time.monotonic() + PATIENCE
        while (status := self._status()).state != "scaled_down":
            if time.monotonic() > deadline:
                raise LabError(f"{self.container.name} isn't scaled down within {PATIENCE:g} s: {status}")
            time.sleep(0.05)
        if status.restores != self._wakes:
            raise LabError(f"{self.container.name} was woken by somebody else: {status}")
        self.size = f"{status.checkpoint_bytes / MIB:.1f} MiB"
        time.sleep(SETTLE)
        return status.last_checkpoint_seconds * 1e3

    def written(self) -> str:
        """The state that the daemon has written last: a look that it has no part in."""
        path = self._daemon.state_dir / "containers" / self.container.id / "state.json"
        return str(json.loads(path.read_text())["state"])

    def until_written(self, state: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.written() != state:
            if time.monotonic() > deadline:
                raise LabError(f"{self.container.name} isn't {state} within {PATIENCE:g} s: {self._status()}")
            time.sleep(0.001)

    def wake(self, ask: Callable[[], float]) -> float:
        """Milliseconds to the first byte. The answer has been checked. Raises LabError if it wasn't asleep."""
        seconds = ask()
        self._asked = time.monotonic()
        self._wakes += 1
        status = self._status()
        if status.restores != self._wakes:
            raise LabError(f"{self.container.name} was restored {status.restores} times instead of {self._wakes}")
        self.restores.append(status.last_restore_seconds * 1e3)
        return seconds * 1e3

    def warm(self, ask: Callable[[], float]) -> float:
        """Milliseconds to the first byte while it is awake, after a pause as between requests of different clients."""
        for _ in range(5):
            time.sleep(0.05)
            seconds = ask()
            self._asked = time.monotonic()
            if (restores := self._status().restores) == self._wakes:
                return seconds * 1e3
            # The machine was so busy that it has gone to sleep meanwhile.
            self._wakes = restores
        raise LabError(f"{self.container.name} doesn't stay awake between two requests", "the machine is too busy")

    def forget_images(self) -> None:
        """The checkpoint is written to the disk and leaves the page cache, as when it was made hours ago."""
        for path in (self._daemon.state_dir / "containers" / self.container.id / "checkpoint").iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

    def _status(self) -> api.ContainerStatus:
        return self._daemon.seen(self.container.id)


def _lists(count: int) -> Iterator[list[float]]:
    return ([] for _ in range(count))


# --- the machine ---------------------------------------------------------------------------------------------------


def _machine() -> dict[str, Any]:
    model = next((line.partition(": ")[2] for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "system": f"{platform.freedesktop_os_release()['PRETTY_NAME']}, Linux {platform.release()}, {model}".rstrip(
            ", "
        ),
        "processors": len(os.sched_getaffinity(0)),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _versions(daemon: Daemon) -> dict[str, str]:
    versions = {
        "containerd": run(["containerd", "--version"]).split()[2],
        "runc": run(["runc", "--version"]).split()[2],
    }
    with contextlib.suppress(IndexError):
        versions["CRIU"] = daemon.service.output().split("CRIU ", 1)[1].split()[0]
    return versions


def _busy(seconds: float = 1.0) -> float:
    """Percent of all processors that anybody uses just now."""

    def ticks() -> tuple[int, int]:
        fields = [int(word) for word in _lines("/proc/stat")[0].split()[1:]]
        return sum(fields[:8]), fields[3] + fields[4]

    total, idle = ticks()
    time.sleep(seconds)
    total_after, idle_after = ticks()
    return 100 * (1 - (idle_after - idle) / max(1, total_after - total))


def _cpu(pid: int) -> tuple[float, float]:
    """Seconds of processor time that a process has used, and those of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own, children = int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])
    tick = os.sysconf("SC_CLK_TCK")
    return own / tick, children / tick


def _resident(pid: int) -> int:
    line = next(line for line in _lines(f"/proc/{pid}/status") if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


if __name__ == "__main__":
    sys.exit(main())
