"""How a pod spec may ask its processes to be run, in pods that are scaled down: command, environment, rights
(docs/pod-spec.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from specimen import QUICK, Specimen, eventually, status, wait_for

from criproxy.api import cri_pb2 as cri
from criproxy.cri import rewrite
from lab.daemon import Daemon
from lab.kubelet import Container, Kubelet


def asleep(daemon: Daemon, specimen: Specimen) -> None:
    assert wait_for(daemon, specimen.id, "scaled_down").tier == "checkpoint"


# --- Command and environment -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"args": ["--version"]},
        {"command": ["/bin/sh"]},
        {"command": ["sh", "-c"], "args": ['printf \'%s|\' "$0" "$@"', "a b", "", "$HOME", "*"]},
        {"command": ["sh", "-c", "exec 2>&1; pwd; echo $$-$PPID >/dev/null"], "working_dir": "/not/there/yet"},
    ],
    ids=["neither", "args", "command", "both", "workingDir"],
)
def test_command_and_args(words: Mapping[str, Any], kubelet: Kubelet, direct: Kubelet) -> None:
    """Of an image that has both ENTRYPOINT and CMD."""
    ran = []
    for one, wishes in ((direct, {}), (kubelet, QUICK)):
        with one.run_pod(annotations=wishes) as pod:
            container = pod.run("redis", **words)
            if not words:
                eventually(lambda c=container: "Ready to accept connections" in c.logs(), "redis listens")
                ran.append(arguments(container))
            else:
                ran.append([str(container.wait().exit_code), container.logs()])
    assert ran[1] == ran[0]


def arguments(container: Container) -> list[str]:
    return container.exec_sync("sh", "-c", "tr '\\0' ' ' </proc/$(pidof redis-server)/cmdline").stdout.split()


def test_a_huge_environment_and_huge_arguments(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    """The kernel takes up to 128 KiB for one string, and 2 MiB for all of them with the usual limit of the stack."""
    longest = (128 << 10) - len("LONGEST=") - 1
    environment = {f"SERVICE_{number}": "x" * 5000 for number in range(100)} | {"LONGEST": "y" * longest}
    with kubelet.run_pod(annotations=QUICK) as pod:
        specimen = Specimen.run(pod, program, environment=environment, args=["z" * ((128 << 10) - 1), ""])
        before = startup(specimen)
        assert f"LONGEST={'y' * longest}\0".encode() in before[0]
        assert before[1].endswith(b"z\0\0")
        for count in ("1", "2"):
            asleep(daemon, specimen)
            assert specimen.ask("count") == count
            assert startup(specimen) == before


def startup(specimen: Specimen) -> list[bytes]:
    with specimen.awake():
        pid = specimen.pid()
        return [Path(f"/proc/{pid}/{file}").read_bytes() for file in ("environ", "cmdline")]


def test_what_is_too_long_for_the_kernel_ends_as_without_us(kubelet: Kubelet, direct: Kubelet) -> None:
    ends = []
    for one, wishes in ((direct, {}), (kubelet, QUICK)):
        with one.run_pod(annotations=wishes) as pod:
            container = pod.run("busybox", command=["true"], environment={"LONG": "x" * (128 << 10)})
            found = container.wait()
            ends.append(
                (found.exit_code, found.reason, found.message, container.logs().replace("/.criproxy/init", "/bin/true"))
            )
    assert "too long" in ends[0][-1]
    assert ends[1] == ends[0]


def test_sysctls_of_the_pod(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    wanted = {"net.ipv4.ip_unprivileged_port_start": "80", "net.core.somaxconn": "77", "kernel.shm_rmid_forced": "1"}
    with kubelet.run_pod(annotations=QUICK, change=lambda config: config.linux.sysctls.update(wanted)) as pod:
        specimen = Specimen.run(pod, program)
        for _ in range(2):
            asleep(daemon, specimen)
            paths = [f"/proc/sys/{name.replace('.', '/')}" for name in wanted]
            assert specimen.container.exec_sync("cat", *paths).stdout.split() == list(wanted.values())


# --- Rights ----------------------------------------------------------------------------------------------------


def test_a_privileged_container(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    def pod_too(config: cri.PodSandboxConfig) -> None:
        config.linux.security_context.privileged = True

    with kubelet.run_pod(annotations=QUICK, change=pod_too) as pod:
        specimen = Specimen.run(pod, program, privileged=True)
        before = rights(specimen)
        for count in ("1", "2"):
            asleep(daemon, specimen)
            assert specimen.ask("count") == count
            assert rights(specimen) == before


def rights(specimen: Specimen) -> dict[str, str]:
    with specimen.awake():
        return {key: value for key, value in status(specimen.pid()).items() if key.startswith(("Cap", "Seccomp"))}


# What runc and the specimen need, as somebody finds it out who traces an application's calls: it starts no processes.
_TRACED = """
    accept4 arch_prctl bind brk capget capset chdir clock_nanosleep close dup2 dup3 epoll_pwait execve exit
    exit_group faccessat2 fchdir fchown fcntl fstat fstatfs futex getcwd getdents64 getpid getppid getrandom
    getsockname listen lseek mmap mprotect munmap nanosleep newfstatat open openat poll ppoll prctl pread64
    prlimit64 read readlink readlinkat recvfrom recvmsg restart_syscall rseq rt_sigaction rt_sigprocmask
    rt_sigreturn sched_yield sendmsg sendto set_robust_list set_tid_address setgid setgroups setresgid setresuid
    setsockopt setuid sigaltstack socket tgkill umask write writev
"""


@pytest.mark.parametrize("more", [(), rewrite.INIT_CALLS], ids=["too narrow", "wide enough"])
def test_a_narrow_seccomp_profile(
    more: Sequence[str], kubelet: Kubelet, program: Path, daemon: Daemon, tmp_path: Path
) -> None:
    """`Localhost`. Without fork, wait or signals taken, our init couldn't even start the application."""
    profile = tmp_path / "profile.json"
    rules = [{"names": [*_TRACED.split(), *more], "action": "SCMP_ACT_ALLOW"}]
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}))

    def confined(config: cri.ContainerConfig) -> None:
        config.linux.security_context.seccomp.profile_type = cri.SecurityProfile.Localhost
        config.linux.security_context.seccomp.localhost_ref = str(profile)

    with kubelet.run_pod(annotations=QUICK) as pod:
        specimen = Specimen.run(pod, program, change=confined)
        for count in ("1", "2"):
            found = wait_for(daemon, specimen.id, "scaled_down")
            if more:
                assert (found.tier, found.reason) == ("checkpoint", "")
            else:
                assert found.tier == "freeze"
                assert "seccomp profile refuses clone" in found.reason
            assert specimen.ask("count") == count
        assert rights(specimen)["Seccomp"] == "2"
        specimen.container.stop(60)
        specimen.has_said("caught 15")
