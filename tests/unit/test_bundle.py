"""What goes into a bundle, where it is kept, and what is believed about the kernel; without CRIU and without root."""

import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from criproxy import run
from criproxy.criu import bundle, debian, kdat
from criproxy.criu.bundle import Bundle, BundleError
from criproxy.criu.debian import DownloadError
from criproxy.criu.kdat import KdatError

TRUE = Path("/bin/true").resolve()
NOTHING = Path("/nonexistent")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An unpacked root with a `criu` that is a program of this machine, its loader behind a link, and its libraries."""
    folder = tmp_path / "root"
    interpreter = bundle._interpreter(TRUE)
    libraries = folder / "usr/lib"
    for directory in ("usr/sbin", "usr/lib", interpreter.lstrip("/").rpartition("/")[0]):
        (folder / directory).mkdir(parents=True, exist_ok=True)
    (folder / "usr/sbin/criu").write_bytes(TRUE.read_bytes() + b"\0/run/criu.kdat\0")
    (libraries / "loader").write_bytes(Path(interpreter).read_bytes())
    (libraries / "loader").chmod(0o755)
    (folder / interpreter.lstrip("/")).symlink_to("/usr/lib/loader")
    for line in run.run([interpreter, "--list", TRUE], env={}).check().stdout.decode().splitlines():
        if " => /" in line:
            path = Path(line.split(" => ")[1].rsplit(" (", 1)[0])
            (libraries / path.name).write_bytes(path.read_bytes())
    return folder


def test_criu_brings_its_libraries_and_its_loader(root: Path) -> None:
    files = bundle._criu(root, NOTHING)
    assert {"criu", "ld.so", "libc.so.6"} <= files.keys()
    assert files["libc.so.6"].data == (root / "usr/lib/libc.so.6").read_bytes()
    assert [name for name, file in files.items() if file.mode == 0o555] == ["criu", "ld.so"]


def test_the_loader_does_not_read_the_containers_preload_list(root: Path) -> None:
    loader = bundle._criu(root, NOTHING)["ld.so"].data
    assert b"/etc/ld.so.preload" not in loader
    assert len(loader) == (root / "usr/lib/loader").stat().st_size


def test_a_library_that_is_missing(root: Path) -> None:
    (root / "usr/lib/libc.so.6").unlink()
    with pytest.raises(BundleError, match=r"needs libc\.so\.6"):
        bundle._criu(root, NOTHING)


def test_a_loader_that_cannot_be_patched(root: Path) -> None:
    loader = root / "usr/lib/loader"
    loader.write_bytes(loader.read_bytes().replace(b"/etc/ld.so.preload", b"/etc/ld.so.PRELOAD"))
    with pytest.raises(BundleError, match=r"ld\.so\.preload"):
        bundle._criu(root, NOTHING)


def test_criu_reads_the_bundles_kernel_data_and_not_the_containers() -> None:
    # As in 3.17.1 and as in 4.1.1.
    old = bundle._with_our_kernel_data(bundle._File(b"a\0/run/.criu.kdat\0/run/criu.kdat\0z", 0o555), Path("/"))
    assert old == bundle._File(b"a\0/.criproxy/.kdt\0/.criproxy/kdt\0z", 0o555)
    new = bundle._with_our_kernel_data(bundle._File(b"%s.tmp\0/run/criu.kdat\0z", 0o555), Path("/"))
    assert new == bundle._File(b"%s.tmp\0/.criproxy/kdt\0z", 0o555)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0/var/run/criu.kdat\0",  # RUNDIR is another one
        b"\0/run/criu.kdat.tmp\0",
        b"\0/run/criu.kdat\0/run/criu.kdat\0",
        b"\0/run/criu.kdat\0Can't read /run/criu.kdat\n\0",
    ],
)
def test_a_criu_that_would_read_the_containers_kernel_data_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match=r"criu of /r can't be kept from reading .*/run/criu\.kdat"):
        bundle._with_our_kernel_data(bundle._File(data), Path("/r"))


def test_no_criu(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="Install the package criu"):
        bundle._criu(tmp_path, NOTHING)


def test_something_else_that_is_called_criu(root: Path) -> None:
    (root / "usr/sbin/criu").write_text("#!/bin/sh\n")
    with pytest.raises(BundleError, match="isn't a 64-bit ELF file"):
        bundle._criu(root, NOTHING)


def test_our_own_programs(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"init is missing.*`make`"):
        bundle._ours(tmp_path)
    (tmp_path / "init").write_bytes(b"i")
    with pytest.raises(BundleError, match=r"preload\.so is missing"):
        bundle._ours(tmp_path)
    (tmp_path / "preload.so").write_bytes(b"p")
    assert bundle._ours(tmp_path).keys() == {"init", "preload.so"}


PLAIN = bundle._File(b"as it is", 0o555)
CONTENT = {"criu": bundle._File(b"changed", 0o555), "libc.so.6": bundle._File(b"2")}


class Kernel:
    """What CRIU finds out, which differs each time."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, draft: Path) -> bytes:
        assert (draft / "criu").read_bytes() == PLAIN.data
        assert (draft / "libc.so.6").read_bytes() == b"2"
        self.asked += 1
        return b"%d" % self.asked


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


def test_the_same_content_has_the_same_place(tmp_path: Path, kernel: Kernel) -> None:
    first = bundle._store(tmp_path, CONTENT, PLAIN, kernel)
    assert bundle._store(tmp_path, dict(reversed(CONTENT.items())), PLAIN, kernel) == first
    assert kernel.asked == 1
    other = bundle._store(tmp_path, CONTENT | {"init": bundle._File(b"3", 0o555)}, PLAIN, kernel)
    assert other != first
    assert sorted(tmp_path.iterdir()) == sorted([first, other])
    assert {path.name: path.stat().st_mode & 0o777 for path in first.iterdir()} == {
        "criu": 0o555,
        "kdt": 0o400,
        "libc.so.6": 0o444,
        "plugins": 0o755,
    }
    assert (first / "criu").read_bytes() == b"changed"
    assert (first / "kdt").read_bytes() == b"1"


def test_another_boot_has_another_bundle(tmp_path: Path, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bundle._store(tmp_path, CONTENT, PLAIN, kernel)
    monkeypatch.setattr(kdat, "key", lambda criu: f"another-boot-{criu}")
    second = bundle._store(tmp_path, CONTENT, PLAIN, kernel)
    assert second != first
    assert [(path / "kdt").read_bytes() for path in (first, second)] == [b"1", b"2"]


@pytest.mark.parametrize("name", ["criu", "kdt"])
@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"?"), Path.unlink])
def test_a_bundle_that_was_changed_is_refused(
    name: str, damage: Callable[[Path], object], tmp_path: Path, kernel: Kernel
) -> None:
    path = bundle._store(tmp_path, CONTENT, PLAIN, kernel)
    (path / name).chmod(0o755)
    damage(path / name)
    with pytest.raises(BundleError, match=f"/{name} was changed"):
        bundle._store(tmp_path, CONTENT, PLAIN, kernel)


def test_nothing_is_left_of_a_bundle_that_could_not_be_made(tmp_path: Path) -> None:
    def fail(draft: Path) -> bytes:
        raise BundleError("no")

    with pytest.raises(BundleError, match="no"):
        bundle._store(tmp_path, CONTENT, PLAIN, fail)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_shuts_the_container_out() -> None:
    made = Bundle(path=Path("/b"), version="4.1.1")
    argv = made.criu_argv()
    assert argv[:4] == ["/.criproxy/ld.so", "--inhibit-cache", "--library-path", "/.criproxy"]
    assert argv[-4:] == ["/.criproxy/criu", "--no-default-config", "--libdir", "/.criproxy/plugins"]
    assert "/.criproxy/preload.so" in argv
    assert made.criu_argv("/proc/self/fd/7")[0] == "/proc/self/fd/7/ld.so"
    assert made.environment["PATH"] == "/.criproxy/plugins"


def test_kernel_data_belongs_to_one_bundle_and_one_boot(tmp_path: Path) -> None:
    kernel = tmp_path / "sys/kernel"
    (kernel / "random").mkdir(parents=True)
    (kernel / "osrelease").write_text("6.1.0\n")
    (kernel / "random/boot_id").write_text("a\n")
    first = kdat.key("bundle", tmp_path)
    assert kdat.key("bundle", tmp_path) == first
    assert kdat.key("other", tmp_path) != first
    (kernel / "random/boot_id").write_text("b\n")
    assert kdat.key("bundle", tmp_path) != first


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, kdat.NONE),
        ({"sys/kernel/security/lsm": "lockdown,capability,landlock,bpf"}, kdat.NONE),
        ({"sys/kernel/security/lsm": "lockdown,capability,apparmor"}, kdat.APPARMOR),
        ({"sys/module/apparmor/parameters/enabled": "Y\n"}, kdat.APPARMOR),
        ({"sys/module/apparmor/parameters/enabled": "N\n"}, kdat.NONE),
        ({"sys/kernel/security/lsm": "capability,selinux"}, kdat.SELINUX),
        ({"proc/filesystems": "nodev\tsysfs\nnodev\tselinuxfs\n\text4\n"}, kdat.SELINUX),
    ],
)
def test_the_kernels_security_module(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert kdat.kernel_lsm(tmp_path) == expected


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "sys/vm").mkdir(parents=True)
    (tmp_path / "sys/kernel/cap_last_cap").write_text("40\n")
    (tmp_path / "sys/vm/mmap_min_addr").write_text("4096\n")
    return tmp_path


def kernel_data(lsm: int, last_cap: int = 40) -> bytes:
    data = bytearray(904)
    struct.pack_into("=I", data, 0, 0x57023458)
    struct.pack_into("=i", data, 16, last_cap)
    struct.pack_into("=Q", data, 72, 65536)
    struct.pack_into("=i", data, 84, lsm)
    return bytes(data)


def test_the_security_module_that_criu_found(proc: Path) -> None:
    assert kdat.found_lsm(kernel_data(0), proc) == kdat.NONE
    assert kdat.found_lsm(kernel_data(1), proc) == kdat.SELINUX
    assert kdat.found_lsm(kernel_data(2), proc) == kdat.APPARMOR


def test_kernel_data_of_an_unknown_layout_is_not_interpreted(proc: Path) -> None:
    assert kdat.found_lsm(kernel_data(2, last_cap=0), proc) is None
    assert kdat.found_lsm(bytes(904), proc) is None
    assert kdat.found_lsm(b"", proc) is None


@pytest.mark.parametrize(
    ("found", "kernel", "complaint"),
    [
        (kdat.NONE, kdat.APPARMOR, "unconfined"),
        (kdat.APPARMOR, kdat.NONE, "unconfined"),
        (kdat.NONE, kdat.SELINUX, "lose their labels"),
        (None, kdat.APPARMOR, "can't be seen"),
    ],
)
def test_kernel_data_with_another_security_module_than_the_kernels(
    found: str | None, kernel: str, complaint: str
) -> None:
    with pytest.raises(KdatError, match=complaint):
        kdat._agree(found, kernel)


def test_kernel_data_that_agrees() -> None:
    for found, kernel in ((kdat.NONE, kdat.NONE), (kdat.APPARMOR, kdat.APPARMOR), (None, kdat.NONE)):
        kdat._agree(found, kernel)


def test_the_reason_of_criu_is_its_first_error() -> None:
    output = b"""\
Warn  (criu/kerndat.c:1285): Can't keep kdat cache on non-tempfs
Error (criu/util.c:641): exited, status=1
Error (criu/vdso.c:381): vdso: Unexpected rt vDSO area bounds
Error (criu/crtools.c:260): Could not initialize kernel features detection.
"""
    assert kdat._reason(output) == "vdso: Unexpected rt vDSO area bounds"
    assert kdat._reason(b"ld.so: no memory\n") == "ld.so: no memory"
    assert kdat._reason(b"") == "nothing."


def test_what_is_downloaded_already_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "run", pytest.fail)
    debian.download("trixie", tmp_path, say=pytest.fail)


def test_the_mirror_is_the_machines_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apt = tmp_path / "apt-get"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def sources(*lines: str) -> None:
        apt.write_text(f"#!{sys.executable}\nprint({chr(10).join(lines)!r})\n")
        apt.chmod(0o755)

    sources("http://a/debian-security/\tDebian\tDebian-Security", "http://a/mirror/\tDebian\tDebian")
    assert debian._mirror() == "http://a/mirror/"
    sources("http://b/debian-security/\t$(ORIGIN)\t$(LABEL)", "http://b/debian/\t$(ORIGIN)\t$(LABEL)")
    assert debian._mirror() == "http://b/debian/"
    sources("http://c/ubuntu/\tUbuntu\tUbuntu")
    with pytest.raises(DownloadError, match="no Debian archive"):
        debian._mirror()
