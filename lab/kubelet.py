"""A CRI client that asks for what kubelet asks for: the same calls in the same order, with kubelet's defaults.

    with Kubelet(containerd.endpoint, containerd) as kubelet:
        pod = kubelet.run_pod("redis", annotations={"criproxy.io/scaledown-duration": "5s"})
        container = pod.run("redis")
        container.exec_sync("redis-cli", "ping").stdout
        pod.remove()

The endpoint is containerd's socket or criproxy's. Calls go by name with messages of our partial api/cri.proto, in
`runtime.v1` or, for what an older kubelet would send, `runtime.v1alpha2`. Errors are grpc.RpcError, as kubelet gets
them.
"""

import contextlib
import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import grpc

from criproxy.api import cri_pb2 as cri
from lab import LabError, cgroups, image_name, stream
from lab.closing import Closing
from lab.containerd import Containerd

# kubelet's runtimeRequestTimeout, seconds.
TIMEOUT = 120.0
# Seconds for what has to come true: nobody waits for them when all is well, and a busy machine may need many.
PATIENCE = 60.0
# What kubelet asks to be hidden or read-only in a container that isn't privileged.
_MASKED = (
    "/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
    "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
)  # fmt: skip
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
# The files of cgroup v2 and v1, each with its line in memory.stat.
_USAGE = (("memory.current", "inactive_file"), ("memory.usage_in_bytes", "total_inactive_file"))
_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_IMAGE_CALLS = ("ListImages", "ImageStatus", "PullImage", "RemoveImage", "ImageFsInfo")

Response = TypeVar("Response")


@dataclass(frozen=True)
class Result:
    """What a command in a container wrote, and its exit code."""

    stdout: str
    stderr: str
    exit_code: int


@dataclass
class Kubelet(Closing):
    """See the module's text. `version` is the CRI package; `grace` how many seconds containers get for their end when
    their pod is removed."""

    endpoint: str
    lab: Containerd
    version: str = "runtime.v1"
    grace: int = 2
    pods: list["Pod"] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.channel = grpc.insecure_channel(self.endpoint, options=_UNLIMITED)
        self._numbers = itertools.count(1)

    def close(self) -> None:
        """Remove the pods that are left, as far as the endpoint still answers, and close the channel."""
        for pod in list(self.pods):
            with contextlib.suppress(grpc.RpcError):
                pod.remove()
        self.channel.close()

    def call(self, method: str, request: Any, response: type[Response], *, timeout: float = TIMEOUT) -> Response:
        """One unary call; the service follows from the method. `timeout` in seconds. Raises grpc.RpcError."""
        service = "ImageService" if method in _IMAGE_CALLS else "RuntimeService"
        invoke = self.channel.unary_unary(
            f"/{self.version}.{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,  # type: ignore[attr-defined]
        )
        answer: Response = invoke(request, timeout=timeout)
        return answer

    def events(self) -> Iterator[cri.ContainerEventResponse]:
        """GetContainerEvents: one event after another, until the iterator is closed."""
        invoke = self.channel.unary_stream(
            f"/{self.version}.RuntimeService/GetContainerEvents",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=cri.ContainerEventResponse.FromString,
        )
        answers = invoke(cri.GetEventsRequest())
        try:
            yield from answers
        finally:
            answers.cancel()  # type: ignore[no-untyped-call]

    def image_id(self, image: str) -> str:
        """The id under which kubelet names the image in CreateContainer. It waits until CRI knows a fresh import."""
        spec = cri.ImageSpec(image=image_name(image))
        deadline = time.monotonic() + PATIENCE
        while True:
            status = self.call("ImageStatus", cri.ImageStatusRequest(image=spec), cri.ImageStatusResponse)
            if status.HasField("image"):
                return status.image.id
            if time.monotonic() > deadline:
                raise LabError(f"There is no image {spec.image} here", "containerd.load() imports one of the lab's")
            time.sleep(0.05)

    def run_pod(
        self,
        name: str = "",
        *,
        annotations: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        runtime_handler: str = "",
        namespace: str = "default",
        cpu_limit: float = 0.0,
        memory_limit: int = 0,
        change: Callable[[cri.PodSandboxConfig], None] | None = None,
    ) -> "Pod":
        """Run a pod without containers. Limits (cores, bytes) are put on the pod's cgroup, as kubelet does; `change`
        may alter the configuration before it is sent. Raises grpc.RpcError."""
        uid = str(uuid.uuid4())
        name = name or f"pod-{next(self._numbers)}"
        log_directory = self.lab.logs / "pods" / f"{namespace}_{name}_{uid}"
        log_directory.mkdir(parents=True)
        cgroup = f"{self.lab.cgroup}/pod{uid}"
        cgroups.create(cgroup)
        _limit(cgroup, cpu_limit, memory_limit)
        options = cri.NamespaceOption(pid=cri.NamespaceMode.CONTAINER)
        config = cri.PodSandboxConfig(
            metadata=cri.PodSandboxMetadata(name=name, uid=uid, namespace=namespace),
            hostname=name,
            log_directory=str(log_directory),
            labels={
                **(labels or {}),
                "io.kubernetes.pod.name": name,
                "io.kubernetes.pod.namespace": namespace,
                "io.kubernetes.pod.uid": uid,
            },
            annotations={
                **(annotations or {}),
                "kubernetes.io/config.seen": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "kubernetes.io/config.source": "api",
            },
            linux=cri.LinuxPodSandboxConfig(
                cgroup_parent=cgroup,
                security_context=cri.LinuxSandboxSecurityContext(
                    namespace_options=options,
                    seccomp=cri.SecurityProfile(profile_type=cri.SecurityProfile.ProfileType.RuntimeDefault),
                ),
            ),
        )
        if change:
            change(config)
        pod = Pod(self, config, runtime_handler)
        # Known before it runs, for a call that fails may leave things behind that removing takes away.
        self.pods.append(pod)
        request = cri.RunPodSandboxRequest(config=config, runtime_handler=runtime_handler)
        try:
            pod.id = self.call("RunPodSandbox", request, cri.RunPodSandboxResponse).pod_sandbox_id
        except grpc.RpcError:
            pod.remove()
            raise
        return pod

    def adopt(self, sandbox: cri.PodSandbox) -> "Pod":
        """A pod that another client of this lab has run, to be looked at and removed."""
        config = cri.PodSandboxConfig(
            metadata=sandbox.metadata,
            labels=sandbox.labels,
            annotations=sandbox.annotations,
            linux=cri.LinuxPodSandboxConfig(cgroup_parent=f"{self.lab.cgroup}/pod{sandbox.metadata.uid}"),
        )
        pod = Pod(self, config, sandbox.runtime_handler, sandbox.id)
        request = cri.ListContainersRequest(filter=cri.ContainerFilter(pod_sandbox_id=sandbox.id))
        for item in self.call("ListContainers", request, cri.ListContainersResponse).containers:
            config_of_it = cri.ContainerConfig(metadata=item.metadata, labels=item.labels)
            pod.containers.append(Container(pod, config_of_it, item.id))
        self.pods.append(pod)
        return pod


@dataclass
class Pod:
    """A pod sandbox and its containers."""

    kubelet: Kubelet
    config: cri.PodSandboxConfig
    runtime_handler: str
    id: str = ""
    containers: list["Container"] = field(default_factory=list)

    def __enter__(self) -> "Pod":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def name(self) -> str:
        return self.config.metadata.name

    @property
    def uid(self) -> str:
        return self.config.metadata.uid

    @property
    def cgroup(self) -> str:
        """The cgroup that kubelet made for the pod, the same path in every hierarchy."""
        return f"{self.kubelet.lab.cgroup}/pod{self.uid}"

    def status(self, *, verbose: bool = False) -> cri.PodSandboxStatusResponse:
        request = cri.PodSandboxStatusRequest(pod_sandbox_id=self.id, verbose=verbose)
        return self.kubelet.call("PodSandboxStatus", request, cri.PodSandboxStatusResponse)

    @property
    def ip(self) -> str:
        """The pod's first address (IPv4 in the lab)."""
        return self.status().status.network.ip

    @property
    def ips(self) -> list[str]:
        network = self.status().status.network
        return [network.ip, *(other.ip for other in network.additional_ips)]

    @property
    def netns(self) -> Path:
        """Its network namespace, to be entered."""
        namespaces = json.loads(self.status(verbose=True).info["info"])["runtimeSpec"]["linux"]["namespaces"]
        return next(Path(namespace["path"]) for namespace in namespaces if namespace["type"] == "network")

    def create_container(
        self,
        image: str,
        name: str = "",
        *,
        command: Sequence[str] = (),
        args: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        working_dir: str = "",
        mounts: Mapping[Path | str, str] | None = None,
        user: int | None = None,
        cpu_limit: float = 0.0,
        memory_limit: int = 0,
        read_only: bool = False,
        privileged: bool = False,
        stdin: bool = False,
        tty: bool = False,
        attempt: int = 0,
        change: Callable[[cri.ContainerConfig], None] | None = None,
    ) -> "Container":
        """Create a container, not started. `mounts` maps host paths to paths in the container; limits in cores and
        bytes; `attempt` is kubelet's restart count; `change` may alter the configuration before it is sent."""
        name = name or image.rsplit("/", 1)[-1].split(":")[0]
        security = cri.LinuxContainerSecurityContext(
            privileged=privileged,
            namespace_options=self.config.linux.security_context.namespace_options,
            readonly_rootfs=read_only,
            masked_paths=() if privileged else _MASKED,
            readonly_paths=() if privileged else _READ_ONLY,
            # Kubelet's default without a profile in the pod's spec.
            seccomp=cri.SecurityProfile(profile_type=cri.SecurityProfile.ProfileType.Unconfined),
        )
        if user is not None:
            security.run_as_user.value = user
        config = cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name=name, attempt=attempt),
            image=cri.ImageSpec(image=self.kubelet.image_id(image), user_specified_image=image_name(image)),
            command=command,
            args=args,
            working_dir=working_dir,
            envs=[cri.KeyValue(key=key, value=value.encode()) for key, value in (environment or {}).items()],
            mounts=[
                *(cri.Mount(host_path=str(source), container_path=path) for source, path in (mounts or {}).items()),
                *self._own_mounts(name, attempt),
            ],
            labels={
                "io.kubernetes.container.name": name,
                "io.kubernetes.pod.name": self.name,
                "io.kubernetes.pod.namespace": self.config.metadata.namespace,
                "io.kubernetes.pod.uid": self.uid,
            },
            annotations={
                "io.kubernetes.container.hash": f"{hash((name, image)) & 0xFFFFFFFF:x}",
                "io.kubernetes.container.restartCount": str(attempt),
                "io.kubernetes.container.terminationMessagePath": "/dev/termination-log",
                "io.kubernetes.container.terminationMessagePolicy": "File",
                "io.kubernetes.pod.terminationGracePeriod": "30",
            },
            log_path=f"{name}/{attempt}.log",
            stdin=stdin,
            tty=tty,
            linux=cri.LinuxContainerConfig(
                resources=cri.LinuxContainerResources(
                    cpu_period=100_000,
                    cpu_quota=int(cpu_limit * 100_000),
                    cpu_shares=max(2, int(cpu_limit * 1024)),
                    memory_limit_in_bytes=memory_limit,
                    oom_score_adj=1000,
                ),
                security_context=security,
            ),
        )
        if change:
            change(config)
        Path(self.config.log_directory, name).mkdir(exist_ok=True)
        request = cri.CreateContainerRequest(pod_sandbox_id=self.id, config=config, sandbox_config=self.config)
        created = self.kubelet.call("CreateContainer", request, cri.CreateContainerResponse)
        container = Container(self, config, created.container_id)
        self.containers.append(container)
        return container

    def _own_mounts(self, name: str, attempt: int) -> list[cri.Mount]:
        """What kubelet mounts into every container: the hosts file and the place for the termination message."""
        files = Path(self.config.log_directory).parent.parent / "kubelet" / self.uid
        files.mkdir(parents=True, exist_ok=True)
        (files / "etc-hosts").write_text(f"127.0.0.1\tlocalhost\n::1\tlocalhost\n{self.ip}\t{self.name}\n")
        message = files / f"{name}-{attempt}-termination-log"
        message.touch()
        return [
            cri.Mount(host_path=str(files / "etc-hosts"), container_path="/etc/hosts"),
            cri.Mount(host_path=str(message), container_path="/dev/termination-log"),
        ]

    def run(self, image: str, name: str = "", **options: Any) -> "Container":
        """create_container() and start()."""
        container = self.create_container(image, name, **options)
        container.start()
        return container

    def run_init(self, image: str, name: str, *, timeout: float = PATIENCE, **options: Any) -> "Container":
        """An init container: the next one waits for its end. Raises LabError if it fails or takes longer than `timeout`
        seconds."""
        container = self.run(image, name, **options)
        if code := container.wait(timeout).exit_code:
            raise LabError(f"The init container {name} ended with {code}", container.logs())
        return container

    def debug(self, image: str, name: str, *, target: "Container | None" = None, **options: Any) -> "Container":
        """An ephemeral container, as `kubectl debug` has it made; with a `target` (`--target`) it is in that one's PID
        namespace."""
        change = options.pop("change", None)

        def ephemeral(config: cri.ContainerConfig) -> None:
            if target is not None:
                namespaces = config.linux.security_context.namespace_options
                namespaces.pid = cri.NamespaceMode.TARGET
                namespaces.target_id = target.id
            if change:
                change(config)

        return self.run(image, name, change=ephemeral, **options)

    def port_forward(self, port: int) -> stream.Stream:
        """An open stream to a port inside the pod, as `kubectl port-forward` has it."""
        request = cri.PortForwardRequest(pod_sandbox_id=self.id, port=[port])
        url = self.kubelet.call("PortForward", request, cri.PortForwardResponse).url
        return stream.Stream.open(url, ports=[port])

    def stop(self) -> None:
        """StopPodSandbox. Raises grpc.RpcError."""
        request = cri.StopPodSandboxRequest(pod_sandbox_id=self.id)
        self.kubelet.call("StopPodSandbox", request, cri.StopPodSandboxResponse)

    def remove(self, *, grace: int | None = None) -> None:
        """Stop its containers with `grace` seconds each, remove them and the sandbox, then its cgroup."""
        if self.id:
            for container in list(self.containers):
                container.stop(self.kubelet.grace if grace is None else grace)
                # containerd 1.6 answers as soon as the process is gone, and refuses to remove it until it has noticed.
                deadline = time.monotonic() + PATIENCE
                while container.runs() and time.monotonic() < deadline:
                    time.sleep(0.02)
                container.remove()
            self.stop()
            request = cri.RemovePodSandboxRequest(pod_sandbox_id=self.id)
            self.kubelet.call("RemovePodSandbox", request, cri.RemovePodSandboxResponse)
            self.id = ""
        cgroups.remove(self.cgroup)
        if self in self.kubelet.pods:
            self.kubelet.pods.remove(self)


@dataclass
class Container:
    """A container of a pod; `id` as CRI knows it."""

    pod: Pod
    config: cri.ContainerConfig
    id: str

    @property
    def name(self) -> str:
        return self.config.metadata.name

    @property
    def _call(self) -> Callable[..., Any]:
        return self.pod.kubelet.call

    def start(self) -> None:
        """Raises grpc.RpcError, for a missing executable for one."""
        self._call("StartContainer", cri.StartContainerRequest(container_id=self.id), cri.StartContainerResponse)

    def stop(self, grace: int = 30) -> None:
        """The stop signal, and SIGKILL after `grace` seconds."""
        request = cri.StopContainerRequest(container_id=self.id, timeout=grace)
        self._call("StopContainer", request, cri.StopContainerResponse, timeout=grace + TIMEOUT)

    def remove(self) -> None:
        self._call("RemoveContainer", cri.RemoveContainerRequest(container_id=self.id), cri.RemoveContainerResponse)
        if self in self.pod.containers:
            self.pod.containers.remove(self)

    def status_response(self, *, verbose: bool = True) -> cri.ContainerStatusResponse:
        request = cri.ContainerStatusRequest(container_id=self.id, verbose=verbose)
        answer: cri.ContainerStatusResponse = self._call("ContainerStatus", request, cri.ContainerStatusResponse)
        return answer

    def status(self) -> cri.ContainerStatus:
        return self.status_response(verbose=False).status

    def runs(self) -> bool:
        """Whether it is there, and runs."""
        state = cri.ContainerStateValue(state=cri.ContainerState.CONTAINER_RUNNING)
        request = cri.ListContainersRequest(filter=cri.ContainerFilter(id=self.id, state=state))
        return bool(self._call("ListContainers", request, cri.ListContainersResponse).containers)

    def wait(self, timeout: float = PATIENCE) -> cri.ContainerStatus:
        """Wait until it has exited, and return its status. Raises LabError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (status := self.status()).state != cri.ContainerState.CONTAINER_EXITED:
            if time.monotonic() > deadline:
                raise LabError(f"{self.name} did not exit within {timeout:g} s")
            time.sleep(0.05)
        return status

    def exec_sync(self, *command: str, timeout: int = 0) -> Result:
        """Run a command to its end, as exec probes do. `timeout` in seconds, 0 for none. Raises grpc.RpcError."""
        request = cri.ExecSyncRequest(container_id=self.id, cmd=command, timeout=timeout)
        answer: cri.ExecSyncResponse = self._call("ExecSync", request, cri.ExecSyncResponse)
        return Result(answer.stdout.decode(errors="replace"), answer.stderr.decode(errors="replace"), answer.exit_code)

    def exec_url(self, *command: str, tty: bool = False, stdin: bool = False) -> str:
        """The streaming URL that Exec answers."""
        request = cri.ExecRequest(container_id=self.id, cmd=command, tty=tty, stdin=stdin, stdout=True, stderr=not tty)
        answer: cri.ExecResponse = self._call("Exec", request, cri.ExecResponse)
        return answer.url

    def exec(self, *command: str, tty: bool = False, stdin: bool = False) -> stream.Stream:
        """An open stream to a command, as `kubectl exec` has it."""
        return stream.Stream.open(self.exec_url(*command, tty=tty, stdin=stdin))

    def attach(self, *, stdin: bool = False) -> stream.Stream:
        """An open stream to the container's own stdin, stdout and stderr."""
        request = cri.AttachRequest(container_id=self.id, stdin=stdin, stdout=True, stderr=True)
        answer: cri.AttachResponse = self._call("Attach", request, cri.AttachResponse)
        return stream.Stream.open(answer.url)

    def termination_message(self) -> str:
        """What kubelet shows as the message of a container that has ended (terminationMessagePath)."""
        place = self.config.annotations["io.kubernetes.container.terminationMessagePath"]
        return next(Path(m.host_path) for m in self.config.mounts if m.container_path == place).read_text()

    def reopen_log(self) -> None:
        request = cri.ReopenContainerLogRequest(container_id=self.id)
        self._call("ReopenContainerLog", request, cri.ReopenContainerLogResponse)

    @property
    def log(self) -> Path:
        return Path(self.pod.config.log_directory, self.config.log_path)

    def logs(self) -> str:
        """What it has written so far, both streams in their order, without CRI's time stamps."""
        text = ""
        # The last line may be half there.
        for line in self.log.read_text(errors="replace").rpartition("\n")[0].splitlines():
            _time, _stream, tag, *content = line.split(" ", 3)
            text += (content[0] if content else "") + ("\n" if tag == "F" else "")
        return text

    def cgroups(self) -> list[Path]:
        """Its cgroup's folder in every hierarchy in which containerd made one."""
        return [Path(d) for d in sorted(cgroups.subtree(self.pod.cgroup)) if Path(d).name == self.id]

    def memory(self) -> int:
        """The bytes that kubelet calls its working set: usage without the page cache that nobody uses."""
        for directory in self.cgroups():
            for usage, inactive in _USAGE:
                if (directory / usage).exists():
                    statistics = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
                    return max(0, int((directory / usage).read_text()) - int(statistics[inactive]))
        raise LabError(f"{self.name} has no memory cgroup")


def _limit(cgroup: str, cpu: float, memory: int) -> None:
    """The limits of the whole pod, in cores and bytes; 0 for none."""
    for directory in cgroups.directories(cgroup):
        for file, content in (
            ("cpu.max", f"{int(cpu * 100_000)} 100000" if cpu else ""),
            ("cpu.cfs_quota_us", str(int(cpu * 100_000)) if cpu else ""),
            ("memory.max", str(memory) if memory else ""),
            ("memory.limit_in_bytes", str(memory) if memory else ""),
        ):
            if content and (directory / file).exists():
                (directory / file).write_text(content)
