"""Whether a command exists, as runc's LookPath would see it inside the container."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from criproxy.api import cri_pb2 as cri
from criproxy.cri import executable
from criproxy.cri.executable import Answer, Bind, RootfsError

PATH = "/usr/bin:/bin"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with /usr/bin/app (executable), /usr/bin/text (not), and the usual link from /bin."""
    path = tmp_path / "root"
    (path / "usr/bin").mkdir(parents=True)
    (path / "bin").symlink_to("usr/bin")
    program(path / "usr/bin/app")
    (path / "usr/bin/text").write_text("")
    return path


def program(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!")
    path.chmod(0o755)


def find(root: Path, argv0: str, *mounts: Bind, path: str = PATH, cwd: str = "/") -> Answer:
    descriptor = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        return executable.find(argv0, path, mounts, descriptor, cwd)
    finally:
        os.close(descriptor)


class TestPath:
    @pytest.mark.parametrize(
        ("argv0", "expected"),
        [
            ("app", Answer.FOUND),
            ("/bin/app", Answer.FOUND),
            ("/usr/bin/app", Answer.FOUND),
            ("/usr/../bin/./app", Answer.FOUND),
            ("/../../bin/app", Answer.FOUND),
            ("text", Answer.MISSING),
            ("/bin/text", Answer.MISSING),
            ("/usr/bin", Answer.MISSING),
            ("bin", Answer.MISSING),
            ("none", Answer.MISSING),
            ("/none/app", Answer.MISSING),
            ("/bin/app/", Answer.MISSING),
            ("/bin/app/x", Answer.MISSING),
            ("/bin/text/../app", Answer.MISSING),
            ("./app", Answer.MISSING),
            ("/proc/self/exe", Answer.UNKNOWN),
            ("/dev/app", Answer.UNKNOWN),
        ],
    )
    def test_lookup(self, root: Path, argv0: str, expected: Answer) -> None:
        assert find(root, argv0) is expected

    def test_a_relative_command_starts_at_the_working_directory(self, root: Path) -> None:
        assert find(root, "./app", cwd="/usr/bin") is Answer.FOUND
        assert find(root, "bin/app", cwd="usr") is Answer.FOUND

    def test_folders_of_path(self, root: Path) -> None:
        assert find(root, "app", path="") is Answer.MISSING
        assert find(root, "app", path="/none:/proc:/bin") is Answer.FOUND
        assert find(root, "none", path="/proc:/bin") is Answer.UNKNOWN
        assert find(root, "app", path=".") is Answer.UNKNOWN

    def test_a_name_that_is_too_long_for_the_kernel(self, root: Path) -> None:
        assert find(root, "a" * 300) is Answer.UNKNOWN


class TestLinks:
    def test_absolute_ones_start_at_the_containers_root(self, root: Path) -> None:
        (root / "entry").symlink_to("/usr/bin/app")
        assert find(root, "/entry") is Answer.FOUND

    def test_none_leads_out_of_it(self, root: Path, tmp_path: Path) -> None:
        program(tmp_path / "outside")
        (root / "up").symlink_to("../../../../.." + str(tmp_path / "outside"))
        (root / "absolute").symlink_to(tmp_path / "outside")
        assert find(root, "/up") is Answer.MISSING
        assert find(root, "/absolute") is Answer.MISSING

    def test_dangling_ones_and_loops(self, root: Path) -> None:
        (root / "dangling").symlink_to("none")
        (root / "loop").symlink_to("loop")
        assert find(root, "/dangling") is Answer.MISSING
        assert find(root, "/loop") is Answer.MISSING

    def test_into_what_cant_be_known(self, root: Path) -> None:
        (root / "self").symlink_to("/proc/self/exe")
        assert find(root, "/self") is Answer.UNKNOWN


class TestMounts:
    @pytest.fixture
    def volume(self, tmp_path: Path) -> Path:
        program(tmp_path / "volume/tool")
        return tmp_path / "volume"

    def test_a_volume_hides_and_brings(self, root: Path, volume: Path) -> None:
        mount = Bind("/usr/bin", str(volume))
        assert find(root, "tool", mount) is Answer.FOUND
        assert find(root, "app", mount) is Answer.MISSING

    def test_where_the_image_has_no_such_folder(self, root: Path, volume: Path) -> None:
        mount = Bind("/opt/x/bin", str(volume))
        assert find(root, "/opt/x/bin/tool", mount) is Answer.FOUND
        assert find(root, "/opt/x/../x/bin/tool", mount) is Answer.FOUND
        assert find(root, "/opt/x/tool", mount) is Answer.MISSING
        assert find(root, "/opt/x", mount) is Answer.MISSING

    def test_the_mount_point_may_be_reached_by_a_link(self, root: Path, volume: Path) -> None:
        assert find(root, "/usr/bin/sub/tool", Bind("/bin/sub", str(volume))) is Answer.FOUND

    def test_the_longest_one_counts_whatever_their_order(self, root: Path, volume: Path, tmp_path: Path) -> None:
        program(tmp_path / "deep/other")
        mounts = [Bind("/v/deep", str(tmp_path / "deep")), Bind("/v", str(volume))]
        (volume / "deep").mkdir()
        assert find(root, "/v/deep/other", *mounts) is Answer.FOUND
        assert find(root, "/v/tool", *mounts) is Answer.FOUND

    def test_the_later_one_of_two_at_one_place_counts(self, root: Path, volume: Path, tmp_path: Path) -> None:
        program(tmp_path / "second/other")
        mounts = [Bind("/v", str(volume)), Bind("/v/", str(tmp_path / "second"))]
        assert find(root, "/v/other", *mounts) is Answer.FOUND
        assert find(root, "/v/tool", *mounts) is Answer.MISSING

    def test_a_single_file(self, root: Path, volume: Path) -> None:
        assert find(root, "/usr/bin/text", Bind("/usr/bin/text", str(volume / "tool"))) is Answer.FOUND

    def test_links_in_a_volume_stay_in_the_container(self, root: Path, volume: Path) -> None:
        (volume / "link").symlink_to("/usr/bin/app")
        (volume / "up").symlink_to("../usr/bin/app")
        (volume / "out").symlink_to(volume / "tool")
        mount = Bind("/v", str(volume))
        assert find(root, "/v/link", mount) is Answer.FOUND
        assert find(root, "/v/up", mount) is Answer.FOUND
        assert find(root, "/v/out", mount) is Answer.MISSING

    def test_what_cant_be_seen(self, root: Path, tmp_path: Path) -> None:
        assert find(root, "/v/x", Bind("/v", None)) is Answer.UNKNOWN
        assert find(root, "/v/x", Bind("/v", str(tmp_path / "none"))) is Answer.UNKNOWN
        assert find(root, "/bin/app", Bind("/", None)) is Answer.UNKNOWN
        assert find(root, "/bin/app", Bind("/v", None)) is Answer.FOUND

    def test_from_a_request(self) -> None:
        config = cri.ContainerConfig()
        config.mounts.add(container_path="/a", host_path="/h")
        config.mounts.add(container_path="/i").image.image = "x"
        assert executable.binds(config) == [Bind("/a", "/h"), Bind("/i", None)]
        config.cdi_devices.add(name="gpu")
        assert executable.binds(config) == [Bind("/", None)]


def test_no_descriptor_is_left(root: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for argv0 in ("app", "none", "/proc/x", "/bin/app/x"):
        find(root, argv0, Bind("/v", str(root)))
    assert os.listdir("/proc/self/fd") == before


@dataclass
class Mount:
    type: str
    source: str
    options: list[str]


class TestRootfs:
    """Snapshots as containerd describes them."""

    @pytest.fixture
    def folders(self, tmp_path: Path) -> Path:
        """Two lower folders and an upper one that has a file over one of theirs and deletes another."""
        for name in ("lower1", "lower2", "upper", "work"):
            (tmp_path / name).mkdir()
        program(tmp_path / "lower1/bin/first")
        program(tmp_path / "lower2/bin/second")
        program(tmp_path / "lower2/bin/gone")
        return tmp_path

    def test_a_plain_folder(self, root: Path) -> None:
        with executable.rootfs([Mount("bind", str(root), ["ro", "rbind"])]) as descriptor:
            assert executable.find("app", PATH, [], descriptor) is Answer.FOUND

    @pytest.mark.skipif(os.geteuid() != 0, reason="mounts an overlay")
    @pytest.mark.parametrize("layers", [2, 150])
    def test_an_overlay(self, folders: Path, layers: int) -> None:
        for number in range(layers - 2):
            (folders / f"a-folder-with-a-name-of-some-length-{number}").mkdir()
        os.mknod(folders / "upper/gone", 0o20000)  # overlayfs's mark for "deleted"
        (folders / "upper/bin").mkdir()
        os.rename(folders / "upper/gone", folders / "upper/bin/gone")
        more = [str(path) for path in folders.glob("a-folder-*")]
        lower = ":".join([str(folders / "lower1"), *more, str(folders / "lower2")])
        options = ["index=off", f"workdir={folders}/work", f"upperdir={folders}/upper", f"lowerdir={lower}"]

        def mounts() -> list[str]:
            # Others on this machine may mount something meanwhile.
            return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(folders) in line]

        before = os.listdir("/proc/self/fd")
        with executable.rootfs([Mount("overlay", "overlay", options)]) as descriptor:
            answers = [executable.find(name, "/bin", [], descriptor) for name in ("first", "second", "gone")]
            with pytest.raises(OSError, match="Read-only"):
                os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor)
            assert mounts() == []
        assert answers == [Answer.FOUND, Answer.FOUND, Answer.MISSING]
        assert mounts() == []
        assert os.listdir("/proc/self/fd") == before

    @pytest.mark.parametrize(
        ("mounts", "reason"),
        [
            ([], "made of 0 mounts"),
            ([Mount("erofs", "/x", [])], "of the type erofs"),
            ([Mount("overlay", "overlay", ["upperdir=/u"])], "no lower folder"),
            ([Mount("overlay", "overlay", ["lowerdir=/a::/b"])], "isn't understood"),
            ([Mount("bind", "/nowhere/at/all", [])], "can't be opened: No such file"),
        ],
    )
    def test_what_cant_be_looked_into(self, mounts: list[Mount], reason: str) -> None:
        with pytest.raises(RootfsError, match=reason), executable.rootfs(mounts):
            pass
