"""What criproxy changes in CRI messages: functions from bytes to bytes.

A message that needs no change is returned as the very object that came in, so that what is forwarded is what kubelet
sent. In one that is changed, fields which api/cri.proto doesn't know stay as they were.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from google.protobuf.message import DecodeError, Message

from criproxy.api import cri_pb2
from criproxy.cri.containerd import Configuration
from criproxy.cri.seccomp import Profiles
from criproxy.policy import HANDLER, Init, Policy, Port, Tier

# Where the bundle is found in a container.
BUNDLE_PATH = "/.criproxy"
INIT_PATH = f"{BUNDLE_PATH}/init"
# What containerd's oci.WithDefaultPathEnv sets where neither image nor pod does.
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


# What a pod in the host's network has to say, for people; goes after the comma.
HOSTS_PORTS = "where a container can be woken only at ports that criproxy.io/ports-map gives"


class Unsupported(Exception):
    """The container must run untouched; `reason` says why, for `criproxy status`.

    `freezable`: it can be scaled down all the same, by the freezer.
    """

    def __init__(self, reason: str, *, freezable: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.freezable = freezable


# --- The handler `zeropod` --------------------------------------------------------------------------------------

_IMAGE_CALLS: dict[str, type[Message]] = {
    "PullImage": cri_pb2.PullImageRequest,
    "ImageStatus": cri_pb2.ImageStatusRequest,
    "RemoveImage": cri_pb2.RemoveImageRequest,
    "ListImages": cri_pb2.ListImagesRequest,
}


def sandbox(request: bytes) -> bytes:
    """RunPodSandbox of a pod that opted in: the handler `zeropod` becomes the default one."""
    message = cri_pb2.RunPodSandboxRequest.FromString(request)
    if message.runtime_handler != HANDLER:
        return request
    message.runtime_handler = ""
    return message.SerializeToString()


def image(method: str, request: bytes) -> bytes:
    """A request of ImageService: the handler `zeropod` becomes the default one.

    kubelet names the pod's handler in them from 1.29 on. `method` is the bare name, such as "PullImage"; requests of
    other methods carry no handler and are returned as they are.
    """
    kind = _IMAGE_CALLS.get(method)
    # Nearly all requests are done here. (PullImage has the pod's annotations, which may hold the word as well.)
    if kind is None or HANDLER.encode() not in request:
        return request
    message = kind()
    try:
        message.ParseFromString(request)
    except DecodeError:
        return request  # containerd says what is wrong with it
    if isinstance(message, cri_pb2.ListImagesRequest):
        return _without_handler(request, message, [message.filter.image])
    assert isinstance(message, (cri_pb2.PullImageRequest, cri_pb2.ImageStatusRequest, cri_pb2.RemoveImageRequest))
    return _without_handler(request, message, [message.image])


def _without_handler(request: bytes, message: Message, images: Iterable[cri_pb2.ImageSpec]) -> bytes:
    changed = False
    for spec in images:
        if spec.runtime_handler == HANDLER:
            spec.runtime_handler = ""
            changed = True
    return message.SerializeToString() if changed else request


def container_handler(request: bytes) -> bytes:
    """CreateContainer, also of a container that isn't covered: the handler `zeropod` in its image and in its image
    volumes becomes the default one."""
    if HANDLER.encode() not in request:
        return request
    message = cri_pb2.CreateContainerRequest.FromString(request)
    images = [message.config.image, *(mount.image for mount in message.config.mounts)]
    return _without_handler(request, message, images)


def status(response: bytes) -> bytes:
    """The answer to Status: kubelet looks a pod's handler up in `runtime_handlers` (1.30 and later), so `zeropod` gets
    an entry with the default handler's features.

    A runtime that lists no handlers (containerd 1.x) or has a `zeropod` of its own is left alone.
    """
    message = cri_pb2.StatusResponse.FromString(response)
    handlers = {handler.name: handler for handler in message.runtime_handlers}
    if not handlers or HANDLER in handlers:
        return response
    entry = message.runtime_handlers.add()
    if "" in handlers:
        entry.CopyFrom(handlers[""])
    entry.name = HANDLER
    return message.SerializeToString()


# --- Containers -------------------------------------------------------------------------------------------------


def argv(config: cri_pb2.ContainerConfig, entrypoint: Sequence[str], cmd: Sequence[str]) -> list[str]:
    """What the container would run: CRI's rules, as in containerd's `WithProcessArgs` (the same from 1.6 to 2.x).

    `command` replaces the image's ENTRYPOINT and drops its CMD; `args` alone replace its CMD. Empty if nothing is left.
    """
    if config.command:
        return [*config.command, *config.args]
    # An ENTRYPOINT of one empty string is how some builders write "none".
    before = [] if list(entrypoint) == [""] else list(entrypoint)
    return before + (list(config.args) or list(cmd))


def path_env(config: cri_pb2.ContainerConfig, image_env: Iterable[str]) -> str:
    """The PATH that the container's command is looked up in: the pod's, else the image's, else containerd's default."""
    result = DEFAULT_PATH
    for line in image_env:
        name, _, value = line.partition("=")
        if name == "PATH":
            result = value
    for pair in config.envs:
        if pair.key == "PATH":
            result = pair.value.decode(errors="surrogateescape")
    return result


def container(
    request: bytes,
    *,
    policy: Policy,
    entrypoint: Sequence[str],
    cmd: Sequence[str],
    bundle: Path,
    profiles: Profiles,
    runtime: Configuration | None,
    handler: str = "",
) -> bytes:
    """CreateContainer of a container that the policy covers: PID 1 becomes our init, which starts the real command.

    `entrypoint` and `cmd` are the image's; `bundle` is a path on the host; `runtime` is containerd's configuration, if
    known, and `handler` the pod's as containerd was given it.

    Raises `Unsupported` if the container must run as it is. Only when it doesn't may a file be written, by `profiles`.
    """
    message = cri_pb2.CreateContainerRequest.FromString(request)
    config = message.config
    command = argv(config, entrypoint, cmd)
    _check_pod(config, policy, runtime, handler)
    _check_policy(policy, command)
    _check_processes(config)
    _check_mounts(config)
    _check_confinement(config.linux.security_context, policy, profiles)

    _refuse_io_uring(config.linux.security_context, profiles, runtime, handler)
    for spec in (config.image, *(mount.image for mount in config.mounts)):
        if spec.runtime_handler == HANDLER:
            spec.runtime_handler = ""
    config.mounts.add(container_path=BUNDLE_PATH, host_path=str(bundle), readonly=True)
    config.command[:] = [INIT_PATH]
    config.args[:] = ["--", *command]
    return message.SerializeToString()


def _check_policy(policy: Policy, command: Sequence[str]) -> None:
    if not command or not command[0]:
        raise Unsupported("neither the pod nor the image names a command")
    if policy.tier is Tier.FREEZE:
        raise Unsupported("", freezable=True)  # as asked for
    if policy.init is Init.NEVER:
        raise Unsupported("criproxy.io/init: never keeps criproxy's init out", freezable=True)
    insisting = pid_1_only(command)
    if insisting and policy.init is Init.AUTO:
        raise Unsupported(
            f"{insisting} must be PID 1 itself (criproxy.io/init: always if it needn't be)", freezable=True
        )


# s6-overlay's /init, sysvinit, systemd, busybox and openrc: each refuses to work, or works as something else, when it
# isn't PID 1.
_INIT_PATHS = frozenset({"init", "linuxrc", *(f"{folder}/init" for folder in ("", "/bin", "/sbin", "/usr/bin")),
                         "/usr/sbin/init", "/etc/init", "/linuxrc"})  # fmt: skip
_INIT_NAMES = frozenset({"systemd", "runit", "runit-init", "openrc-init", "s6-linux-init"})
# Inits that don't mind, and whose child isn't PID 1 without us either.
_SMALL_INITS = frozenset({"tini", "tini-static", "dumb-init", "catatonit", "docker-init"})


def pid_1_only(command: Sequence[str]) -> str | None:
    """The word of a command that is known to insist on being PID 1, or None.

    Every word is looked at: an entrypoint script ends in `exec "$@"` more often than not.
    """
    if _base_name(command[0]) in _SMALL_INITS:
        return None
    if _base_name(command[0]) == "busybox" and list(command[1:2]) == ["init"]:
        return "busybox init"
    for position, word in enumerate(command):
        absolute = word.startswith("/")
        if word in _INIT_PATHS and (absolute or position == 0):
            return word
        if _base_name(word) in _INIT_NAMES and (absolute or position == 0):
            return word
    return None


def _base_name(path: str) -> str:
    return path.rpartition("/")[2]


def _check_pod(config: cri_pb2.ContainerConfig, policy: Policy, runtime: Configuration | None, handler: str) -> None:
    namespaces = config.linux.security_context.namespace_options
    # What can't be frozen either comes first.
    if namespaces.network == cri_pb2.NODE:
        _check_hosts_ports(policy.ports.get(config.metadata.name, frozenset()))
    if namespaces.pid == cri_pb2.NODE:
        raise Unsupported("it uses the host's PID namespace (hostPID)")
    if namespaces.pid == cri_pb2.TARGET:
        raise Unsupported("it uses another container's PID namespace, as ephemeral containers do")
    if runtime is not None:
        found = runtime.runtime(handler)
        if found is not None and not found.is_runc:
            raise Unsupported(f"its runtime {found.type} isn't runc, and keeps processes out of the host's sight")


def _check_hosts_ports(ports: frozenset[Port]) -> None:
    hosts = "it uses the host's network (hostNetwork), "
    if not ports:
        raise Unsupported(f"{hosts}{HOSTS_PORTS}, and that gives it none")
    if udp := [str(port) for port in sorted(ports) if port.proto == "udp"]:
        raise Unsupported(
            f"{hosts}where no datagram can wake it: criproxy.io/ports-map gives it {', '.join(udp)}, TCP alone is right"
        )


def _check_processes(config: cri_pb2.ContainerConfig) -> None:
    namespaces = config.linux.security_context.namespace_options
    if config.tty:
        raise Unsupported("it has a terminal (tty), which can't be checkpointed", freezable=True)
    # POD is what a request without namespace options means, too; crictl sends such.
    if namespaces.pid != cri_pb2.CONTAINER:
        raise Unsupported("its PID namespace is shared by the whole pod (shareProcessNamespace)", freezable=True)
    if namespaces.HasField("userns_options") and namespaces.userns_options.mode == cri_pb2.POD:
        raise Unsupported("it has a user namespace (hostUsers: false)", freezable=True)


def _check_mounts(config: cri_pb2.ContainerConfig) -> None:
    ours = PurePosixPath(BUNDLE_PATH)
    for mount in config.mounts:
        theirs = PurePosixPath(posixpath.normpath("/" + mount.container_path.lstrip("/")))
        # Below: it would hide ours. Above: our mount point would be made in the pod's volume.
        if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
            raise Unsupported(f"its volume at {mount.container_path} is where {ours} has to be", freezable=True)


# --- Confinement ------------------------------------------------------------------------------------------------

# The forms of the deprecated seccomp_profile_path and apparmor_profile (containerd's `generateSecurityProfile`).
_LOCALHOST = "localhost/"
_UNCONFINED = "unconfined"

# What native/init.c can't do without.
INIT_CALLS = ("clone", "wait4", "waitid", "rt_sigtimedwait", "rt_sigprocmask", "rt_sigaction", "kill", "setsid",
                "prctl", "pipe2", "read", "write", "close", "execve", "exit_group")  # fmt: skip


def _check_confinement(context: cri_pb2.LinuxContainerSecurityContext, policy: Policy, profiles: Profiles) -> None:
    """A profile that was made for the application alone may be too narrow for an init that starts it."""
    if context.privileged:  # containerd gives it none, whatever it asks for
        return
    path = _seccomp_file(context)
    if path is not None and (call := profiles.forbidden(path, INIT_CALLS)) is not None:
        raise Unsupported(f"its seccomp profile refuses {call}, which criproxy's init needs", freezable=True)
    profile = _apparmor_profile(context)
    if profile and policy.init is Init.AUTO:
        # What it allows is in the kernel, compiled.
        raise Unsupported(
            f"its AppArmor profile {profile} may not let criproxy's init run (criproxy.io/init: always if it does)",
            freezable=True,
        )


def _seccomp_file(context: cri_pb2.LinuxContainerSecurityContext) -> Path | None:
    if context.HasField("seccomp"):  # then containerd doesn't look at the path
        if context.seccomp.profile_type != cri_pb2.SecurityProfile.Localhost:
            return None
        # containerd trims the prefix here as well, "just in case".
        return Path(context.seccomp.localhost_ref.removeprefix(_LOCALHOST))
    if context.seccomp_profile_path.startswith(_LOCALHOST):
        return Path(context.seccomp_profile_path.removeprefix(_LOCALHOST))
    return None


def _apparmor_profile(context: cri_pb2.LinuxContainerSecurityContext) -> str:
    """The name of one that isn't the runtime's own; empty if there is none."""
    if context.HasField("apparmor"):
        if context.apparmor.profile_type != cri_pb2.SecurityProfile.Localhost:
            return ""
        return context.apparmor.localhost_ref.removeprefix(_LOCALHOST)
    if context.apparmor_profile.startswith(_LOCALHOST):
        return context.apparmor_profile.removeprefix(_LOCALHOST)
    return ""


def _refuse_io_uring(
    context: cri_pb2.LinuxContainerSecurityContext, profiles: Profiles, runtime: Configuration | None, handler: str
) -> None:
    """Puts a profile that refuses io_uring in the place of none and of a file's; RuntimeDefault can't be extended."""
    if context.privileged:
        return
    if (file := _seccomp_file(context)) is not None:
        if (merged := profiles.merged(file)) is not None:
            if context.HasField("seccomp"):
                context.seccomp.localhost_ref = str(merged)
            else:
                context.seccomp_profile_path = f"{_LOCALHOST}{merged}"
        return
    if context.HasField("seccomp"):
        unset, none = False, context.seccomp.profile_type == cri_pb2.SecurityProfile.Unconfined
    else:
        unset = context.seccomp_profile_path == ""
        none = unset or context.seccomp_profile_path == _UNCONFINED
    if none and (replacement := _allow_all(profiles, runtime, handler, unset=unset)) is not None:
        # In the newer field, which containerd 1.6 and later prefer; there, it is just a path.
        context.seccomp.profile_type = cri_pb2.SecurityProfile.Localhost
        context.seccomp.localhost_ref = str(replacement)


def _allow_all(profiles: Profiles, runtime: Configuration | None, handler: str, *, unset: bool) -> Path | None:
    """A profile for a container that has none; None where the operator may have given it one behind the request's
    back, in the place of which "allow all" would be a hole."""
    found = None if runtime is None else runtime.runtime(handler)
    if runtime is None or found is None or found.has_base_spec:
        return None
    if unset and runtime.unset_seccomp_profile not in ("", _UNCONFINED):
        return None
    return profiles.allow_all()
