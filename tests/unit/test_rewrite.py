"""What criproxy changes in CRI messages, and what it leaves alone."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from criproxy.api import cri_pb2 as cri
from criproxy.cri import rewrite, seccomp
from criproxy.cri.containerd import Configuration, Runtime
from criproxy.cri.rewrite import Unsupported
from criproxy.policy import Init, Policy, Port, Tier

Request = cri.CreateContainerRequest
# Field 2000 with the text "kept": what a later version of CRI might send.
UNKNOWN = b"\x82\x7d\x04kept"
CONTAINERD = Configuration("", "runc", {"runc": Runtime("io.containerd.runc.v2", has_base_spec=False)})
BUNDLE = Path("/var/lib/criproxy/bundles/abc")


def request(change: Callable[[cri.ContainerConfig], None] = lambda config: None) -> bytes:
    """CreateContainer as kubelet sends it, but for what `change` does to its configuration."""
    message = Request(pod_sandbox_id="sandbox")
    config = message.config
    config.metadata.name = "web"
    config.image.image = "sha256:1234"
    context = config.linux.security_context
    context.namespace_options.pid = cri.CONTAINER
    context.seccomp.profile_type = cri.SecurityProfile.RuntimeDefault
    config.mounts.add(container_path="/var/run/secrets/kubernetes.io/serviceaccount", host_path="/k", readonly=True)
    config.mounts.add(container_path="/etc/hosts", host_path="/h")
    change(config)
    return message.SerializeToString()


@pytest.fixture
def profiles(tmp_path: Path) -> seccomp.Profiles:
    return seccomp.Profiles(tmp_path / "seccomp", "x86_64")


@pytest.fixture
def rewritten(profiles: seccomp.Profiles) -> Callable[..., Request]:
    def call(
        data: bytes,
        entrypoint: Sequence[str] = ("/entrypoint",),
        cmd: Sequence[str] = ("serve",),
        policy: Policy = Policy(),  # noqa: B008 (it is frozen)
        runtime: Configuration | None = CONTAINERD,
        handler: str = "",
    ) -> Request:
        return Request.FromString(
            rewrite.container(
                data,
                policy=policy,
                entrypoint=entrypoint,
                cmd=cmd,
                bundle=BUNDLE,
                profiles=profiles,
                runtime=runtime,
                handler=handler,
            )
        )

    return call


class TestSandbox:
    def test_the_handler_zeropod_becomes_the_default_one(self) -> None:
        message = cri.RunPodSandboxRequest(runtime_handler="zeropod")
        message.config.hostname = "h"
        result = cri.RunPodSandboxRequest.FromString(rewrite.sandbox(message.SerializeToString() + UNKNOWN))
        assert result.runtime_handler == ""
        assert result.config.hostname == "h"
        assert result.SerializeToString().endswith(UNKNOWN)

    @pytest.mark.parametrize("handler", ["", "runc", "kata"])
    def test_another_one_stays_and_so_do_the_bytes(self, handler: str) -> None:
        data = cri.RunPodSandboxRequest(runtime_handler=handler).SerializeToString() + UNKNOWN
        assert rewrite.sandbox(data) is data


class TestImages:
    @pytest.mark.parametrize(
        ("method", "message"),
        [
            ("PullImage", cri.PullImageRequest(image=cri.ImageSpec(image="i", runtime_handler="zeropod"))),
            ("ImageStatus", cri.ImageStatusRequest(image=cri.ImageSpec(image="i", runtime_handler="zeropod"))),
            ("RemoveImage", cri.RemoveImageRequest(image=cri.ImageSpec(image="i", runtime_handler="zeropod"))),
        ],
    )
    def test_the_handler_zeropod_becomes_the_default_one(self, method: str, message: Any) -> None:
        result = type(message).FromString(rewrite.image(method, message.SerializeToString() + UNKNOWN))
        assert result.image == cri.ImageSpec(image="i")
        assert result.SerializeToString().endswith(UNKNOWN)

    def test_in_the_filter_of_a_list_too(self) -> None:
        message = cri.ListImagesRequest()
        message.filter.image.runtime_handler = "zeropod"
        result = cri.ListImagesRequest.FromString(rewrite.image("ListImages", message.SerializeToString()))
        assert result.filter.image.runtime_handler == ""

    @pytest.mark.parametrize("handler", ["", "runc", "zeropods"])
    def test_another_one_stays_and_so_do_the_bytes(self, handler: str) -> None:
        message = cri.PullImageRequest(image=cri.ImageSpec(image="zeropod", runtime_handler=handler))
        data = message.SerializeToString()
        assert rewrite.image("PullImage", data) is data

    def test_other_methods_and_what_isnt_a_message(self) -> None:
        for method, data in (("ImageFsInfo", b"zeropod"), ("PullImage", b"zeropod\xff"), ("ListImages", b"")):
            assert rewrite.image(method, data) is data

    def test_in_a_container_that_isnt_covered(self) -> None:
        def change(config: cri.ContainerConfig) -> None:
            config.image.runtime_handler = "zeropod"
            config.mounts.add(container_path="/i").image.runtime_handler = "zeropod"

        result = Request.FromString(rewrite.container_handler(request(change)))
        assert result.config.image.runtime_handler == ""
        assert result.config.mounts[-1].image.runtime_handler == ""
        for data in (request(), request(lambda config: config.envs.extend([cri.KeyValue(key="zeropod")]))):
            assert rewrite.container_handler(data) is data


class TestStatus:
    def test_zeropod_gets_the_default_handlers_features(self) -> None:
        message = cri.StatusResponse()
        for name in ("", "kata", "runc"):
            message.runtime_handlers.add(name=name).features.recursive_read_only_mounts = name != "kata"
        result = cri.StatusResponse.FromString(rewrite.status(message.SerializeToString() + UNKNOWN))
        assert [handler.name for handler in result.runtime_handlers] == ["", "kata", "runc", "zeropod"]
        assert result.runtime_handlers[3].features == result.runtime_handlers[0].features
        assert result.SerializeToString().endswith(UNKNOWN)

    def test_features_that_cri_knows_later_are_copied(self) -> None:
        message = cri.StatusResponse()
        message.runtime_handlers.add().features.MergeFromString(UNKNOWN)
        result = cri.StatusResponse.FromString(rewrite.status(message.SerializeToString()))
        assert result.runtime_handlers[1].features.SerializeToString() == UNKNOWN

    @pytest.mark.parametrize("names", [[], ["", "runc", "zeropod"]])
    def test_without_handlers_or_with_a_zeropod_the_bytes_stay(self, names: list[str]) -> None:
        message = cri.StatusResponse()
        for name in names:
            message.runtime_handlers.add(name=name)
        data = message.SerializeToString()
        assert rewrite.status(data) is data


class TestCommand:
    @pytest.mark.parametrize(
        ("command", "args", "entrypoint", "cmd", "expected"),
        [
            # The table of Kubernetes' documentation.
            ([], [], ["/ep-1"], ["foo", "bar"], ["/ep-1", "foo", "bar"]),
            (["/ep-2"], [], ["/ep-1"], ["foo", "bar"], ["/ep-2"]),
            ([], ["zoo", "boo"], ["/ep-1"], ["foo", "bar"], ["/ep-1", "zoo", "boo"]),
            (["/ep-2"], ["zoo", "boo"], ["/ep-1"], ["foo", "bar"], ["/ep-2", "zoo", "boo"]),
            ([], [], [], ["foo"], ["foo"]),
            ([], [], ["/ep-1"], [], ["/ep-1"]),
            ([], [], [""], ["foo"], ["foo"]),
            ([], [], [], [], []),
        ],
    )
    def test_cris_rules(
        self, command: list[str], args: list[str], entrypoint: list[str], cmd: list[str], expected: list[str]
    ) -> None:
        config = cri.ContainerConfig(command=command, args=args)
        assert rewrite.argv(config, entrypoint, cmd) == expected

    def test_path(self) -> None:
        config = cri.ContainerConfig()
        assert rewrite.path_env(config, []) == "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        assert rewrite.path_env(config, ["A=b", "PATH=/image"]) == "/image"
        config.envs.add(key="PATH", value=b"/pod")
        assert rewrite.path_env(config, ["PATH=/image"]) == "/pod"


class TestContainer:
    def test_pid_1_becomes_our_init(self, rewritten: Callable[..., Request]) -> None:
        result = rewritten(request()).config
        assert list(result.command) == ["/.criproxy/init"]
        assert list(result.args) == ["--", "/entrypoint", "serve"]

    def test_the_bundle_is_mounted_last_and_read_only_and_nothing_else(self, rewritten: Callable[..., Request]) -> None:
        data = request()
        assert list(rewritten(data).config.mounts) == [
            *Request.FromString(data).config.mounts,
            cri.Mount(container_path="/.criproxy", host_path=str(BUNDLE), readonly=True),
        ]

    def test_everything_else_stays(self, rewritten: Callable[..., Request]) -> None:
        def change(config: cri.ContainerConfig) -> None:
            config.envs.add(key="A", value=b"\xff")
            config.working_dir = "/w"
            config.stdin = config.stdin_once = True
            config.stop_signal = 3
            context = config.linux.security_context
            context.run_as_user.value = 1000
            context.readonly_rootfs = True
            context.capabilities.add_capabilities.append("NET_ADMIN")
            context.MergeFromString(UNKNOWN)
            config.MergeFromString(UNKNOWN)

        data = request(change) + UNKNOWN
        result, original = rewritten(data), Request.FromString(data)
        del result.config.mounts[2:]
        result.config.ClearField("command")
        result.config.ClearField("args")
        assert result.SerializeToString(deterministic=True) == original.SerializeToString(deterministic=True)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda c: c.ClearField("linux"), "shared by the whole pod"),
            (lambda c: c.linux.security_context.ClearField("namespace_options"), "shared by the whole pod"),
            (lambda c: setattr(namespaces(c), "pid", cri.POD), "shareProcessNamespace"),
            (lambda c: setattr(namespaces(c), "pid", cri.NODE), "hostPID"),
            (lambda c: setattr(namespaces(c), "pid", cri.TARGET), "ephemeral containers"),
            (lambda c: setattr(namespaces(c), "network", cri.NODE), "hostNetwork"),
            # POD is 0, the value that isn't sent: only the message around it is.
            (lambda c: namespaces(c).userns_options.SetInParent(), "hostUsers"),
            (lambda c: setattr(c, "tty", True), "terminal"),
            (lambda c: mount(c, "/.criproxy"), "/.criproxy is where /.criproxy has to be"),
            (lambda c: mount(c, "/.criproxy/x"), "its volume at /.criproxy/x"),
            (lambda c: mount(c, "/.criproxy/"), "its volume at /.criproxy/"),
            (lambda c: mount(c, "//.criproxy/x/.."), "its volume at //.criproxy/x/.."),
            (lambda c: mount(c, "/"), "its volume at /"),
            (lambda c: c.command.extend([""]), "names a command"),
            (lambda c: c.command.extend(["/sbin/init"]), "/sbin/init must be PID 1"),
        ],
    )
    def test_what_cant_be_supported(
        self, change: Callable[[cri.ContainerConfig], None], reason: str, rewritten: Callable[..., Request]
    ) -> None:
        with pytest.raises(Unsupported) as caught:
            rewritten(request(change))
        assert reason in caught.value.reason

    @pytest.mark.parametrize(
        ("change", "freezable"),
        [
            (lambda c: c.command.extend(["/sbin/init"]), True),
            (lambda c: setattr(c, "tty", True), True),
            (lambda c: setattr(namespaces(c), "pid", cri.POD), True),
            (lambda c: namespaces(c).userns_options.SetInParent(), True),
            (lambda c: mount(c, "/.criproxy"), True),
            (lambda c: setattr(c.linux.security_context, "apparmor_profile", "localhost/narrow"), True),
            (lambda c: setattr(namespaces(c), "pid", cri.NODE), False),
            (lambda c: setattr(namespaces(c), "pid", cri.TARGET), False),
            (lambda c: setattr(namespaces(c), "network", cri.NODE), False),
            (lambda c: c.command.extend([""]), False),
        ],
    )
    def test_what_can_be_frozen_all_the_same(
        self, change: Callable[[cri.ContainerConfig], None], freezable: bool, rewritten: Callable[..., Request]
    ) -> None:
        with pytest.raises(Unsupported) as caught:
            rewritten(request(change))
        assert caught.value.freezable is freezable

    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            ({}, "it uses the host's network (hostNetwork), where a container can be woken only at ports that "
                 "criproxy.io/ports-map gives, and that gives it none"),
            ({"other": {Port("tcp", 80)}}, "gives it none"),
            ({"app": {Port("tcp", 80), Port("udp", 53)}}, "criproxy.io/ports-map gives it 53/udp,"),
            ({"app": {Port("tcp", 80)}}, None),
        ],
    )  # fmt: skip
    def test_the_hosts_network_takes_tcp_ports_that_are_given(
        self, given: dict[str, set[Port]], reason: str | None, rewritten: Callable[..., Request]
    ) -> None:
        def change(config: cri.ContainerConfig) -> None:
            config.metadata.name = "app"
            namespaces(config).network = cri.NODE

        policy = Policy(ports={name: frozenset(ports) for name, ports in given.items()})
        if reason is None:
            assert rewritten(request(change), policy=policy)
            return
        with pytest.raises(Unsupported) as caught:
            rewritten(request(change), policy=policy)
        assert reason in caught.value.reason
        assert not caught.value.freezable

    def test_what_cant_be_frozen_is_told_first(self, rewritten: Callable[..., Request]) -> None:
        with pytest.raises(Unsupported, match="hostNetwork") as caught:
            rewritten(request(lambda c: setattr(namespaces(c), "network", cri.NODE)), policy=Policy(tier=Tier.FREEZE))
        assert not caught.value.freezable

    @pytest.mark.parametrize("path", ["/run", "/var/run", "/run/criu.kdat", "/.criproxy2", "/data"])
    def test_volumes_elsewhere_are_fine(self, path: str, rewritten: Callable[..., Request]) -> None:
        assert rewritten(request(lambda config: mount(config, path)))

    def test_a_user_namespace_of_the_node_is_none(self, rewritten: Callable[..., Request]) -> None:
        assert rewritten(request(lambda c: setattr(namespaces(c).userns_options, "mode", cri.NODE)))

    def test_no_command_at_all(self, rewritten: Callable[..., Request]) -> None:
        with pytest.raises(Unsupported, match="names a command"):
            rewritten(request(), entrypoint=[], cmd=[])

    def test_a_runtime_that_isnt_runc(self, rewritten: Callable[..., Request]) -> None:
        runtime = Configuration("", "runc", {"kata": Runtime("io.containerd.kata.v2", has_base_spec=False)})
        with pytest.raises(Unsupported, match=r"io\.containerd\.kata\.v2 isn't runc"):
            rewritten(request(), runtime=runtime, handler="kata")

    def test_policies_that_leave_it_untouched(self, rewritten: Callable[..., Request]) -> None:
        with pytest.raises(Unsupported) as caught:
            rewritten(request(), policy=Policy(tier=Tier.FREEZE))
        assert (caught.value.reason, caught.value.freezable) == ("", True)
        with pytest.raises(Unsupported, match=r"criproxy\.io/init: never"):
            rewritten(request(), policy=Policy(init=Init.NEVER))
        assert rewritten(request(), policy=Policy(tier=Tier.RESTART))
        assert rewritten(request(), policy=Policy(init=Init.ALWAYS), entrypoint=["/init"])

    @pytest.mark.parametrize("field", ["older", "newer"])
    def test_an_apparmor_profile_of_the_pods_own(self, field: str, rewritten: Callable[..., Request]) -> None:
        """Whether it lets our init be executed can't be read: compiled, it is in the kernel."""

        def profile(kind: Any, name: str) -> Callable[[cri.ContainerConfig], None]:
            def change(config: cri.ContainerConfig) -> None:
                if field == "older":
                    config.linux.security_context.apparmor_profile = name
                else:
                    config.linux.security_context.apparmor.profile_type = kind
                    config.linux.security_context.apparmor.localhost_ref = name.removeprefix("localhost/")

            return change

        theirs = request(profile(cri.SecurityProfile.Localhost, "localhost/narrow"))
        with pytest.raises(Unsupported, match="AppArmor profile narrow") as caught:
            rewritten(theirs)
        assert caught.value.freezable
        assert rewritten(theirs, policy=Policy(init=Init.ALWAYS))
        for kind, name in (("RuntimeDefault", "runtime/default"), ("Unconfined", "unconfined")):
            assert rewritten(request(profile(getattr(cri.SecurityProfile, kind), name)))

    def test_a_seccomp_profile_that_is_too_narrow(self, tmp_path: Path, rewritten: Callable[..., Request]) -> None:
        profile = tmp_path / "narrow.json"
        profile.write_text(
            json.dumps(
                {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["wait4"], "action": "SCMP_ACT_KILL"}]}
            )
        )

        def newer(config: cri.ContainerConfig) -> None:
            config.linux.security_context.seccomp.profile_type = cri.SecurityProfile.Localhost
            config.linux.security_context.seccomp.localhost_ref = str(profile)

        def older(config: cri.ContainerConfig) -> None:
            config.linux.security_context.ClearField("seccomp")
            config.linux.security_context.seccomp_profile_path = f"localhost/{profile}"

        for change in (newer, older):
            with pytest.raises(Unsupported, match="refuses wait4, which criproxy's init needs") as caught:
                rewritten(request(change), policy=Policy(init=Init.ALWAYS))
            assert caught.value.freezable

    def test_the_handler_zeropod_goes_from_its_images(self, rewritten: Callable[..., Request]) -> None:
        assert rewritten(request(lambda c: setattr(c.image, "runtime_handler", "zeropod"))).config.image == (
            cri.ImageSpec(image="sha256:1234")
        )


def namespaces(config: cri.ContainerConfig) -> cri.NamespaceOption:
    return config.linux.security_context.namespace_options


def mount(config: cri.ContainerConfig, path: str) -> None:
    config.mounts.add(container_path=path, host_path="/volume")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["/init"], "/init"),
        (["init"], "init"),
        (["/sbin/init"], "/sbin/init"),
        (["/lib/systemd/systemd", "--unit=x"], "/lib/systemd/systemd"),
        (["systemd"], "systemd"),
        (["busybox", "init"], "busybox init"),
        (["/docker-entrypoint.sh", "/sbin/init"], "/sbin/init"),
        (["/bin/sh", "/entry.sh", "/usr/lib/systemd/systemd"], "/usr/lib/systemd/systemd"),
        (["tini", "--", "/init"], None),
        (["/usr/bin/dumb-init", "nginx"], None),
        (["/app/init"], None),
        (["myapp", "init"], None),
        (["git", "systemd"], None),
        (["busybox", "httpd"], None),
        (["redis-server"], None),
    ],
)
def test_who_insists_on_being_pid_1(command: list[str], expected: str | None) -> None:
    assert rewrite.pid_1_only(command) == expected


class TestSeccomp:
    """By the request's profile: which one takes its place."""

    @pytest.fixture
    def localhost(self, tmp_path: Path) -> Path:
        path = tmp_path / "profile.json"
        path.write_text(
            json.dumps(
                {
                    "defaultAction": "SCMP_ACT_ERRNO",
                    "defaultErrnoRet": 1,
                    "architectures": ["SCMP_ARCH_X86_64"],
                    "syscalls": [
                        {"names": [*rewrite.INIT_CALLS, "io_uring_setup"], "action": "SCMP_ACT_ALLOW"},
                        {"names": ["io_uring_setup"], "action": "SCMP_ACT_LOG"},
                    ],
                }
            )
        )
        return path

    def profile(self, result: Request) -> dict[str, Any]:
        found = result.config.linux.security_context.seccomp
        assert found.profile_type == cri.SecurityProfile.Localhost
        content: dict[str, Any] = json.loads(Path(found.localhost_ref).read_text())
        return content

    @pytest.mark.parametrize("how", ["unset", "message", "path"])
    def test_none_becomes_all_but_io_uring(self, how: str, rewritten: Callable[..., Request]) -> None:
        def change(config: cri.ContainerConfig) -> None:
            context = config.linux.security_context
            context.ClearField("seccomp")
            if how == "message":
                context.seccomp.profile_type = cri.SecurityProfile.Unconfined
            elif how == "path":
                context.seccomp_profile_path = "unconfined"

        assert self.profile(rewritten(request(change))) == {
            "defaultAction": "SCMP_ACT_ALLOW",
            # Without the last two the kernel would kill 32-bit programs.
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [{"names": ["io_uring_setup"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}],
        }

    @pytest.mark.parametrize("prefix", ["", "localhost/"])
    def test_a_file_becomes_a_copy_with_our_rule_alone(
        self, prefix: str, localhost: Path, rewritten: Callable[..., Request]
    ) -> None:
        def change(config: cri.ContainerConfig) -> None:
            config.linux.security_context.seccomp.profile_type = cri.SecurityProfile.Localhost
            config.linux.security_context.seccomp.localhost_ref = f"{prefix}{localhost}"

        result = self.profile(rewritten(request(change)))
        assert result == json.loads(localhost.read_text()) | {
            "syscalls": [
                {"names": list(rewrite.INIT_CALLS), "action": "SCMP_ACT_ALLOW"},
                {"names": ["io_uring_setup"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
            ]
        }

    def test_a_file_named_in_the_older_field(self, localhost: Path, rewritten: Callable[..., Request]) -> None:
        def change(config: cri.ContainerConfig) -> None:
            config.linux.security_context.ClearField("seccomp")
            config.linux.security_context.seccomp_profile_path = f"localhost/{localhost}"

        context = rewritten(request(change)).config.linux.security_context
        assert not context.HasField("seccomp")
        assert context.seccomp_profile_path.startswith(f"localhost/{localhost.parent}/seccomp/")

    @pytest.mark.parametrize("path", ["runtime/default", "docker/default", "nonsense"])
    def test_the_runtimes_own_stays(self, path: str, rewritten: Callable[..., Request]) -> None:
        def change(config: cri.ContainerConfig) -> None:
            config.linux.security_context.ClearField("seccomp")
            config.linux.security_context.seccomp_profile_path = path

        context = rewritten(request(change)).config.linux.security_context
        assert not context.HasField("seccomp")
        assert context.seccomp_profile_path == path
        assert rewritten(request()).config.linux.security_context.seccomp == cri.SecurityProfile()

    def test_a_privileged_container_has_none_and_gets_none(self, rewritten: Callable[..., Request]) -> None:
        def change(config: cri.ContainerConfig) -> None:
            config.linux.security_context.ClearField("seccomp")
            config.linux.security_context.privileged = True

        assert not rewritten(request(change)).config.linux.security_context.HasField("seccomp")

    @pytest.mark.parametrize(
        ("runtime", "unset", "unconfined"),
        [
            (CONTAINERD, True, True),
            (None, False, False),
            (Configuration("runtime/default", "runc", CONTAINERD.runtimes), False, True),
            (Configuration("unconfined", "runc", CONTAINERD.runtimes), True, True),
            (Configuration("", "runc", {"runc": Runtime("io.containerd.runc.v2", has_base_spec=True)}), False, False),
        ],
    )
    def test_what_the_operator_gives_behind_the_requests_back_isnt_undone(
        self, runtime: Configuration | None, unset: bool, unconfined: bool, rewritten: Callable[..., Request]
    ) -> None:
        result = rewritten(request(lambda c: c.linux.security_context.ClearField("seccomp")), runtime=runtime)
        assert result.config.linux.security_context.HasField("seccomp") is unset
        explicit = request(lambda c: setattr(c.linux.security_context.seccomp, "profile_type", 1))
        profile = rewritten(explicit, runtime=runtime).config.linux.security_context.seccomp
        assert (profile.profile_type == cri.SecurityProfile.Localhost) is unconfined

    def test_a_file_that_cant_be_read_is_containerds_to_complain_about(
        self, tmp_path: Path, rewritten: Callable[..., Request]
    ) -> None:
        def change(config: cri.ContainerConfig) -> None:
            config.linux.security_context.seccomp.profile_type = cri.SecurityProfile.Localhost
            config.linux.security_context.seccomp.localhost_ref = str(tmp_path / "none.json")

        profile = rewritten(request(change)).config.linux.security_context.seccomp
        assert profile.localhost_ref == str(tmp_path / "none.json")

    def test_nothing_is_written_for_a_container_that_stays_as_it_is(
        self, tmp_path: Path, rewritten: Callable[..., Request]
    ) -> None:
        def change(config: cri.ContainerConfig) -> None:
            config.linux.security_context.ClearField("seccomp")
            config.tty = True

        with pytest.raises(Unsupported):
            rewritten(request(change))
        assert not (tmp_path / "seccomp").exists()

    @pytest.mark.parametrize(
        "profile",
        [
            # Refused already, in one way or another.
            {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]},
            {"defaultAction": "SCMP_ACT_ERRNO"},
            {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["io_uring_setup"], "action": "SCMP_ACT_KILL"}]},
            # Not to be understood without doubt.
            {"defaultAction": "SCMP_ACT_ALLOW", "Syscalls": []},
            {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"NAMES": ["io_uring_setup"], "action": "SCMP_ACT_KILL"}]},
            {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": "all"},
            {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": ["all"]},
            {"syscalls": []},
            [],
        ],
    )
    def test_profiles_that_stay(self, profile: Any) -> None:
        assert seccomp.merged(profile) is None

    def test_a_refusal_under_a_condition_isnt_one(self) -> None:
        rule = {"names": ["io_uring_setup"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0}]}
        result = seccomp.merged({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]})
        assert result is not None
        assert [rule.get("errnoRet") for rule in result["syscalls"]] == [38]

    @pytest.mark.parametrize(
        ("default", "rules", "expected"),
        [
            ("ALLOW", [], None),
            ("ERRNO", [], "one"),
            ("ERRNO", [("ALLOW", ["one"])], "two"),
            ("ERRNO", [("LOG", ["one"]), ("ALLOW", ["two", "three"])], None),
            ("ALLOW", [("KILL", ["two"])], "two"),
            ("ALLOW", [("KILL", ["two"]), ("ALLOW", ["two"])], None),
        ],
    )
    def test_what_a_profile_forbids(self, default: str, rules: list[Any], expected: str | None) -> None:
        syscalls = [{"names": names, "action": f"SCMP_ACT_{action}"} for action, names in rules]
        profile = {"defaultAction": f"SCMP_ACT_{default}", "syscalls": syscalls}
        assert seccomp.forbidden(profile, ["one", "two"]) == expected

    def test_a_call_that_is_refused_for_some_arguments_is_not_forbidden(self) -> None:
        rule = {"names": ["one"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0}]}
        assert seccomp.forbidden({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}, ["one"]) is None
        rule["action"] = "SCMP_ACT_ALLOW"
        assert seccomp.forbidden({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule]}, ["one"]) is None

    @pytest.mark.parametrize(
        "profile", [[], {"syscalls": "all"}, {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": ["all"]}]
    )
    def test_what_is_no_profile_forbids_nothing(self, profile: Any) -> None:
        assert seccomp.forbidden(profile, ["one"]) is None

    def test_files_are_named_by_their_content(self, tmp_path: Path) -> None:
        profiles = seccomp.Profiles(tmp_path, "aarch64")
        assert profiles.allow_all() == profiles.allow_all()
        assert list(tmp_path.iterdir()) == [profiles.allow_all()]

    def test_a_machine_that_isnt_known_gets_none(self, tmp_path: Path) -> None:
        assert seccomp.Profiles(tmp_path, "mips").allow_all() is None


class TestConfiguration:
    # As containerd 1.6 and 2.1 send it, cut down to what is read.
    JSON = """{"containerd": {"defaultRuntimeName": "runc", "runtimes": {
        "runc": {"runtimeType": "io.containerd.runc.v2", "baseRuntimeSpec": ""},
        "kata": {"runtimeType": "io.containerd.kata.v2", "baseRuntimeSpec": "/etc/base.json"}}},
        "unsetSeccompProfile": ""}"""

    def test_from_containerds_status(self) -> None:
        result = Configuration.from_info({"config": self.JSON})
        assert result is not None
        assert result.unset_seccomp_profile == ""
        assert result.runtime("") == result.runtime("runc") == Runtime("io.containerd.runc.v2", has_base_spec=False)
        assert result.runtime("kata") == Runtime("io.containerd.kata.v2", has_base_spec=True)
        assert result.runtime("other") is None

    @pytest.mark.parametrize("info", [{}, {"config": "{"}, {"config": "{}"}, {"config": "[]"}, {"config": "null"}])
    def test_from_something_else(self, info: dict[str, str]) -> None:
        assert Configuration.from_info(info) is None
