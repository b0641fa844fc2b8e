"""What criproxy does with kubelet's calls: the CRI methods that it looks into, each with its interceptor.

Pods that didn't opt in pass through here with the bytes that came. What fails on criproxy's own side never fails a
pod: its containers then run untouched, with the reason in `criproxy status`. Only a bad annotation is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from criproxy import policy
from criproxy.annotations import PREFIXES, PolicyError, policy_of
from criproxy.api import cri_pb2 as cri
from criproxy.config import Config
from criproxy.cri import executable, forensic, rewrite
from criproxy.cri.calls import Call, Interceptor, UpstreamError, methods
from criproxy.cri.containerd import Configuration
from criproxy.cri.runtime import CriError, ImageConfig, Runtime, stop_signal
from criproxy.cri.seccomp import Profiles
from criproxy.cri.streaming import Streaming
from criproxy.criu.bundle import Bundle
from criproxy.kubelet.connections import Kubelet
from criproxy.node import Node
from criproxy.record import Record, State
from criproxy.sandbox import Member, Sandbox, SandboxRecord
from criproxy.scaledown import Refused

log = logging.getLogger(__name__)

EXIT_SECONDS = 5.0
"""How long containerd may take to notice that a container has ended."""


class Interceptors:
    def __init__(
        self,
        config: Config,
        node: Node,
        runtime: Runtime,
        bundle: Bundle,
        profiles: Profiles,
        kubelet: Kubelet,
    ) -> None:
        self._config = config
        self._node = node
        self._runtime = runtime
        self._bundle = bundle
        self._profiles = profiles
        self._kubelet = kubelet
        self._streaming = Streaming()
        self._debugging: dict[str, contextlib.AsyncExitStack] = {}
        """What keeps the targets of ephemeral containers up until these start, by the ephemeral one's id."""
        self._tasks: set[asyncio.Task[None]] = set()

    def by_method(self) -> Mapping[str, Interceptor]:
        handlers: dict[str, Interceptor] = {
            "Version": self.version,
            "Status": self.status,
            "RunPodSandbox": self.run_pod_sandbox,
            "StopPodSandbox": self.stop_pod_sandbox,
            "RemovePodSandbox": self.remove_pod_sandbox,
            "CreateContainer": self.create_container,
            "StartContainer": self.start_container,
            "StopContainer": self.stop_container,
            "RemoveContainer": self.remove_container,
            "ExecSync": self.exec_sync,
            "UpdateContainerResources": self.update_container_resources,
            "CheckpointContainer": self.checkpoint_container,
            "Exec": self.stream,
            "Attach": self.stream,
            "PortForward": self.port_forward,
            **dict.fromkeys(("PullImage", "ImageStatus", "RemoveImage", "ListImages"), self.image),
        }
        return {method: handler for name, handler in handlers.items() for method in methods(name)}

    async def close(self) -> None:
        await self._streaming.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- the node and its images ---------------------------------------------------------------------------

    async def version(self, call: Call) -> bytes:
        # The first that kubelet asks when it is (re)started, maybe in another cgroup.
        self._kubelet.look()
        return await call.forward()

    async def status(self, call: Call) -> bytes:
        # Each 5 seconds.
        self._kubelet.look()
        return rewrite.status(await call.forward())

    async def image(self, call: Call) -> bytes:
        return await call.forward(rewrite.image(call.name, call.request))

    # --- pods ----------------------------------------------------------------------------------------------

    async def run_pod_sandbox(self, call: Call) -> bytes:
        request = cri.RunPodSandboxRequest.FromString(call.request)
        metadata = request.config.metadata
        try:
            pod = policy_of(
                request.config.annotations, request.runtime_handler, default_duration=self._config.scaledown_duration
            )
        except PolicyError as error:
            log.warning("%s/%s: refused: %s", metadata.namespace, metadata.name, error)
            call.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if pod is None:
            return await call.forward()
        for key in pod.ignored:
            log.info("%s/%s: %s has no meaning here and is ignored", metadata.namespace, metadata.name, key)
        response = await call.forward(rewrite.sandbox(call.request))
        await self._shielded(self._add_sandbox(cri.RunPodSandboxResponse.FromString(response).pod_sandbox_id, request))
        return response

    async def _add_sandbox(self, sandbox_id: str, request: cri.RunPodSandboxRequest) -> None:
        record = SandboxRecord(
            id=sandbox_id,
            namespace=request.config.metadata.namespace,
            name=request.config.metadata.name,
            annotations={k: v for k, v in request.config.annotations.items() if k.startswith(PREFIXES)},
            runtime_handler=request.runtime_handler,
        )
        await self._node.add_sandbox(record)

    async def stop_pod_sandbox(self, call: Call) -> bytes:
        request = cri.StopPodSandboxRequest.FromString(call.request)
        response = await self._killed(call, self._members(request.pod_sandbox_id))
        await self._shielded(self._node.stopped_sandbox(request.pod_sandbox_id))
        return response

    async def remove_pod_sandbox(self, call: Call) -> bytes:
        request = cri.RemovePodSandboxRequest.FromString(call.request)
        response = await self._killed(call, self._members(request.pod_sandbox_id))
        await self._shielded(self._node.removed_sandbox(request.pod_sandbox_id))
        return response

    # --- containers ----------------------------------------------------------------------------------------

    async def create_container(self, call: Call) -> bytes:
        request = cri.CreateContainerRequest.FromString(call.request)
        namespaces = request.config.linux.security_context.namespace_options
        target = self._node.member(namespaces.target_id) if namespaces.pid == cri.TARGET else None
        if target is None or target.container is None:
            return await self._create_container(call, request)
        # It is to find the application. Once it runs, its processes keep that up (Workload.visitors).
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(target.container.awake(f"kubectl debug ({request.config.metadata.name})"))
            response = await self._create_container(call, request)
            self._debugging[cri.CreateContainerResponse.FromString(response).container_id] = stack.pop_all()
        return response

    async def _create_container(self, call: Call, request: cri.CreateContainerRequest) -> bytes:
        sandbox = self._node.sandboxes.get(request.pod_sandbox_id)
        untouched = rewrite.container_handler(call.request)
        if sandbox is None or not sandbox.policy.covers(request.config.metadata.name):
            return await call.forward(untouched)
        record = Record(
            id="",
            sandbox_id=sandbox.record.id,
            namespace=sandbox.record.namespace,
            pod=sandbox.record.name,
            name=request.config.metadata.name,
        )
        try:
            response = await self._create_with_init(call, request, sandbox, record)
        except rewrite.Unsupported as error:
            why = error.reason or "it is to be frozen"
            log.info("%s/%s/%s: runs untouched: %s", record.namespace, record.pod, record.name, why)
            record.bundle = ""
            if error.freezable and sandbox.policy.tier in (policy.Tier.AUTO, policy.Tier.FREEZE):
                record.untouched = error.reason
            else:
                record.state, record.reason = State.DISABLED, error.reason
            response = await call.forward(untouched)
        record.id = cri.CreateContainerResponse.FromString(response).container_id
        self._node.add_container(sandbox, record)
        return response

    async def _create_with_init(
        self, call: Call, request: cri.CreateContainerRequest, sandbox: Sandbox, record: Record
    ) -> bytes:
        if sandbox.record.problem:
            raise rewrite.Unsupported(sandbox.record.problem)
        handler = sandbox.record.runtime_handler
        try:
            # Each time: containerd may have been restarted with another configuration, and this costs a millisecond.
            configuration = Configuration.from_info(await self._runtime.info())
            image = await self._runtime.image_status(request.config.image.image)
        except CriError as error:
            raise rewrite.Unsupported(f"its image's entrypoint is not known: {error}") from None
        try:
            rewritten = rewrite.container(
                call.request,
                policy=sandbox.policy,
                entrypoint=image.entrypoint,
                cmd=image.cmd,
                bundle=self._bundle.path,
                profiles=self._profiles,
                runtime=configuration,
                handler="" if handler == policy.HANDLER else handler,
            )
        except rewrite.Unsupported:
            raise
        except Exception as error:
            # A full disk, or a bug of ours: neither may keep the container from running.
            log.warning("%s/%s: %s", record.namespace, record.pod, error, exc_info=not isinstance(error, OSError))
            raise rewrite.Unsupported(f"criproxy can't rewrite it: {error}", freezable=True) from error
        record.stop_signal = stop_signal(request.config.stop_signal) or image.stop_signal or "SIGTERM"
        record.bundle = str(self._bundle.path)
        response = await call.forward(rewritten)
        container_id = cri.CreateContainerResponse.FromString(response).container_id
        command = rewrite.argv(request.config, image.entrypoint, image.cmd)[0]
        if await self._missing(container_id, command, request, image):
            # runc says so best, as the error of StartContainer that kubelet expects: it gets the request as it was.
            try:
                await self._runtime.remove_container(container_id)
            except CriError as error:
                # Its name is taken then. Our init says the same a moment later, by the container's end.
                log.warning("container %s can't be made anew without its init: %s", container_id, error)
                return response
            raise rewrite.Unsupported(f'its command "{command}" is not there')
        return response

    async def start_container(self, call: Call) -> bytes:
        request = cri.StartContainerRequest.FromString(call.request)
        async with self._debugging.pop(request.container_id, contextlib.AsyncExitStack()):
            response = await call.forward()
        member = self._node.member(request.container_id)
        if member is not None:
            await self._shielded(self._node.started_container(member))
        return response

    async def stop_container(self, call: Call) -> bytes:
        request = cri.StopContainerRequest.FromString(call.request)
        member = self._node.member(request.container_id)
        if member is None or member.container is None:
            return await self._ended(call, member)
        if request.timeout <= 0 or self._dies_asleep(member):
            request.timeout = 0
            return await self._killed(call, [member], request.SerializeToString())
        # Awake first, so that the application gets its stop signal and can save its state in the grace period.
        async with member.container.stopping("StopContainer"):
            self._deliver_stop_signal(member)
            if member.record.state is State.EXITED:
                await self._noticed(member.record.id)
            return await self._ended(call, member)

    async def _noticed(self, container_id: str) -> None:
        """Waits until containerd, too, knows of a container's end: it fails a stop that meets the end of the shim."""
        with contextlib.suppress(CriError, TimeoutError):
            async with asyncio.timeout(EXIT_SECONDS):
                while (await self._runtime.container_status(container_id)).running:
                    await asyncio.sleep(0.02)

    def _dies_asleep(self, member: Member) -> bool:
        on_stop = self._node.sandboxes[member.record.sandbox_id].policy.on_stop
        return on_stop is policy.OnStop.KILL and member.record.state is State.SCALED_DOWN

    @staticmethod
    def _deliver_stop_signal(member: Member) -> None:
        """Where the init may not signal the application (another user, no CAP_KILL), we do it instead of it."""
        # containerd sends its signal to the init right away; the init can't, so nothing is delivered twice.
        with contextlib.suppress(ProcessLookupError):
            if member.workload is not None and (pid := member.workload.out_of_reach()) is not None:
                log.info("pid %d is out of the init's reach: %s from outside", pid, member.record.stop_signal)
                member.workload.signal(pid, member.record.stop_signal)

    async def remove_container(self, call: Call) -> bytes:
        request = cri.RemoveContainerRequest.FromString(call.request)
        member = self._node.member(request.container_id)
        response = await self._killed(call, [member] if member is not None else [])
        await self._debugging.pop(request.container_id, contextlib.AsyncExitStack()).aclose()  # it never started
        await self._shielded(self._node.removed_container(request.container_id))
        return response

    async def _killed(self, call: Call, members: Sequence[Member], request: bytes | None = None) -> bytes:
        """The answer of containerd to a call that kills containers, when what follows their exits has been done."""
        async with contextlib.AsyncExitStack() as stack:
            for member in members:
                if member.container is not None:
                    await stack.enter_async_context(member.container.ending(call.name))
            response = await call.forward(request)
            for member in members:
                await self._shielded(member.ended())
            return response

    def _members(self, sandbox_id: str) -> list[Member]:
        sandbox = self._node.sandboxes.get(sandbox_id)
        return list(sandbox.containers.values()) if sandbox is not None else []

    async def _ended(self, call: Call, member: Member | None) -> bytes:
        """The answer of containerd, when all that follows the container's exit has been done here too."""
        response = await call.forward()
        if member is not None:
            await self._shielded(member.ended())
        return response

    # --- into a container ----------------------------------------------------------------------------------

    async def exec_sync(self, call: Call) -> bytes:
        request = cri.ExecSyncRequest.FromString(call.request)
        member = self._node.member(request.container_id)
        if member is None or member.container is None:
            return await call.forward()
        # kubelet gives each probe a time limit, and its hooks (preStop) none.
        if request.timeout > 0 and member.probes is not None:
            if member.container.up():
                return await self._command_of_probe(call, member, request.cmd)
            if (known := member.probes.command(request.cmd)) is not None:
                return known
        async with member.container.awake(call.name):
            if request.timeout > 0:
                return await self._command_of_probe(call, member, request.cmd)
            return await call.forward()

    @staticmethod
    async def _command_of_probe(call: Call, member: Member, argv: Sequence[str]) -> bytes:
        """An exec probe is no activity, and neither are the connections and the processor time of its command."""
        container, gate, probes = member.container, member.gate, member.probes
        if container is None or gate is None or probes is None:
            return await call.forward()
        response = None
        with container.probed("an exec probe"), gate.command():
            try:
                response = await call.forward()
            finally:
                probes.command_done(argv, response)
        return response

    async def update_container_resources(self, call: Call) -> bytes:
        member = self._node.member(cri.UpdateContainerResourcesRequest.FromString(call.request).container_id)
        if member is None or member.workload is None:
            return await call.forward()
        async with member.workload.limits_change():
            return await call.forward()

    async def checkpoint_container(self, call: Call) -> bytes:
        request = cri.CheckpointContainerRequest.FromString(call.request)
        member = self._node.member(request.container_id)
        if member is None:
            return await call.forward()
        if member.container is None or not member.record.bundle:
            return await self._checkpoint_of_the_runtime(call, member)
        if request.timeout < 0:
            call.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"timeout: {request.timeout} s; 0 (none) or more would be right"
            )
        where = f"{member.record.namespace}/{member.record.pod}/{member.record.name}"
        try:
            async with asyncio.timeout(request.timeout or None):
                info = await self._runtime.container_status(member.record.id)
                mounts = await self._runtime.mounts(info)
                await forensic.archive(member.container, info, mounts, Path(request.location), self._config.state_dir)
        except forensic.LocationError as error:
            call.abort(grpc.StatusCode.INVALID_ARGUMENT, f"location: {error}")
        except Refused as error:
            log.warning("%s can't be checkpointed for kubelet: %s", where, error)
            call.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{where} can't be checkpointed: {error}")
        except TimeoutError:
            call.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"{where} was not checkpointed within {request.timeout} s; it goes on as before",
            )
        except (CriError, OSError) as error:
            log.error("the checkpoint of %s can't be written to %s: %s", where, request.location, error)
            call.abort(grpc.StatusCode.INTERNAL, f"the checkpoint of {where} can't be written: {error}")
        log.info("a checkpoint of %s is in %s", where, request.location)
        return cri.CheckpointContainerResponse().SerializeToString()

    async def _checkpoint_of_the_runtime(self, call: Call, member: Member) -> bytes:
        """Of a container without our init, or one that has ended. The runtime's own words, if it knows the call."""
        record = member.record
        why = record.reason or f"it is {record.state}"
        async with contextlib.AsyncExitStack() as stack:
            if member.container is not None:
                why = f"it can only be frozen, {record.untouched or 'as its pod asks for'}"
                await stack.enter_async_context(member.container.awake(call.name))
            try:
                return await call.forward()
            except UpstreamError as error:
                if error.code is grpc.StatusCode.UNIMPLEMENTED:
                    where = f"{record.namespace}/{record.pod}/{record.name}"
                    call.abort(
                        grpc.StatusCode.FAILED_PRECONDITION,
                        f"{where} can't be checkpointed by criproxy: {why}; and its runtime has no CheckpointContainer",
                    )
                raise

    async def stream(self, call: Call) -> bytes:
        """Exec and Attach: the answer is a URL that the client connects to."""
        # Both requests have the container's id in field 1.
        return await self._held(call, [self._node.member(cri.AttachRequest.FromString(call.request).container_id)])

    async def port_forward(self, call: Call) -> bytes:
        # All of them: which ports it is about is said in the stream.
        request = cri.PortForwardRequest.FromString(call.request)
        return await self._held(call, self._members(request.pod_sandbox_id))

    async def _held(self, call: Call, members: Sequence[Member | None]) -> bytes:
        containers = [m.container for m in members if m is not None and m.container is not None]
        async with contextlib.AsyncExitStack() as stack:
            for container in containers:
                await stack.enter_async_context(container.awake(call.name))
            response = await call.forward()
            if not containers:
                return response
            # All three answers have the URL in field 1.
            answer = cri.AttachResponse.FromString(response)
            answer.url = self._streaming.url(answer.url, stack.pop_all())
            return answer.SerializeToString()

    # --- inside --------------------------------------------------------------------------------------------

    async def _missing(
        self, container_id: str, command: str, request: cri.CreateContainerRequest, image: ImageConfig
    ) -> bool:
        """Whether runc would not find the container's command."""
        path = rewrite.path_env(request.config, image.env)
        cwd = request.config.working_dir or image.working_dir or "/"
        binds = executable.binds(request.config)
        try:
            mounts = await self._runtime.mounts(await self._runtime.container_status(container_id))
            answer = await asyncio.to_thread(_look_up, mounts, command, path, binds, cwd)
        except (CriError, executable.RootfsError) as error:
            log.info("whether %s has its command is not known: %s", container_id, error)
            return False
        return answer is executable.Answer.MISSING

    async def _shielded(self, work: Coroutine[Any, Any, None]) -> None:
        """Does `work` to its end even if kubelet's call is cancelled meanwhile: the runtime has acted already."""
        await asyncio.shield(self._task(work))

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _look_up(
    mounts: Sequence[executable.SnapshotMount], command: str, path: str, binds: list[executable.Bind], cwd: str
) -> executable.Answer:
    with executable.rootfs(mounts) as rootfs:
        return executable.find(command, path, binds, rootfs, cwd)
