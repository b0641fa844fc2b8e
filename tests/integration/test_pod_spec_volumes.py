"""What a pod spec may ask to have mounted, in pods that are scaled down (docs/pod-spec.md)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from specimen import QUICK, Specimen, eventually, seen, wait_for

from criproxy.api import cri_pb2 as cri
from lab.daemon import Daemon
from lab.kubelet import Kubelet, Pod
from lab.volumes import mounted, project, sub_path


def asleep(daemon: Daemon, specimen: Specimen) -> None:
    assert wait_for(daemon, specimen.id, "scaled_down").tier == "checkpoint"


def restored(daemon: Daemon, specimen: Specimen) -> None:
    """It is what it was, rather than started afresh."""
    assert "afresh" not in seen(daemon, specimen.id).reason
    assert specimen.log == ["listening"]


def replaced(path: Path, text: str) -> None:
    new = path.with_name("new")
    new.write_text(text)
    new.rename(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda file: replaced(file, "two\n"), "one/"),
        (lambda file: file.write_text("two\n"), "two/"),
        (lambda file: file.unlink(), "one/"),
    ],
    ids=["replaced", "rewritten", "deleted"],
)
def test_a_file_by_sub_path_that_is_changed_while_it_sleeps(
    change: Callable[[Path], object], says: str, pod: Pod, program: Path, daemon: Daemon, tmp_path: Path
) -> None:
    """A mounted file stays the file that it was; its container never sees the new one."""
    volume = tmp_path / "volume"
    volume.mkdir()
    file = volume / "config"
    file.write_text("one\n")
    with sub_path(file, tmp_path / "sub-path") as source:
        specimen = Specimen.run(pod, program, mounts={source: "/etc/config"})
        specimen.tell("open /etc/config")
        for turn in (lambda: change(file), lambda: None):
            asleep(daemon, specimen)
            turn()
            assert specimen.ask("read") == says
            restored(daemon, specimen)
        pod.remove()


def test_a_folder_by_sub_path_that_is_replaced_while_it_sleeps(
    pod: Pod, program: Path, daemon: Daemon, tmp_path: Path
) -> None:
    volume = tmp_path / "volume"
    (volume / "data").mkdir(parents=True)
    with sub_path(volume / "data", tmp_path / "sub-path") as source:
        specimen = Specimen.run(pod, program, mounts={source: "/data"})
        specimen.tell("open /data/file")
        specimen.tell("write one")
        asleep(daemon, specimen)
        (volume / "data").rename(volume / "old")
        (volume / "data").mkdir()
        specimen.tell("write two")
        assert (volume / "old/file").read_text() == "one\ntwo\n"
        asleep(daemon, specimen)
        (volume / "old/file").unlink()
        (volume / "old").rmdir()
        specimen.tell("write three")
        assert specimen.ask("read") == "one/two/three/"
        restored(daemon, specimen)
        pod.remove()


def test_a_projected_volume_that_is_replaced_while_it_sleeps(
    pod: Pod, program: Path, daemon: Daemon, tmp_path: Path
) -> None:
    """Tokens, secrets, config maps. What it has open is the old file, as without us; what it opens is the new one."""
    volume = tmp_path / "volume"
    volume.mkdir()

    def read_only(config: cri.ContainerConfig) -> None:
        next(mount for mount in config.mounts if mount.container_path == "/secrets").readonly = True

    with mounted(volume, "-t", "tmpfs", "tmpfs"):
        project(volume, "token-0")
        specimen = Specimen.run(pod, program, mounts={volume: "/secrets"}, change=read_only)
        specimen.tell("open /secrets/token")
        for number in range(3):
            asleep(daemon, specimen)
            project(volume, f"token-{number + 1}")
            assert specimen.ask("read") == f"token-{number}"
            specimen.tell("open /secrets/token")
            assert specimen.ask("read") == f"token-{number + 1}"
        restored(daemon, specimen)
        pod.remove()


def test_the_hosts_file_that_kubelet_rewrites(pod: Pod, program: Path, daemon: Daemon) -> None:
    """`hostAliases`. kubelet writes it anew for each container that it starts in the pod."""
    specimen = Specimen.run(pod, program)
    specimen.tell("open /etc/hosts")
    asleep(daemon, specimen)
    hosts = next(Path(m.host_path) for m in specimen.container.config.mounts if m.container_path == "/etc/hosts")
    hosts.write_text("10.1.2.3\tan.alias\n")
    assert specimen.ask("read") == "10.1.2.3\tan.alias/"
    asleep(daemon, specimen)
    assert specimen.container.exec_sync("grep", "-c", "an.alias", "/etc/hosts").stdout == "1\n"
    restored(daemon, specimen)


def test_resolv_conf_of_the_pod(kubelet: Kubelet, direct: Kubelet, program: Path, daemon: Daemon) -> None:
    """`dnsPolicy`, `dnsConfig`."""

    def change(config: cri.PodSandboxConfig) -> None:
        config.dns_config.servers.append("10.96.0.10")
        config.dns_config.searches.extend(["default.svc.cluster.local", "cluster.local"])
        config.dns_config.options.append("ndots:5")

    found = []
    for one, wishes in ((direct, {}), (kubelet, QUICK)):
        with one.run_pod(annotations=wishes, change=change) as pod:
            specimen = Specimen.run(pod, program)
            specimen.tell("open /etc/resolv.conf")
            if one is kubelet:
                asleep(daemon, specimen)
            found.append(specimen.ask("read"))
    assert "nameserver 10.96.0.10" in found[0]
    assert found[1] == found[0]


def test_the_termination_message(pod: Pod, program: Path, daemon: Daemon) -> None:
    """`terminationMessagePath`: written before and after cycles, and right before the end."""
    specimen = Specimen.run(pod, program)
    specimen.tell("open /dev/termination-log")
    specimen.tell("write first")
    for number in range(2):
        asleep(daemon, specimen)
        specimen.tell(f"write {number}")
    asleep(daemon, specimen)
    specimen.tell("write last")
    specimen.end("exit 3")
    found = specimen.container.wait()
    assert (found.exit_code, found.reason) == (3, "Error")
    assert specimen.container.termination_message() == "first\n0\n1\nlast\n"


def test_an_empty_dir_in_memory_and_one_that_is_read_only(
    pod: Pod, program: Path, daemon: Daemon, tmp_path: Path
) -> None:
    memory, fixed = tmp_path / "memory", tmp_path / "fixed"
    for folder in (memory, fixed):
        folder.mkdir()
    (fixed / "file").write_text("fixed\n")

    def read_only(config: cri.ContainerConfig) -> None:
        next(mount for mount in config.mounts if mount.container_path == "/fixed").readonly = True

    with mounted(memory, "-t", "tmpfs", "tmpfs"):
        mounts = {memory: "/memory", fixed: "/fixed"}
        specimen = Specimen.run(pod, program, mounts=mounts, change=read_only)
        specimen.tell("open /memory/file")
        specimen.tell("write one")
        asleep(daemon, specimen)
        specimen.tell("write two")
        assert (memory / "file").read_text() == "one\ntwo\n"
        specimen.tell("open /fixed/file")
        asleep(daemon, specimen)
        assert specimen.ask("read") == "fixed/"
        assert specimen.container.exec_sync("touch", "/fixed/other").exit_code == 1
        restored(daemon, specimen)
        pod.remove()


def test_what_is_mounted_on_the_host_while_it_sleeps(pod: Pod, program: Path, daemon: Daemon, tmp_path: Path) -> None:
    """`mountPropagation: HostToContainer`: what the host mounts below a volume appears in the container."""
    shared = tmp_path / "shared"
    (shared / "one").mkdir(parents=True)
    (shared / "two").mkdir()

    def receives(config: cri.ContainerConfig) -> None:
        mount = next(mount for mount in config.mounts if mount.container_path == "/shared")
        mount.propagation = cri.MountPropagation.PROPAGATION_HOST_TO_CONTAINER

    with mounted(shared, "--bind", shared):
        subprocess.run(["mount", "--make-rshared", shared], check=True)
        specimen = Specimen.run(pod, program, mounts={shared: "/shared"}, change=receives)
        asleep(daemon, specimen)
        with mounted(shared / "one", "-t", "tmpfs", "tmpfs"):
            (shared / "one/file").write_text("mounted\n")
            specimen.tell("open /shared/one/file")
            assert specimen.ask("read") == "mounted/"
            asleep(daemon, specimen)
            with mounted(shared / "two", "-t", "tmpfs", "tmpfs"):
                assert specimen.ask("read") == "mounted/"
                specimen.tell("open /shared/two/file")
                asleep(daemon, specimen)
            # One that is open in the container goes from the host alone.
            specimen.tell("write here")
            assert specimen.ask("read") == "here/"
        restored(daemon, specimen)
        pod.remove()


def test_what_it_has_mounted_for_the_host_itself(
    kubelet: Kubelet, program: Path, daemon: Daemon, tmp_path: Path
) -> None:
    """`mountPropagation: Bidirectional`, which only privileged containers may have (a CSI driver)."""
    shared = tmp_path / "shared"
    (shared / "below").mkdir(parents=True)

    def pod_too(config: cri.PodSandboxConfig) -> None:
        config.linux.security_context.privileged = True

    def both_ways(config: cri.ContainerConfig) -> None:
        mount = next(mount for mount in config.mounts if mount.container_path == "/shared")
        mount.propagation = cri.MountPropagation.PROPAGATION_BIDIRECTIONAL

    with mounted(shared, "--bind", shared), kubelet.run_pod(annotations=QUICK, change=pod_too) as pod:
        subprocess.run(["mount", "--make-rshared", shared], check=True)
        specimen = Specimen.run(pod, program, mounts={shared: "/shared"}, change=both_ways, privileged=True)
        assert specimen.container.exec_sync("mount", "-t", "tmpfs", "tmpfs", "/shared/below").exit_code == 0
        specimen.tell("open /shared/below/file")
        for text in ("one", "two"):
            asleep(daemon, specimen)
            assert (shared / "below").is_mount()
            specimen.tell(f"write {text}")
        assert (shared / "below/file").read_text() == "one\ntwo\n"
        restored(daemon, specimen)
        pod.remove()
        subprocess.run(["umount", "--lazy", shared / "below"], check=True)


def test_fs_group(pod: Pod, program: Path, daemon: Daemon, tmp_path: Path) -> None:
    """kubelet gives the volume to the group, and the group to the container; neither is the user's own."""
    volume = tmp_path / "volume"
    volume.mkdir()
    os.chown(volume, 0, 4242)
    volume.chmod(0o2770)

    def member(config: cri.ContainerConfig) -> None:
        config.linux.security_context.run_as_user.value = 1234
        config.linux.security_context.run_as_group.value = 1234
        config.linux.security_context.supplemental_groups.append(4242)

    specimen = Specimen.run(pod, program, mounts={volume: "/volume"}, change=member)
    specimen.tell("open /volume/file")
    specimen.tell("write one")
    asleep(daemon, specimen)
    specimen.tell("write two")
    specimen.tell("open /volume/other")
    for file in (volume / "file", volume / "other"):
        assert (file.stat().st_uid, file.stat().st_gid) == (1234, 4242)
    restored(daemon, specimen)


def test_a_block_device(pod: Pod, program: Path, daemon: Daemon, tmp_path: Path) -> None:
    """`volumeDevices`. CRIU can save none that is open: the container is frozen then."""
    image = tmp_path / "disk"
    image.write_bytes(b"disk\n".ljust(1 << 20, b"\0"))
    device = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True).stdout
    try:

        def with_device(config: cri.ContainerConfig) -> None:
            config.devices.add(host_path=device.strip(), container_path="/dev/disk", permissions="mrw")

        specimen = Specimen.run(pod, program, change=with_device)
        asleep(daemon, specimen)
        specimen.tell("open /dev/disk")
        eventually(lambda: seen(daemon, specimen.id).state == "scaled_down", "it is scaled down")
        assert seen(daemon, specimen.id).tier == "freeze"
        assert specimen.ask("read") == "disk/"
        pod.remove()
    finally:
        subprocess.run(["losetup", "--detach", device.strip()], check=True)
