"""The three layouts of control groups, on trees of plain files."""

import os
import shutil
from pathlib import Path

import pytest

from criproxy.kernel import cgroup
from criproxy.kernel.cgroup import Cgroup

PID = 42
POD = "kubepods/burstable/pod1"


class Machine:
    """A /proc with one process in a container, and the trees that it is accounted for in."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.fs = folder / "fs"
        self._mounts: list[str] = []
        self._groups: list[str] = []
        (self.proc / "self").mkdir(parents=True)
        (self.proc / str(PID)).mkdir()

    def tree(self, kind: str, options: str, mount: str, path: str, top: str = "/") -> Path:
        """Mounts a tree and puts the process in the folder `path` of it."""
        mountpoint = self.fs / mount
        group = "" if kind == "cgroup2" else options
        self._mounts.append(f"30 24 0:26 {top} {mountpoint} rw,nosuid shared:9 - {kind} {kind} rw,{options}\n")
        self._groups.append(f"{len(self._groups)}:{group}:{path}\n")
        (self.proc / "self/mountinfo").write_text("".join(self._mounts))
        (self.proc / str(PID) / "cgroup").write_text("".join(self._groups))
        below = path.removeprefix(top) if top != "/" else path
        folder = mountpoint / below.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup.procs").write_text(f"{PID}\n")
        if kind == "cgroup":
            (folder / "tasks").write_text(f"{PID}\n")
        return folder

    def cgroup(self) -> Cgroup:
        return Cgroup.of(PID, self.proc)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def unified(machine: Machine) -> Path:
    folder = machine.tree("cgroup2", "nsdelegate", "", f"/{POD}/c1")
    write(folder, {"cpu.stat": "usage_usec 1500000\nuser_usec 1\n", "memory.current": "9000\n"})
    write(folder, {"memory.stat": "anon 1\ninactive_file 1000\nactive_file 5\n", "memory.reclaim": ""})
    write(folder, {"cpu.max": "5000 100000\n", "memory.oom.group": "1\n"})
    write(folder, {"memory.max": "10000\n", "memory.high": "9500\n", "pids.max": "8000\n"})
    write(folder.parent, {"cpu.max": "20000 100000\n", "memory.oom.group": "0\n"})
    write(folder.parent.parent, {"cpu.max": "30000 100000\n"})
    return folder


@pytest.fixture
def legacy(machine: Machine) -> dict[str, Path]:
    names = ("memory", "cpu", "cpuacct", "pids", "name=systemd")
    folders = {name: machine.tree("cgroup", name, name.removeprefix("name="), f"/{POD}/c1") for name in names}
    write(folders["cpuacct"], {"cpuacct.usage": "2500000000\n"})
    write(folders["memory"], {"memory.usage_in_bytes": "9000\n", "memory.force_empty": ""})
    write(folders["memory"], {"memory.stat": "inactive_file 1\ntotal_inactive_file 1000\n"})
    write(folders["memory"], {"memory.limit_in_bytes": "10000\n"})
    write(folders["pids"], {"pids.max": "8000\n"})
    write(folders["cpu"], {"cpu.cfs_quota_us": "5000\n"})
    write(folders["cpu"].parent, {"cpu.cfs_quota_us": "-1\n"})
    return folders


def shown(folder: Path, name: str) -> str:
    return (folder / name).read_text().strip()


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


def test_v2(machine: Machine, unified: Path) -> None:
    group = machine.cgroup()
    assert group.procs() == [PID]
    assert group.cpu_usage() == 1.5
    assert group.memory() == 8000


def test_v1(machine: Machine, legacy: dict[str, Path]) -> None:
    group = machine.cgroup()
    assert group.procs() == [PID]
    assert group.cpu_usage() == 2.5
    assert group.memory() == 8000


def test_hybrid_takes_numbers_from_v1_and_processes_from_wherever_they_are_apart(
    machine: Machine, legacy: dict[str, Path]
) -> None:
    root = machine.tree("cgroup2", "rw", "unified", "/")
    (root / "cgroup.procs").write_text("1\n2\n42\n")
    group = machine.cgroup()
    assert group.procs() == [PID]
    assert group.cpu_usage() == 2.5
    assert group.memory() == 8000


def test_controllers_that_are_mounted_together(machine: Machine) -> None:
    folder = machine.tree("cgroup", "cpu,cpuacct", "cpu,cpuacct", "/pod/c1")
    group = machine.cgroup()
    assert group.folders == {"cpu": folder, "cpuacct": folder}
    descriptors = group.join_fds()
    assert len(descriptors) == 1
    os.close(descriptors[0])


def test_a_tree_of_which_only_a_part_is_mounted(machine: Machine) -> None:
    folder = machine.tree("cgroup2", "rw", "", "/lxc/box/pod/c1", top="/lxc/box")
    assert machine.cgroup().folders == {cgroup.UNIFIED: folder}


def test_mountpoints_with_spaces(machine: Machine, tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    (folder / "pod/c1").mkdir(parents=True)
    escaped = str(folder).replace(" ", "\\040")
    (machine.proc / "self/mountinfo").write_text(f"30 24 0:26 / {escaped} rw - cgroup2 cgroup2 rw\n")
    (machine.proc / str(PID) / "cgroup").write_text("0::/pod/c1\n")
    assert machine.cgroup().folders == {cgroup.UNIFIED: folder / "pod/c1"}


def test_groups_below_belong_to_the_container(machine: Machine, unified: Path) -> None:
    (unified / "own").mkdir()
    (unified / "own/cgroup.procs").write_text("77\n0\n")
    assert machine.cgroup().procs() == [PID, 77]


def test_a_container_that_is_gone_has_no_processes(machine: Machine, unified: Path) -> None:
    group = machine.cgroup()
    shutil.rmtree(unified)
    assert group.procs() == []
    with pytest.raises(FileNotFoundError):
        group.join_fds()


@pytest.mark.parametrize("path", ["/", "/../../pod/c1"])
def test_no_group_of_its_own(machine: Machine, path: str) -> None:
    machine.tree("cgroup2", "rw", "", "/")
    (machine.proc / str(PID) / "cgroup").write_text(f"0::{path}\n")
    with pytest.raises(LookupError, match="host's cgroup namespace"):
        machine.cgroup()


def test_a_process_that_is_gone(machine: Machine, unified: Path) -> None:
    with pytest.raises(ProcessLookupError):
        Cgroup.of(43, machine.proc)


def test_joining_is_joining_every_tree(machine: Machine, legacy: dict[str, Path]) -> None:
    root = machine.tree("cgroup2", "rw", "unified", "/")
    descriptors = machine.cgroup().join_fds()
    try:
        opened = {os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in descriptors}
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    assert len(descriptors) == 6
    assert opened == {str(root), *(str(folder / "tasks") for folder in legacy.values())}


def test_limits_of_the_container_and_its_pod_are_lifted_and_put_back(machine: Machine, unified: Path) -> None:
    record = machine.fs / "limits.json"
    with machine.cgroup().lifted(record):
        assert (unified / "cpu.max").read_text().startswith("max")
        assert (unified.parent / "cpu.max").read_text().startswith("max")
        assert (unified / "memory.oom.group").read_text().startswith("0")
        for name in ("memory.max", "memory.high", "pids.max"):
            assert (unified / name).read_text().startswith("max")
        assert shown(unified.parent.parent, "cpu.max") == "30000 100000", "other pods are below it"
        assert record.exists()
        as_the_kernel_shows_them(unified)
    assert shown(unified, "cpu.max") == "5000 100000"
    assert shown(unified.parent, "cpu.max") == "20000 100000"
    assert shown(unified, "memory.oom.group") == "1"
    assert [shown(unified, name) for name in ("memory.max", "memory.high", "pids.max")] == ["10000", "9500", "8000"]
    assert not record.exists()


def test_limits_of_v1(machine: Machine, legacy: dict[str, Path]) -> None:
    with machine.cgroup().lifted(machine.fs / "limits.json"):
        assert (legacy["cpu"] / "cpu.cfs_quota_us").read_text().startswith("-1")
        write(legacy["cpu"], {"cpu.cfs_quota_us": "-1\n"})
        assert (legacy["pids"] / "pids.max").read_text().startswith("max")
        write(legacy["pids"], {"pids.max": "max\n"})
        assert shown(legacy["memory"], "memory.limit_in_bytes") == "10000", "to put it back may be refused"
    assert shown(legacy["cpu"], "cpu.cfs_quota_us") == "5000"
    assert shown(legacy["pids"], "pids.max") == "8000"


def test_nothing_to_lift_leaves_no_trace(machine: Machine, legacy: dict[str, Path]) -> None:
    write(legacy["cpu"], {"cpu.cfs_quota_us": "-1\n"})
    write(legacy["pids"], {"pids.max": "max\n"})
    record = machine.fs / "limits.json"
    with machine.cgroup().lifted(record):
        assert not record.exists()


def test_limits_are_put_back_after_a_crash(machine: Machine, unified: Path) -> None:
    record = machine.fs / "limits.json"
    with machine.cgroup().lifted(record):
        saved = record.read_text()
    write(record.parent, {record.name: saved})
    as_the_kernel_shows_them(unified)
    cgroup.restore_limits(record)
    assert shown(unified, "cpu.max") == "5000 100000"
    assert not record.exists()
    cgroup.restore_limits(record)

    record.write_text(saved)
    write(unified, {"cpu.max": "7000 100000\n"})
    cgroup.restore_limits(record)
    assert shown(unified, "cpu.max") == "7000 100000", "a limit that kubelet has set meanwhile counts"


def test_two_containers_of_a_pod_are_restored_at_once(machine: Machine, unified: Path) -> None:
    first = machine.cgroup()
    with first.lifted(machine.fs / "1.json"):
        as_the_kernel_shows_them(unified)
        other = unified.parent / "c2"
        other.mkdir()
        write(other, {"cpu.max": "4000 100000\n", "memory.oom.group": "1\n", "cgroup.procs": "43\n"})
        with Cgroup({cgroup.UNIFIED: other}, first.roots).lifted(machine.fs / "2.json"):
            as_the_kernel_shows_them(other)
        assert shown(unified.parent, "cpu.max") == "max 100000", "the first one isn't done"
        assert shown(other, "cpu.max") == "4000 100000"
    assert shown(unified.parent, "cpu.max") == "20000 100000"
    assert not cgroup._lifted


def test_reclaiming_keeps_the_code(machine: Machine, unified: Path) -> None:
    group = machine.cgroup()
    group.reclaim()
    assert (unified / "memory.reclaim").read_text() == ""
    group.reclaim(keep=2000)
    assert shown(unified, "memory.reclaim") == "7000"


def test_reclaiming_on_v1_is_all_or_nothing(machine: Machine, legacy: dict[str, Path]) -> None:
    group = machine.cgroup()
    group.reclaim()
    assert (legacy["memory"] / "memory.force_empty").read_text() == ""
    group.reclaim(keep=2000)
    assert (legacy["memory"] / "memory.force_empty").read_text() == "0"


def test_the_room_below_limits_of_v1(machine: Machine, legacy: dict[str, Path]) -> None:
    group, own = machine.cgroup(), legacy["memory"]
    own.joinpath("memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert group.room() is None
    own.joinpath("memory.limit_in_bytes").write_text("20000\n")
    write(own, {"memory.usage_in_bytes": "9000\n", "memory.stat": "total_inactive_file 1000\ntotal_active_file 500\n"})
    assert group.room() == 12500
    write(own.parent, {"memory.limit_in_bytes": "10000\n", "memory.usage_in_bytes": "9500\n"})
    assert group.room() == 500


def test_limits_of_v2_are_no_matter(machine: Machine, unified: Path) -> None:
    assert machine.cgroup().room() is None


def test_what_was_killed_for_want_of_memory(machine: Machine, legacy: dict[str, Path]) -> None:
    assert machine.cgroup().oom_kills() == 0
    (legacy["memory"] / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    assert machine.cgroup().oom_kills() == 3


def test_what_was_killed_for_want_of_memory_on_v2(machine: Machine, unified: Path) -> None:
    (unified / "memory.events").write_text("low 0\nhigh 0\nmax 5\noom 2\noom_kill 2\noom_group_kill 0\n")
    assert machine.cgroup().oom_kills() == 2


def as_the_kernel_shows_them(folder: Path) -> None:
    """Plain files show what was written over what was there; the kernel shows the setting."""
    for level in (folder, folder.parent):
        write(level, {"cpu.max": "max 100000\n", "memory.oom.group": "0\n"})
        write(level, {"memory.max": "max\n", "memory.high": "max\n", "pids.max": "max\n"})
