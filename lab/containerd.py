"""A private containerd for one lab: own root, state, socket, CNI bridge and cgroups, removed whatever happens.

    with Containerd() as containerd:
        containerd.endpoint                  # unix:///run/criproxy-lab/0/containerd.sock
        containerd.load("mariadb")           # the usual images are there already

Several labs can run at once on a machine, also from different mount namespaces: a lab's number belongs to whoever has
bound the abstract socket of that number, which is scoped as the bridge is (by network namespace) and ends with its
process. So what a killed lab left behind is known to be nobody's, and is removed by the next one of that number.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import grpc

from criproxy.api import cri_pb2 as cri
from lab import BUILD, LabError, cgroups, image_name, images, recipes
from lab.process import Service, ended_by_signals, run, undisturbed

_MOST_LABS = 40
_CAP_SYS_RESOURCE = 24
_CNI_PLUGINS = Path("/usr/lib/cni")
# How pods can be connected: plugins of Debian's containernetworking-plugins.
NETWORKS = ("bridge", "ptp", "macvlan", "ipvlan")

_CONFIG = """\
version = 2
root = "{root}/containerd"
state = "{state}/containerd"
disabled_plugins = ["io.containerd.internal.v1.tracing", "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = "{socket}"
[ttrpc]
  address = "{socket}.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
  path = "{root}/opt"
[plugins."io.containerd.nri.v1.nri"]
  disable = true
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = {restrict_oom_score_adj}
  netns_mounts_under_state_dir = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{cni_plugins}"
    conf_dir = "{state}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{snapshotter}"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        Root = "{state}/runc"
"""


class Containerd:
    """See the module's text. `usual` are the images that are imported at the start, `network` is one of NETWORKS."""

    def __init__(self, *, usual: tuple[str, ...] = recipes.USUAL, network: str = "bridge") -> None:
        self._usual = usual
        self._kind = network
        self._stack = contextlib.ExitStack()
        self._service: Service | None = None

    @classmethod
    def running(cls, number: int) -> "Containerd":
        """The lab of that number which another process runs: for its names and paths, not to be entered."""
        lab = cls()
        lab.number = number
        return lab

    # --- What a user of it asks for --------------------------------------------------------------------------

    @property
    def state(self) -> Path:
        """Sockets and what ends with the lab. Short, for a socket's path may have 107 bytes."""
        return Path(f"/run/criproxy-lab/{self.number}")

    @property
    def root(self) -> Path:
        """What takes space: images, snapshots, checkpoints. On a real disk, since overlayfs wants one."""
        return Path(os.environ.get("CRIPROXY_LAB_ROOT", "/var/lib/criproxy-lab"), str(self.number))

    @property
    def logs(self) -> Path:
        """Logs of the daemons and of the pods; they stay after the lab, until the next one of this number."""
        return BUILD / "logs" / str(self.number)

    @property
    def socket(self) -> Path:
        return self.state / "containerd.sock"

    @property
    def endpoint(self) -> str:
        return f"unix://{self.socket}"

    @property
    def cgroup(self) -> str:
        """The cgroup above everything that the lab starts, the same in every hierarchy."""
        return f"/criproxy-lab-{self.number}"

    @property
    def kubelet_cgroup(self) -> str:
        """Where what acts as kubelet has to be, for criproxy to know its connections."""
        return f"{self.cgroup}/kubelet"

    @property
    def bridge(self) -> str:
        """This host's link to the pods, or what links are made on with another kind of network."""
        return f"crilab{self.number}"

    @property
    def gateway(self) -> str:
        """This host's address on the pods' bridge."""
        return f"10.231.{self.number}.1"

    @property
    def subnet(self) -> str:
        return f"10.231.{self.number}.0/24"

    @property
    def gateway6(self) -> str:
        return f"fd10:231:{self.number}::1"

    @property
    def subnet6(self) -> str:
        return f"fd10:231:{self.number}::/64"

    @property
    def service(self) -> Service:
        if self._service is None:
            raise LabError("This containerd isn't running")
        return self._service

    def load(self, *names: str) -> None:
        """Build and import images, so that CRI knows them. Raises LabError."""
        for name in names:
            self.ctr("images", "import", f"--snapshotter={self._snapshotter}", images.build(name))

    def ctr(self, *arguments: str | Path) -> str:
        """containerd's own command, in the namespace of CRI."""
        return run(["ctr", f"--address={self.socket}", "--namespace=k8s.io", *arguments])

    def start(self) -> None:
        """Start containerd itself; `restart()` and tests that end it use it too."""
        self._service = Service(
            "containerd",
            ["containerd", "--config", self.state / "containerd.toml", "--log-level", "info"],
            self.logs / "containerd.log",
            # A unit's own notification socket or a trace endpoint of the caller is none of its business.
            env={k: v for k, v in os.environ.items() if not k.startswith(("NOTIFY_", "OTEL_"))},
        )
        cgroups.join(f"{self.cgroup}/containerd", self._service.pid)
        self._service.wait_until(self._answers, "its CRI answers")

    def restart(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End containerd and start it again; pods and shims live on, as on a real node."""
        self.service.signal(number)
        self.service.wait()
        self.start()

    # --- The life of it --------------------------------------------------------------------------------------

    def __enter__(self) -> "Containerd":
        if os.geteuid() != 0:
            raise LabError("The lab needs root: containerd, network namespaces and CRIU do", "run it as root")
        with contextlib.ExitStack() as stack:
            stack.enter_context(ended_by_signals())
            self.number = stack.enter_context(_number())
            self._remove()  # what a killed lab of this number may have left
            stack.callback(self._close)
            self._prepare()
            self.start()
            self.load(*self._usual)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Also when nobody reads stderr any more.
        with self._stack:
            if isinstance(error, Exception) and self._service:
                complaints = self._service.tail("level=(error|fatal)")
                print(f"containerd's errors:\n{complaints}", file=sys.stderr, flush=True)

    def _prepare(self) -> None:
        shutil.rmtree(self.logs, ignore_errors=True)
        for directory in (self.root, self.state, self.state / "cni", self.logs):
            directory.mkdir(parents=True, exist_ok=True)
        self._snapshotter = "overlayfs" if _overlay_works(self.root) else "native"
        (self.state / "containerd.toml").write_text(
            _CONFIG.format(
                root=self.root,
                state=self.state,
                socket=self.socket,
                pause=image_name("pause"),
                cni_plugins=_CNI_PLUGINS,
                snapshotter=self._snapshotter,
                restrict_oom_score_adj=str(not has_capability(_CAP_SYS_RESOURCE)).lower(),
            )
        )
        (self.state / "cni" / "10-lab.conflist").write_text(json.dumps(self._network(), indent=1))
        cgroups.create(f"{self.cgroup}/containerd")
        cgroups.create(self.kubelet_cgroup)
        self._make_link()
        (self.state / "cni-addresses" / self.bridge).mkdir(parents=True)

    def _make_link(self) -> None:
        """The pods' link and this host's addresses. Before the first pod servers of this host can be bound to them."""
        link, prefixes = self.bridge, ("24", "64")
        if self._kind in ("macvlan", "ipvlan"):
            # Their parent needs a carrier, which an empty bridge may not have; and not every kernel has dummy links.
            run(["ip", "link", "add", link, "type", "veth", "peer", "name", f"{link}p"])
            run(["ip", "link", "set", f"{link}p", "up"])
        else:
            run(["ip", "link", "add", link, "type", "bridge"])
        run(["ip", "link", "set", link, "up"])
        if self._kind == "ptp":
            # Each pod has a link of its own to this host, with the same addresses at our end.
            prefixes = ("32", "128")
        elif self._kind in ("macvlan", "ipvlan"):
            # Pods and their parent link don't hear each other: this host takes part as one of them.
            parent, link = link, f"{link}h"
            mode = "bridge" if self._kind == "macvlan" else "l2"
            run(["ip", "link", "add", "link", parent, "name", link, "type", self._kind, "mode", mode])
            run(["ip", "link", "set", link, "up"])
        run(["ip", "address", "add", f"{self.gateway}/{prefixes[0]}", "dev", link])
        run(["ip", "address", "add", f"{self.gateway6}/{prefixes[1]}", "dev", link, "nodad"])

    def _network(self) -> dict[str, object]:
        """The CNI configuration: a link of the lab's own, this host as the gateway, both families of addresses."""
        options: dict[str, dict[str, object]] = {
            "bridge": {"bridge": self.bridge, "isGateway": True, "hairpinMode": True},
            "ptp": {},
            "macvlan": {"master": self.bridge, "mode": "bridge"},
            "ipvlan": {"master": self.bridge, "mode": "l2"},
        }
        return {
            "cniVersion": "0.4.0",
            "name": self.bridge,
            "plugins": [
                {
                    "type": self._kind,
                    **options[self._kind],
                    "ipam": {
                        "type": "host-local",
                        "dataDir": str(self.state / "cni-addresses"),
                        "ranges": [[{"subnet": self.subnet}], [{"subnet": self.subnet6}]],
                        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                    },
                }
            ],
        }

    def _answers(self) -> bool:
        """Whether CRI does what it is asked for: its plugin counts as "ok" before it has seen what was there before."""
        with grpc.insecure_channel(self.endpoint) as channel:
            status = channel.unary_unary(
                "/runtime.v1.RuntimeService/Status",
                request_serializer=cri.StatusRequest.SerializeToString,
                response_deserializer=cri.StatusResponse.FromString,
            )
            with contextlib.suppress(grpc.RpcError):
                status(cri.StatusRequest(), timeout=1)
                return True
        return False

    def _close(self) -> None:
        with undisturbed():
            self._remove()

    def _remove(self) -> None:
        """Remove everything that a lab of this number is made of, whether this object made it or a killed one."""
        if self._service:
            self._service.stop()
            self._service = None
        # Containers, shims and daemons: what was started is in there, or below one that is in there.
        strays = _strays(self.cgroup)
        cgroups.remove(self.cgroup)
        _end_strays(strays)
        for bundle in self.state.glob("containerd/io.containerd.runtime.v2.task/*/*/address"):
            # Shims keep their sockets in one folder for all containerds.
            Path(bundle.read_text().removeprefix("unix://")).unlink(missing_ok=True)
        unmount_below(self.state, self.root)
        # CNI's library notes every attachment in this one folder of the machine, and forgets it at a regular removal.
        for note in Path("/var/lib/cni/results").glob(f"{self.bridge}-*"):
            note.unlink()
        if Path("/sys/class/net", self.bridge).exists():
            run(["ip", "link", "delete", self.bridge])
        for directory in (self.state, self.root):
            shutil.rmtree(directory, ignore_errors=True)
            if directory.exists():
                raise LabError(f"{directory} can't be removed", f"see `findmnt --submounts {directory}`")
            # Other labs may be in there.
            with contextlib.suppress(OSError):
                directory.parent.rmdir()


@contextlib.contextmanager
def _number() -> Iterator[int]:
    """The lowest number that no living lab has."""
    for number in range(_MOST_LABS):
        with socket.socket(socket.AF_UNIX) as claim:
            try:
                claim.bind(f"\0criproxy-lab-{number}")
            except OSError:
                continue
            yield number
            return
    raise LabError(f"{_MOST_LABS} labs run already")


def _strays(cgroup: str) -> dict[int, set[str]]:
    """Processes that descend from one of the lab's and are in other cgroups, each with these cgroups: containers whose
    pod named no parent of ours. (The shims, which are their parents, always stay in.)"""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    inside = cgroups.processes(cgroup)
    strays: dict[int, set[str]] = {}
    waiting = list(inside)
    while waiting:
        for child in children.get(waiting.pop(), []):
            waiting.append(child)
            if child not in inside:
                with contextlib.suppress(OSError):
                    strays[child] = cgroups.of(child)
    return strays


def _end_strays(strays: dict[int, set[str]]) -> None:
    for pid in strays.keys() - {1, os.getpid(), os.getppid()}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    emptied = set().union(*strays.values())
    deadline = time.monotonic() + 5
    while emptied and time.monotonic() < deadline:
        for directory in list(emptied):
            # A hierarchy's root, or one that has other processes, stays.
            if Path(directory).parent == Path("/sys/fs/cgroup") or not Path(directory).exists():
                emptied.discard(directory)
            with contextlib.suppress(OSError):
                os.rmdir(directory)
                if Path(directory).parent.name == "k8s.io":
                    Path(directory).parent.rmdir()
        time.sleep(0.01)


def has_capability(number: int) -> bool:
    status = Path("/proc/self/status").read_text()
    return bool(int(status.split("CapEff:")[1].split()[0], 16) >> number & 1)


def _overlay_works(directory: Path) -> bool:
    """Not on another overlayfs, as in a container whose /var/lib is its own layer."""
    lower, upper, work, merged = (directory / f"overlay-{part}" for part in ("lower", "upper", "work", "merged"))
    for part in (lower, upper, work, merged):
        part.mkdir(exist_ok=True)
    try:
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        run(["mount", "-t", "overlay", "overlay", "-o", options, merged])
    except LabError:
        return False
    else:
        run(["umount", merged])
        return True
    finally:
        for part in (lower, upper, work, merged):
            shutil.rmtree(part, ignore_errors=True)


def mounts_below(*directories: Path) -> list[str]:
    """Mount points at or below the folders, the deepest first."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4].encode().decode("unicode_escape") for line in mounts]
    return sorted((p for p in points if any(Path(p).is_relative_to(d) for d in directories)), reverse=True)


def unmount_below(*directories: Path) -> None:
    """Unmount all that is mounted at or below the folders. Raises LabError if something stays for 5 s."""
    deadline = time.monotonic() + 5
    while points := mounts_below(*directories):
        for point in points:
            try:
                run(["umount", point])
            except LabError:
                # A process that is still ending holds it: later, and at last lazily.
                if time.monotonic() > deadline:
                    run(["umount", "--lazy", point])
        time.sleep(0.01)
