"""Where kubelet's cgroup is looked for, in a tree and a /proc that are made of files."""

import os
from pathlib import Path

import pytest

from criproxy.config import Config
from criproxy.kubelet import connections as kubelet

V2 = "30 23 0:26 / {root} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID = "31 23 0:27 / {root}/cpu rw - cgroup cgroup rw,cpu\n30 23 0:26 / {root} rw - cgroup2 cgroup2 rw\n"


class Machine:
    def __init__(self, folder: Path) -> None:
        self.root, self.proc = folder / "cgroup", folder / "proc"
        self.root.mkdir()
        self.mounts(V2)
        for kind in ("pid", "net"):
            self.namespace("self", kind, "ours")

    def mounts(self, text: str) -> None:
        (self.proc / "self").mkdir(parents=True, exist_ok=True)
        (self.proc / "self/mountinfo").write_text(text.format(root=self.root))

    def namespace(self, pid: str, kind: str, name: str) -> None:
        (self.proc / pid / "ns").mkdir(parents=True, exist_ok=True)
        (self.proc / pid / "ns" / kind).unlink(missing_ok=True)
        os.symlink(f"{kind}:[{name}]", self.proc / pid / "ns" / kind)

    def cgroup(self, path: str, *, populated: bool = True) -> Path:
        folder = self.root / path
        folder.mkdir(parents=True)
        (folder / "cgroup.events").write_text(f"populated {int(populated)}\nfrozen 0\n")
        return folder

    def process(self, pid: int, cgroup: str, name: str = "kubelet", net: str = "ours") -> None:
        self.namespace(str(pid), "pid", "ours")
        self.namespace(str(pid), "net", net)
        (self.proc / str(pid) / "comm").write_text(name + "\n")
        (self.proc / str(pid) / "cgroup").write_text(f"4:memory:/elsewhere\n0::{cgroup}\n")

    def find(self, config: Config | None = None) -> tuple[Path, int]:
        return kubelet.find(config or Config(), self.proc)

    def missing(self, config: Config | None = None) -> str:
        with pytest.raises(LookupError) as caught:
            self.find(config)
        return str(caught.value.args[0])


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("mounts", [V2, HYBRID])
@pytest.mark.parametrize(
    "path",
    [
        "system.slice/kubelet.service",
        "system.slice/k3s.service",
        "system.slice/k3s-agent.service",
        "system.slice/rke2-server.service",
        "system.slice/rke2-agent.service",
        "kubelet.slice/kubelet.service",
        "kubelet.service",
    ],
)
def test_services(machine: Machine, path: str, mounts: str) -> None:
    machine.mounts(mounts)
    machine.cgroup("system.slice/containerd.service")
    cgroup = machine.cgroup(path)
    assert machine.find() == (cgroup, 0)


def test_the_likeliest_and_the_shallowest(machine: Machine) -> None:
    machine.cgroup("system.slice/k3s.service")
    machine.cgroup("a.slice/a-b.slice/kubelet.service")
    cgroup = machine.cgroup("system.slice/kubelet.service")
    assert machine.find() == (cgroup, 0)


def test_an_empty_one_is_nobodys(machine: Machine) -> None:
    machine.cgroup("system.slice/kubelet.service", populated=False)
    cgroup = machine.cgroup("system.slice/k3s.service")
    assert machine.find() == (cgroup, 0)


@pytest.mark.parametrize(
    "path",
    [
        "kubepods.slice/kubelet.service",
        "kubepods.slice/kubepods-pod1.slice/cri-containerd-1.scope/kubelet.service",
        "kubelet.slice/kubelet-kubepods.slice/kubelet.service",
        "system.slice/docker-1.scope/kubelet.service",
        "user.slice/user-1000.slice/kubelet.service",
        "docker/1/kubelet.service",
    ],
)
def test_what_containers_and_users_make_is_no_evidence(machine: Machine, path: str) -> None:
    machine.cgroup(path)
    assert "there is neither a cgroup kubelet.service, k3s.service" in machine.missing()


def test_a_process(machine: Machine) -> None:
    machine.process(7, "/init.scope", name="other")
    machine.process(8, "/", name="kubelet")
    machine.process(9, "/kube/let", name="kubelet")
    assert machine.find() == (machine.root / "kube/let", 9)


def test_a_process_by_another_name(machine: Machine) -> None:
    machine.process(9, "/hyper", name="hyperkube")
    assert "nor a process kubelet" in machine.missing()
    assert machine.find(Config(kubelet_process="hyperkube")) == (machine.root / "hyper", 9)


def test_never_the_root_cgroup(machine: Machine) -> None:
    machine.process(8, "/")
    assert machine.missing() == (
        "the process kubelet is in the root cgroup, with all others; give it a cgroup of its own"
    )


def test_a_container_that_calls_itself_kubelet(machine: Machine) -> None:
    machine.process(8, "/docker/1", net="theirs")
    machine.process(9, "/kubepods/burstable/pod1/2")
    assert "nor a process kubelet" in machine.missing()


def test_the_configured_one(machine: Machine) -> None:
    config = Config(kubelet_cgroup="my/kubelet")
    machine.cgroup("system.slice/kubelet.service")
    assert machine.missing(config) == f"there is no cgroup {machine.root}/my/kubelet (kubelet-cgroup)"
    cgroup = machine.cgroup("my/kubelet")
    assert machine.find(config) == (cgroup, 0)


def test_without_cgroup_v2(machine: Machine) -> None:
    machine.mounts("31 23 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n")
    assert machine.missing() == "cgroup v2 isn't mounted, not even beside v1 (mount -t cgroup2)"


def test_what_cant_be_loaded_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = kubelet.Kubelet(Config(kubelet_addresses=("10.0.0.1",)), tmp_path / "nowhere")
    made.look()
    assert made.cgroup is None
    assert made.problem.startswith("kubelet's connections can't be watched: ")
    assert made.problem in caplog.text
    made.close()
