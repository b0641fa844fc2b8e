"""What application, kubelet and containerd can tell of criproxy: the same pod through it and straight on containerd."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from specimen import (
    AWAKE,
    PORT,
    QUICK,
    Specimen,
    application_pid,
    comm,
    container_pids,
    eventually,
    seen,
    status,
    threads,
    wait_for,
)

from criproxy.api import cri_pb2 as cri
from lab.containerd import Containerd
from lab.daemon import Daemon
from lab.kubelet import Container, Kubelet, Pod

Change = Callable[[cri.ContainerConfig], None]


def restricted(config: cri.ContainerConfig) -> None:
    """What the Pod Security Standard of that name asks for, and most clusters that have one."""
    security = config.linux.security_context
    security.run_as_user.value = 33
    security.run_as_group.value = 33
    security.supplemental_groups.extend([102, 4242])
    security.no_new_privs = True
    security.readonly_rootfs = True
    security.capabilities.drop_capabilities.append("ALL")
    security.seccomp.Clear()
    security.seccomp.profile_type = cri.SecurityProfile.RuntimeDefault


def privileged(config: cri.ContainerConfig) -> None:
    security = config.linux.security_context
    security.privileged = True
    del security.masked_paths[:]
    del security.readonly_paths[:]


def particular(config: cri.ContainerConfig) -> None:
    config.working_dir = "/var/log/made by runc"
    config.envs.add(key="EMPTY", value=b"")
    config.envs.add(key="PATH", value=b"/nowhere:/bin")
    config.envs.add(key="LINES", value=b"one\ntwo")
    config.linux.security_context.run_as_user.value = 1234
    config.linux.security_context.capabilities.add_capabilities.append("SYS_NICE")
    config.linux.security_context.capabilities.add_ambient_capabilities.append("NET_BIND_SERVICE")
    config.linux.resources.oom_score_adj = 500
    config.linux.resources.cpuset_cpus = "0"


def plain(_: cri.ContainerConfig) -> None:
    pass


# --- What the application finds ------------------------------------------------------------------------------

REPORT = r"""
exec 2>&1
pid=$$
section() { printf '\n== %s\n' "$1"; }
for file in status limits mountinfo cgroup oom_score_adj attr/current timerslack_ns coredump_filter; do
    section $file; cat /proc/$pid/$file
done
section environ; tr '\0' '\1' </proc/$pid/environ
section cmdline; tr '\0' '\1' </proc/$pid/cmdline
section cwd; readlink /proc/$pid/cwd
section root; readlink /proc/$pid/root
section descriptors; for fd in /proc/$pid/fd/*; do echo "${fd##*/} $(readlink $fd)"; done
section session; set -- $(cut -d ')' -f 2 /proc/$pid/stat)
[ $3 = $pid ] && echo leads its group; [ $4 = $pid ] && echo leads its session; echo "tty $5 priority ${16} nice ${17}"
section id; id; id -G
section umask; umask
section hostname; hostname
section writes; for place in / /tmp /proc/sys /sys /dev/shm; do touch $place/written 2>&1; done
section files; ls -a / /run /dev
section end
"""

# Numbers that differ from one container to the next, and what an init can't but change.
_OWN_NUMBERS = ("Pid", "Tgid", "Ngid", "PPid", "NStgid", "NSpid", "NSpgid", "NSsid", "SigQ", "TracerPid")
_MEASURES = re.compile(r"^(State|Vm|Rss|Hugetlb|Core|THP|Speculation|voluntary|nonvoluntary|Mems|FDSize|untag|x86)")


@dataclass(frozen=True)
class Report:
    sections: Mapping[str, list[str]]

    @classmethod
    def of(cls, kubelet: Kubelet, change: Change, annotations: Mapping[str, str]) -> Report:
        def sandbox(config: cri.PodSandboxConfig) -> None:
            config.linux.security_context.privileged = change is privileged

        with kubelet.run_pod("same", annotations=annotations, change=sandbox) as pod:
            container = pod.run("busybox", "same", command=["/bin/sh", "-c", REPORT], change=change)
            assert container.wait().exit_code == 0
            eventually(lambda: container.logs().endswith("\n== end\n"), "its report is whole")
            text = container.logs()
            for own, word in ((container.id, "CONTAINER"), (pod.id, "SANDBOX"), (pod.uid, "UID"), (pod.ip, "ADDRESS")):
                text = text.replace(own, word)
        sections: dict[str, list[str]] = {}
        for section in text.split("\n== ")[1:]:
            name, _, content = section.partition("\n")
            sections[name] = content.strip("\n").splitlines()
        sections["status"] = [
            line for line in sections["status"] if line.split(":")[0] not in _OWN_NUMBERS and not _MEASURES.match(line)
        ]
        sections["mountinfo"] = sorted(mount for line in sections["mountinfo"] if (mount := _mount(line)))
        sections["descriptors"] = [re.sub(r"\[\d+\]", "[]", line) for line in sections["descriptors"]]
        sections["files"] = [line for line in sections["files"] if line not in (".criproxy", "criu.kdat")]
        return cls(sections)


def _mount(line: str) -> str:
    """Where what is mounted how; nothing for criproxy's own two."""
    fields = line.split()
    if fields[4] in ("/.criproxy", "/run/criu.kdat"):
        assert fields[5].startswith("ro")
        return ""
    kind, source, options = fields[fields.index("-") + 1 :][:3]
    if kind == "overlay":
        options = re.sub(r"snapshots/\d+", "snapshots/N", options)
    return f"{fields[4]} {fields[5]} {kind} {source} {options}"


@pytest.mark.parametrize("change", [plain, restricted, privileged, particular])
def test_the_application_finds_what_it_would_find_without_us(
    change: Change, kubelet: Kubelet, direct: Kubelet, daemon: Daemon
) -> None:
    ours = Report.of(kubelet, change, AWAKE).sections
    theirs = Report.of(direct, change, {}).sections
    assert ours.keys() == theirs.keys()
    for name in theirs:
        found, expected = ours[name], theirs[name]
        if name == "status" and change in (plain, particular):
            # Unconfined: ours is the one filter that keeps io_uring away.
            assert "Seccomp:\t2" in found
            found = [line for line in found if not line.startswith("Seccomp")]
            expected = [line for line in expected if not line.startswith("Seccomp")]
        assert found == expected, name


# --- What kubelet is told --------------------------------------------------------------------------------------


def outcome(kubelet: Kubelet, annotations: Mapping[str, str], command: Sequence[str], **options: Any) -> list[str]:
    """What creating, starting and ending such a container brings, without what is different each time."""
    told: list[str] = []
    with kubelet.run_pod("same", annotations=annotations) as pod:
        try:
            container = pod.create_container("busybox", "same", command=command, **options)
            container.start()
        except grpc.RpcError as error:
            told.append(f"{error.code()}: {error.details()}")
        for container in pod.containers:
            if not told:
                container.wait()
            found = container.status()
            told += [f"state {found.state}", f"exit code {found.exit_code}", f"reason {found.reason}", found.message]
        for container in pod.containers:
            told = [line.replace(container.id, "CONTAINER").replace(pod.id, "SANDBOX") for line in told]
    return told


@pytest.fixture
def awkward(tmp_path: Path) -> Path:
    """Files that can't be run, each for another reason."""
    tmp_path.chmod(0o755)
    (tmp_path / "not-executable").write_text("#!/bin/sh\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name, text, mode in (
        ("roots-alone", "#!/bin/sh\n", 0o700),
        ("no-format", "text", 0o755),
        ("no-interpreter", "#!/gone\n", 0o755),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (["/missing"], {}),
        (["missing"], {}),
        (["./missing", "argument"], {"working_dir": "/tmp"}),
        (["/awkward/not-executable"], {}),
        (["/awkward/folder"], {}),
        (["/awkward/dangling"], {}),
        (["/awkward/loop"], {}),
        (["/bin/sh/below"], {}),
        (["sh", "-c", "exit 5"], {"environment": {"PATH": "/nowhere"}}),
        (["sh", "-c", "exit 5"], {"working_dir": "/etc/passwd"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_run_is_the_same_error(
    command: list[str], options: dict[str, Any], awkward: Path, kubelet: Kubelet, direct: Kubelet, nothing_left: None
) -> None:
    options = {**options, "mounts": {awkward: "/awkward"}}
    expected = outcome(direct, {}, command, **options)
    assert "StatusCode" in expected[0], "the test is to show an error"
    assert outcome(kubelet, AWAKE, command, **options) == expected


@pytest.mark.parametrize("name", ["roots-alone", "no-format", "no-interpreter"])
def test_what_only_the_kernel_refuses_starts_and_fails(
    name: str, awkward: Path, kubelet: Kubelet, direct: Kubelet
) -> None:
    """The exit code is runc's own in one case and a shell's in the other; all the rest is the same."""
    ends = []
    for one, wishes in ((direct, {}), (kubelet, AWAKE)):
        state, code, *rest = outcome(one, wishes, [f"/awkward/{name}"], mounts={awkward: "/awkward"}, user=33)
        assert code != "exit code 0"
        ends.append([state, *rest])
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    "script",
    ["exit 0", "exit 3", "exit 255", "missing-in-the-shell", "sh -c 'kill -9 $$'; exit $?"],
)
def test_exit_codes(script: str, kubelet: Kubelet, direct: Kubelet) -> None:
    command = ["sh", "-c", script]
    assert outcome(kubelet, AWAKE, command) == outcome(direct, {}, command)


def test_killed_by_the_kernel(kubelet: Kubelet, direct: Kubelet, program: Path) -> None:
    """As the OOM killer does. (No other signal without a handler reaches a container's first process.)"""
    codes = []
    for one, wishes in ((direct, {}), (kubelet, AWAKE)):
        with one.run_pod(annotations=wishes) as pod:
            specimen = Specimen.run(pod, program)
            specimen.ask("count")
            os.kill(specimen.pid(), signal.SIGKILL)
            found = specimen.container.wait()
            codes.append((found.exit_code, found.reason, found.message))
    assert codes == [(128 + signal.SIGKILL, "Error", "")] * 2


def test_what_stop_container_brings(kubelet: Kubelet, direct: Kubelet, program: Path, daemon: Daemon) -> None:
    ends = []
    for one, wishes in ((direct, {}), (kubelet, QUICK)):
        with one.run_pod(annotations=wishes) as pod:
            specimen = Specimen.run(pod, program)
            specimen.tell("on-term 17")
            if one is kubelet:
                wait_for(daemon, specimen.id, "scaled_down")
            specimen.container.stop(100)
            found = specimen.container.status()
            specimen.has_said("caught 15")
            ends.append((found.state, found.exit_code, found.reason, found.message, specimen.log))
    assert ends[0] == ends[1]
    assert ends[0][4] == ["listening", "caught 15"]


# --- Streams ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("once", [False, True], ids=["stdin", "stdinOnce"])
def test_stdin(once: bool, kubelet: Kubelet, direct: Kubelet, program: Path, daemon: Daemon) -> None:
    def change(config: cri.ContainerConfig) -> None:
        config.stdin_once = once

    heard = []
    for one, wishes in ((direct, {}), (kubelet, QUICK)):
        with one.run_pod(annotations=wishes) as pod:
            specimen = Specimen.run(pod, program, stdin=True, change=change)
            for word in ("one", "two"):
                if one is kubelet:
                    wait_for(daemon, specimen.id, "scaled_down")
                with specimen.container.attach(stdin=True) as attached:
                    attached.write(f"{word}\n".encode())
                    eventually(lambda s=specimen, w=word: w in s.ask("input"), "it has come in")
                if once:
                    break
            wanted = "one/EOF" if once else "one/two/"
            eventually(lambda s=specimen, w=wanted: s.ask("input") == w, "all of it has come in")
            heard.append(specimen.ask("input"))
    assert heard[0] == heard[1]


def test_without_stdin_it_reads_the_end_at_once(kubelet: Kubelet, direct: Kubelet, program: Path) -> None:
    heard = []
    for one, wishes in ((direct, {}), (kubelet, QUICK)):
        with one.run_pod(annotations=wishes) as pod:
            heard.append(Specimen.run(pod, program).ask("input"))
    assert heard == ["EOF", "EOF"]


def test_logs_are_whole_and_in_order_across_cycles(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    with kubelet.run_pod(annotations=QUICK) as pod:
        specimen = Specimen.run(pod, program)
        expected = ["listening"]
        for cycle in range(3):
            # A line that is begun before a checkpoint and ended after it is one line.
            specimen.tell(f"begin-line half of {cycle}, ")
            wait_for(daemon, specimen.id, "scaled_down")
            specimen.tell("say and the rest")
            specimen.tell(f"complain about {cycle}")
            specimen.tell("flood 300")
            expected += [f"half of {cycle}, and the rest", f"about {cycle}", *(f"line {n}" for n in range(300))]
        specimen.end("exit 0")
        specimen.container.wait()
        eventually(lambda: len(specimen.log) >= len(expected), "all is written")
        written = [line.split(" ", 3) for line in specimen.container.log.read_text().splitlines()]
        # The two streams are read by two readers: each is in its own order.
        for stream in ("stdout", "stderr"):
            own = [line for line in expected if line.startswith("about") == (stream == "stderr")]
            assert [content for _, name, _, content in written if name == stream] == own
        assert {tag for _, _, tag, _ in written} == {"F"}


def test_a_log_that_is_rotated_while_it_sleeps(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    with kubelet.run_pod(annotations=QUICK) as pod:
        specimen = Specimen.run(pod, program)
        wait_for(daemon, specimen.id, "scaled_down")
        old = specimen.container.log.rename(specimen.container.log.with_suffix(".old"))
        specimen.container.reopen_log()
        assert seen(daemon, specimen.id).state == "scaled_down"
        specimen.tell("say something new")
        eventually(lambda: specimen.log == ["something new"], "it is in the new file")
        assert "new" not in old.read_text()


# --- What a restored process is --------------------------------------------------------------------------------

_ATTRIBUTES = (
    *(
        "Name",
        "Umask",
        "Uid",
        "Gid",
        "Groups",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp",
    ),
    *("Seccomp_filters", "Cpus_allowed", "SigBlk", "ShdPnd", "SigPnd", "SigIgn", "SigCgt", "NSpid", "NSpgid", "NSsid"),
)
_FILES = ("oom_score_adj", "cgroup", "limits", "cmdline", "environ", "coredump_filter", "loginuid", "personality")
_LINKS = ("exe", "cwd", "root", *(f"ns/{kind}" for kind in ("mnt", "net", "pid", "ipc", "uts", "cgroup", "user")))
_THREAD_FILES = ("attr/current", "cgroup", "oom_score_adj", "comm")


def descriptors(pid: int) -> dict[str, str]:
    found = {}
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        # Closed meanwhile.
        with contextlib.suppress(FileNotFoundError):
            found[descriptor] = os.readlink(f"/proc/{pid}/fd/{descriptor}")
    return found


def attributes(container: Container) -> dict[str, str]:
    """Everything that should be the same after a restore, of each thread, by its number in the container."""
    found: dict[str, str] = {}
    for pid in container_pids(container):
        process = status(pid)["NSpid"].split()[-1]
        for file in _FILES:
            with contextlib.suppress(FileNotFoundError):
                found[f"{process} {file}"] = Path(f"/proc/{pid}/{file}").read_bytes().decode(errors="replace")
        for link in _LINKS:
            found[f"{process} {link}"] = os.readlink(f"/proc/{pid}/{link}")
        for descriptor, target in descriptors(pid).items():
            # Sockets are made anew, and so get new numbers; pipes are init's own.
            found[f"{process} fd {descriptor}"] = re.sub(r"^(socket:)\[\d+\]", r"\1", target)
        for tid in threads(pid):
            known = status(pid, tid)
            thread = f"{process} thread {known['NSpid'].split()[-1]}"
            for name in _ATTRIBUTES:
                value = known.get(name, "")
                # The host's numbers are new, the container's aren't.
                found[f"{thread} {name}"] = value.split()[-1] if name.startswith("NS") and value else value
            for file in _THREAD_FILES:
                with contextlib.suppress(OSError):
                    found[f"{thread} {file}"] = Path(f"/proc/{pid}/task/{tid}/{file}").read_text()
            scheduled = Path(f"/proc/{pid}/task/{tid}/stat").read_text().rpartition(")")[2].split()
            found[f"{thread} scheduling"] = " ".join(scheduled[place] for place in (15, 16, 37, 38))
    return found


@pytest.mark.parametrize("change", [plain, restricted, particular])
def test_every_thread_comes_back_as_it_was(change: Change, kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    def smaller(config: cri.ContainerConfig) -> None:
        change(config)
        # Not the largest, so that it can be raised below; CRIU restores none but 0.
        config.linux.resources.oom_score_adj = 300

    with kubelet.run_pod(annotations=QUICK) as pod:
        specimen = Specimen.run(pod, program, change=smaller)
        with specimen.awake():
            specimen.tell("threads")
            pid = specimen.pid()
            (Path("/proc") / str(pid) / "oom_score_adj").write_text("444")
            os.setpriority(os.PRIO_PROCESS, pid, 7)
            if change is not particular:
                os.sched_setaffinity(pid, {1})
            # The listener and the datagrams': the connection over which it was told is at its end for it, too.
            eventually(lambda: _sockets(pid) == 2, "nobody is connected")
            before = attributes(specimen.container)
            assert len(list(threads(pid))) == 5
        for _ in range(2):
            assert wait_for(daemon, specimen.id, "scaled_down").tier == "checkpoint"
            specimen.ask("count")
            with specimen.awake():
                after = eventually(lambda: _settled(specimen.container, before), "the threads are as before")
            assert after == before


def _sockets(pid: int) -> int:
    return sum(target.startswith("socket:") for target in descriptors(pid).values())


def _settled(container: Container, before: dict[str, str]) -> dict[str, str]:
    """What is compared right after the first packet is put right within a moment; what is still wrong is shown."""
    after = attributes(container)
    different = {key: (before.get(key), after.get(key)) for key in before.keys() | after.keys()}
    wrong = {key: values for key, values in different.items() if values[0] != values[1]}
    if wrong:
        print(wrong)
        return {}
    return after


# --- Limits and accounts ---------------------------------------------------------------------------------------

_LIMITS = ("cpu.cfs_quota_us", "cpu.max", "memory.limit_in_bytes", "memory.max", "memory.oom.group", "pids.max")


def limits(pod: Pod, container: Container) -> dict[str, str]:
    """Of the container and of its pod."""
    found = {}
    for folder in container.cgroups():
        for level in (folder, folder.parent):
            for name in _LIMITS:
                if (level / name).exists():
                    found[str(level / name)] = (level / name).read_text()
    return found


def test_a_cpu_limit_does_not_slow_a_wake_and_is_back_afterwards(
    kubelet: Kubelet, program: Path, daemon: Daemon
) -> None:
    for limit in (0.0, 0.05):
        with kubelet.run_pod(annotations=QUICK, cpu_limit=limit, memory_limit=256 << 20) as pod:
            specimen = Specimen.run(pod, program, cpu_limit=limit, memory_limit=128 << 20)
            before = limits(pod, specimen.container)
            assert any(int(value.split()[0]) == 5000 for name, value in before.items() if "cpu" in name) == bool(limit)
            stops = []
            for _ in range(4):
                wait_for(daemon, specimen.id, "scaled_down")
                earlier = throttled(specimen.container)
                specimen.ask("count")
                assert eventually(lambda s=specimen, p=pod: limits(p, s.container), "they can be read") == before
                stops.append(throttled(specimen.container) - earlier)
            # With 5 ms of each 100 ms, what needs 10 ms would be stopped each time.
            assert 0 in stops, stops


def throttled(container: Container) -> int:
    """How often the kernel has stopped it, or its pod, until the next period of its CPU limit."""
    count = 0
    for folder in container.cgroups():
        for level in (folder, folder.parent):
            if (level / "cpu.stat").exists():
                lines = dict(line.split() for line in (level / "cpu.stat").read_text().splitlines())
                count += int(lines.get("nr_throttled", 0))
    return count


def test_memory_is_given_back_and_charged_again(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    with kubelet.run_pod(annotations=QUICK) as pod:
        specimen = Specimen.run(pod, program, memory=40)
        for _ in range(2):
            with specimen.awake():
                eventually(lambda: specimen.container.memory() > 40 << 20, "its memory is its own")
                assert seen(daemon, specimen.id).memory_bytes > 40 << 20
            down = wait_for(daemon, specimen.id, "scaled_down")
            assert down.checkpoint_bytes > 40 << 20
            eventually(lambda: specimen.container.memory() < 8 << 20, "its memory is given back")
            assert seen(daemon, specimen.id).memory_bytes < 8 << 20
            folder = daemon.state_dir / "containers" / specimen.id
            images = next(folder.glob("checkpoint*/"))
            assert (folder.stat().st_mode & 0o777, images.stat().st_mode & 0o777) == (0o700, 0o700)
            specimen.ask("count")
            # What was secret there isn't left lying about.
            with specimen.awake():
                eventually(lambda f=folder: not list(f.glob("checkpoint*")), "the checkpoint is deleted")


# --- Byte for byte ---------------------------------------------------------------------------------------------


@dataclass
class Recorder:
    """A relay before containerd that keeps what it is asked for: pairs of method and request."""

    containerd: Containerd
    calls: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"unix://{self.containerd.state}/recorder.sock"

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        class Generic(grpc.GenericRpcHandler):  # type: ignore[misc]
            @staticmethod
            def service(details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
                return grpc.unary_unary_rpc_method_handler(
                    lambda data, context: self._relay(details.method, data, context)
                )

        self._channel = grpc.insecure_channel(self.containerd.endpoint)
        server = grpc.server(concurrent.futures.ThreadPoolExecutor(16), handlers=[Generic()])
        server.add_insecure_port(self.endpoint)
        server.start()
        try:
            yield
        finally:
            server.stop(0).wait()
            self._channel.close()

    def _relay(self, method: str, data: bytes, context: grpc.ServicerContext) -> bytes:
        self.calls.append((method, data))
        try:
            answer: bytes = self._channel.unary_unary(method)(data, timeout=60)
            return answer
        except grpc.RpcError as error:
            context.abort(error.code(), error.details())
            raise


class Second(Daemon):
    """Another criproxy of the same lab, in front of the recorder."""

    @property
    def run_dir(self) -> Path:
        return self.lab.state / "second"

    @property
    def state_dir(self) -> Path:
        return self.lab.root / "second"


@dataclass
class Strange:
    """Bytes that mean the message, as no encoder of ours would write them: with fields that nobody knows before and
    behind, so that whoever decodes and encodes it again betrays himself."""

    data: bytes

    @classmethod
    def of(cls, message: Any) -> Strange:
        unknown = b"\xfa\xff\x01\x03odd"  # field 4095, three bytes
        return cls(unknown + message.SerializeToString() + unknown + b"\xf8\xff\x01\x80\x80\x00")

    def SerializeToString(self) -> bytes:
        return self.data


class StrangeKubelet(Kubelet):
    """Keeps what it sends."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sent: list[tuple[str, bytes]] = []

    def call(self, method: str, request: Any, response: Any, **options: Any) -> Any:
        strange = Strange.of(request)
        service = "ImageService" if method == "ImageStatus" else "RuntimeService"
        self.sent.append((f"/{self.version}.{service}/{method}", strange.data))
        return super().call(method, strange, response, **options)


@pytest.fixture(scope="module")
def recorder(containerd: Containerd) -> Iterator[Recorder]:
    recorder = Recorder(containerd)
    with recorder.serving():
        yield recorder


@pytest.fixture(scope="module")
def second(containerd: Containerd, recorder: Recorder) -> Iterator[Second]:
    settings = {"runtime-endpoint": recorder.endpoint, "scaledown-duration": "400ms"}
    with Second(containerd, settings) as daemon:
        yield daemon


@pytest.fixture
def strange(second: Second, recorder: Recorder, containerd: Containerd) -> Iterator[StrangeKubelet]:
    recorder.calls.clear()
    with StrangeKubelet(second.endpoint, containerd) as client:
        yield client


def test_a_pod_that_does_not_opt_in_is_byte_for_byte_what_it_was(
    strange: StrangeKubelet, recorder: Recorder, program: Path
) -> None:
    others = {"example.com/scaledown-duration": "1s", "criproxy.io.example/tier": "freeze"}
    with strange.run_pod(annotations=others) as pod:
        specimen = Specimen.run(pod, program)
        specimen.container.exec_sync("true")
        specimen.container.exec_url("true")
        specimen.container.reopen_log()
        specimen.container.stop(5)
    strange.call("Status", cri.StatusRequest(verbose=True), cri.StatusResponse)
    strange.call("ListContainers", cri.ListContainersRequest(), cri.ListContainersResponse)
    assert {"RunPodSandbox", "CreateContainer", "StartContainer", "RemovePodSandbox"} < {
        method.rpartition("/")[2] for method, _ in strange.sent
    }
    # The same calls in the same order, with the same bytes; and none besides.
    assert recorder.calls == strange.sent


def test_a_container_that_is_not_named_is_byte_for_byte_what_it_was(
    strange: StrangeKubelet, recorder: Recorder, second: Second, program: Path
) -> None:
    with strange.run_pod(annotations={**QUICK, "criproxy.io/container-names": "one"}) as pod:
        one = Specimen.run(pod, program, "one")
        two = Specimen.run(pod, program, "two", port=PORT + 1)
        created = [data for method, data in recorder.calls if method.endswith("/CreateContainer")]
        sent = [data for method, data in strange.sent if method.endswith("/CreateContainer")]
        assert (created[0] != sent[0], created[1] == sent[1]) == (True, True)
        # In the one that is changed, all that criproxy doesn't know is still there.
        assert created[0].count(b"odd") == 2
        assert comm(application_pid(two.container)) == "specimen"
        wait_for(second, one.id, "scaled_down")
        assert one.ask("count") == "1"


def test_containerd_never_hears_of_zeropods_handler(strange: StrangeKubelet, recorder: Recorder, program: Path) -> None:
    """kubelet names the handler of `runtimeClassName: zeropod` in more and more calls; containerd has none of that
    name, and would refuse the pod."""
    spec = cri.ImageSpec(image=strange.image_id("busybox"), runtime_handler="zeropod")

    def handler(config: cri.ContainerConfig) -> None:
        config.image.runtime_handler = "zeropod"

    for method, request, response in (
        ("ImageStatus", cri.ImageStatusRequest(image=spec), cri.ImageStatusResponse),
        ("ListImages", cri.ListImagesRequest(filter=cri.ImageFilter(image=spec)), cri.ListImagesResponse),
    ):
        strange.call(method, request, response)
    nowhere = cri.ImageSpec(image="localhost:1/none", runtime_handler="zeropod")
    with pytest.raises(grpc.RpcError):
        strange.call("PullImage", cri.PullImageRequest(image=nowhere), cri.PullImageResponse)
    strange.call("RemoveImage", cri.RemoveImageRequest(image=nowhere), cri.RemoveImageResponse)
    with strange.run_pod(runtime_handler="zeropod") as pod:
        specimen = Specimen.run(pod, program, change=handler)
        assert pod.status().status.state == cri.PodSandboxState.SANDBOX_READY
        assert specimen.ask("count") == "1"
    named = {method.rpartition("/")[2] for method, data in strange.sent if b"zeropod" in data}
    assert named == {"RunPodSandbox", "CreateContainer", "ImageStatus", "ListImages", "PullImage", "RemoveImage"}
    assert [method for method, data in recorder.calls if b"zeropod" in data] == []


def test_the_operators_duration_is_the_default(strange: StrangeKubelet, second: Second, program: Path) -> None:
    with strange.run_pod(annotations={"criproxy.io/ports-map": f"specimen={PORT}"}) as pod:
        specimen = Specimen.run(pod, program)
        assert "after 0.4 s" in seen(second, specimen.id).reason or seen(second, specimen.id).state != "running"
        wait_for(second, specimen.id, "scaled_down")
        second.restart()
        assert specimen.ask("count") == "1"
        wait_for(second, specimen.id, "scaled_down")


@pytest.mark.parametrize("broken", ["seccomp", "containers", "sandboxes"])
def test_what_fails_on_our_side_never_fails_a_pod(
    broken: str, strange: StrangeKubelet, second: Second, program: Path
) -> None:
    """Here: folders of its state that can't be written to, as on a disk that is full or has gone bad."""
    folder = second.state_dir / broken
    aside = folder.with_suffix(".aside")
    if folder.exists():
        folder.rename(aside)
    folder.touch()
    try:
        with strange.run_pod(annotations=QUICK) as pod:
            specimen = Specimen.run(pod, program)
            eventually(lambda: seen(second, specimen.id).reason, "it is said why, or when")
            for count in range(1, 4):
                assert specimen.ask("count") == str(count)
            assert specimen.container.exec_sync("echo", "here").stdout == "here\n"
            specimen.container.stop(100)
            specimen.has_said("caught 15")
    finally:
        folder.unlink()
        if aside.exists():
            aside.rename(folder)
