"""The bundle of a real CRIU: that it works, is built once, and takes nothing from the container that it runs in."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from box import until

from criproxy import LIBEXEC, run
from criproxy.criu import bundle, kdat
from criproxy.criu.bundle import Bundle, BundleError
from criproxy.kernel import namespaces, processes

PROJECT = LIBEXEC.parents[1]
PR_SET_CHILD_SUBREAPER = 36
MS_RDONLY, MS_REMOUNT, MS_BIND = 0x1, 0x20, 0x1000

OPTIONS = ["--manage-cgroups=ignore", "--network-lock", "skip", "-v2", "-o"]

EVIL = """
#include <fcntl.h>
__attribute__((constructor)) static void run(void) { open(TRACE, O_CREAT | O_WRONLY, 0600); }
"""

APPLICATION = """
#include <grp.h>
#include <pthread.h>
#include <unistd.h>
static void *work(void *unused) { for (;;) usleep(20000); return unused; }
int main(void)
{
    pthread_t thread;
    setgroups(0, 0);
    if (setgid(1234) || setuid(1234)) return 1;
    for (int i = 0; i < 8; i++) pthread_create(&thread, 0, work, 0);
    for (;;) pause();
}
"""


@pytest.fixture(scope="module")
def criu_root() -> Path:
    downloaded = PROJECT / ".build/criu"
    return downloaded if downloaded.is_dir() else Path("/")


@pytest.fixture(scope="module")
def built(criu_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle.build(criu_root, LIBEXEC, tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with evil.so, which makes the file `trace` there when it is loaded, and app with threads and a user."""
    folder = tmp_path_factory.mktemp("compiled")
    folder.chmod(0o755)
    (folder / "evil.c").write_text(EVIL)
    (folder / "app.c").write_text(APPLICATION)
    evil = ["gcc", "-shared", "-fPIC", f'-DTRACE="{folder}/trace"', "-o", folder / "evil.so", folder / "evil.c"]
    subprocess.run(evil, check=True)
    subprocess.run(["gcc", "-pthread", "-o", folder / "app", folder / "app.c"], check=True)
    return folder


@pytest.fixture
def application(compiled: Path) -> Iterator[int]:
    """Its number stays the same over restores. Restored processes are our children, as we are a subreaper meanwhile."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    null = subprocess.DEVNULL
    process = subprocess.Popen(
        [compiled / "app"], stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/"
    )
    try:
        until(lambda: len(processes.threads(process.pid)) == 9)
        yield process.pid
    finally:
        if Path(f"/proc/{process.pid}").exists():
            os.kill(process.pid, 9)
            os.waitpid(process.pid, 0)
        process.returncode = -9
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def criu(built: Bundle, *arguments: str | Path) -> run.Completed:
    return run.run([*built.criu_argv(str(built.path)), *arguments], env=built.environment, timeout=60)


def test_it_is_built_once(built: Bundle, criu_root: Path) -> None:
    state = built.path.parent.parent
    before = sorted((path, path.stat().st_mtime_ns) for path in state.rglob("*"))
    assert bundle.build(criu_root, LIBEXEC, state) == built
    # Folders too, so that nothing was made and thrown away either.
    assert before == sorted((path, path.stat().st_mtime_ns) for path in state.rglob("*"))


def test_anyone_can_run_it_and_nobody_can_change_it(built: Bundle) -> None:
    assert built.path.stat().st_mode & 0o777 == 0o755
    for path in built.path.iterdir():
        mode = path.stat().st_mode & 0o777
        programs = {"criu", "ld.so", "init", "enter"}
        # What is known of the kernel has addresses: nothing for everyone.
        assert mode == (
            0o755 if path.is_dir() else 0o555 if path.name in programs else 0o400 if path.name == "kdt" else 0o444
        )


def test_it_starts_where_there_is_nothing_else(built: Bundle, tmp_path: Path) -> None:
    """As in an image without libc."""
    shutil.copytree(built.path, tmp_path / "root/.criproxy")
    said = subprocess.run(
        ["chroot", tmp_path / "root", *built.criu_argv(), "--version"], capture_output=True, check=True
    )
    assert f"Version: {built.version}" in said.stdout.decode()


def test_it_starts_from_a_descriptor(built: Bundle) -> None:
    folder = os.open(built.path, os.O_RDONLY | os.O_DIRECTORY)
    argv = [*built.criu_argv(f"/proc/self/fd/{folder}"), "--version"]
    assert built.version in run.run(argv, env=built.environment, pass_fds=[folder]).check().stdout.decode()
    os.close(folder)


def test_a_damaged_one_is_refused(built: Bundle, criu_root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundles" / built.path.name
    shutil.copytree(built.path, copy)
    (copy / "criu").chmod(0o755)
    with open(copy / "criu", "r+b") as stream:
        stream.write(b"?")
    with pytest.raises(BundleError, match="criu was changed"):
        bundle.build(criu_root, LIBEXEC, tmp_path)


def test_the_kernel_data_is_the_kernels(built: Bundle) -> None:
    assert kdat.found_lsm((built.path / "kdt").read_bytes()) == kdat.kernel_lsm()


def unpatch(bundle_: Path) -> None:
    data = (bundle_ / "criu").read_bytes()
    (bundle_ / "criu").chmod(0o755)
    (bundle_ / "criu").write_bytes(data.replace(b"/.criproxy/kdt", b"/run/criu.kdat"))


@pytest.mark.parametrize(
    ("change", "said", "probes", "writes"),
    [
        pytest.param(lambda _: None, "Loaded kdat cache from /.criproxy/kdt", False, False, id="as-it-is"),
        pytest.param(lambda b: (b / "kdt").unlink(), "/.criproxy/kdt does not exist", True, False, id="missing"),
        pytest.param(lambda b: os.truncate(b / "kdt", 99), "Stale /.criproxy/kdt file", True, False, id="stale"),
        # What the others would do without us.
        pytest.param(unpatch, "Stale /run/criu.kdat file", True, True, id="unpatched"),
    ],
)
def test_kernel_data_comes_from_the_bundle_and_saves_the_probing(
    change: Callable[[Path], object], said: str, probes: bool, writes: bool, built: Bundle, tmp_path: Path
) -> None:
    """In a root that is all tmpfs, where CRIU could write; the bundle mounted as in containers; and a forged file."""
    copy, run_ = tmp_path / ".criproxy", tmp_path / "run"
    chroot = shutil.which("chroot")
    assert chroot

    def state() -> list[tuple[Path, bytes]]:
        return sorted((path, path.read_bytes()) for folder in (copy, run_) for path in folder.rglob("*.*"))

    def check() -> tuple[str, bool]:
        namespaces.mount("tmpfs", tmp_path, "tmpfs")
        for name in ("proc", "sys", "dev"):
            (tmp_path / name).mkdir()
            namespaces.mount(f"/{name}", tmp_path / name, None, MS_BIND | namespaces.MS_REC)
        shutil.copytree(built.path, copy)
        change(copy)
        namespaces.mount(str(copy), copy, None, MS_BIND)
        namespaces.mount("none", copy, None, MS_BIND | MS_REMOUNT | MS_RDONLY)
        (tmp_path / "tmp").mkdir()  # the probing needs it
        run_.mkdir()
        (run_ / "criu.kdat").write_bytes(b"forged")
        before = state()
        argv = [chroot, tmp_path, *built.criu_argv(), "check", "-v4", "-o", "/dev/stderr"]
        output = run.run(argv, env=built.environment, timeout=60).check().stderr.decode()
        return output, state() != before

    output, wrote = namespaces.in_private_mounts(check)
    assert said in output
    assert ("Found anon-shmem device" in output) is probes
    assert wrote is writes


def test_no_mount_is_left(built: Bundle) -> None:
    text = Path("/proc/mounts").read_text()
    assert str(built.path) not in text
    mounts = [line.split() for line in text.splitlines()]
    # Where the kernel data is made. Others mount a tmpfs of their own there.
    assert not [options for _, target, _, options, *_ in mounts if target == "/run" and "size=4096k" in options]


def test_threads_of_another_user_come_back_as_they_were(built: Bundle, application: int, tmp_path: Path) -> None:
    before = processes.attributes([application])
    assert len(before) == 9
    for cycle in range(3):
        images = tmp_path / str(cycle)
        images.mkdir(mode=0o700)
        criu(built, "dump", "-t", str(application), "-D", images, *OPTIONS, "dump.log").check()
        os.waitpid(application, 0)
        criu(built, "restore", "-d", "-D", images, *OPTIONS, "restore.log").check()
        assert processes.attributes([application]) == before


def test_no_breakpoints_are_set(built: Bundle, application: int, tmp_path: Path) -> None:
    """The first one on a machine waits for an RCU grace period. CRIU is asked, as how long that is depends."""
    options = ["-D", tmp_path, *OPTIONS]
    options[options.index("-v2")] = "-v4"
    criu(built, "dump", "-t", str(application), *options, "dump.log").check()
    os.waitpid(application, 0)
    criu(built, "restore", "-d", *options, "restore.log").check()
    for log in ("dump.log", "restore.log"):
        assert "Force no-breakpoints" in (tmp_path / log).read_text()


@pytest.mark.parametrize("way", ["preload", "configuration", "programs"])
def test_a_hostile_container_cannot_steer_criu(built: Bundle, compiled: Path, tmp_path: Path, way: str) -> None:
    """In a mount namespace of its own, first with a plain CRIU to show that the attack is one."""
    trace = compiled / "trace"
    loader = tmp_path / "ld.so"
    loader.write_bytes((built.path / "ld.so").read_bytes().replace(b"/.criproxy/preload", b"/etc/ld.so.preload"))
    loader.chmod(0o755)
    plain = [loader, "--library-path", built.path, built.path / "criu", "check"]

    def attack() -> tuple[bool, bool]:
        for folder in ("/run", "/etc", "/usr/local/bin"):
            namespaces.mount("tmpfs", Path(folder), "tmpfs")
        if way == "preload":
            Path("/etc/ld.so.preload").write_text(f"{compiled}/evil.so\n")
        elif way == "configuration":
            Path("/etc/criu").mkdir()
            Path("/etc/criu/default.conf").write_text("no-such-option\n")
        else:
            for name in ("iptables", "ip6tables"):
                program = Path("/usr/local/bin") / name
                program.write_text(f"#!/bin/sh\n: > {trace}\n")
                program.chmod(0o755)

        def caught(completed: run.Completed) -> bool:
            left = trace.exists()
            trace.unlink(missing_ok=True)
            return left or completed.returncode != 0

        control = run.run(plain, env={"PATH": "/usr/local/bin:/usr/bin:/bin"}, timeout=60)
        return caught(control), caught(criu(built, "check"))

    assert namespaces.in_private_mounts(attack) == (True, False)


def test_what_it_has_no_use_for_is_not_loaded(built: Bundle) -> None:
    for name in ("libgnutls.so.30", "libnftables.so.1"):
        assert (built.path / name).read_bytes() == (LIBEXEC / name).read_bytes()
    for name in ("libnettle.so.8", "libnftnl.so.11", "libgmp.so.10"):
        assert not (built.path / name).exists()


@pytest.mark.parametrize(("binding", "real"), [("lazy", False), ("now", True)])
def test_a_criu_that_does_not_start_without_gnutls_is_given_it(tmp_path: Path, binding: str, real: bool) -> None:
    """As distributions build it that have all functions looked up at the start."""
    (tmp_path / "gnutls.c").write_text("void *gnutls_free; int gnutls_init(void) { return 0; }")
    (tmp_path / "gnutls.map").write_text("GNUTLS_3_4 { gnutls_free; gnutls_init; };")
    code = "extern void *gnutls_free; int gnutls_init(void); int main(int c, char **v) { (void)v;"
    (tmp_path / "criu.c").write_text(f"{code} return c > 9 ? gnutls_init() : !gnutls_free; }}")
    root = tmp_path / "root"
    (root / "usr/sbin").mkdir(parents=True)
    (root / "usr/lib").mkdir()
    true = Path("/bin/true").resolve()
    loader = Path(bundle._interpreter(true))
    (root / loader.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(loader, root / loader.relative_to("/"))
    listed = subprocess.run([loader, "--list", true], capture_output=True, text=True, check=True).stdout
    libc = next(line.split()[2] for line in listed.splitlines() if "libc.so.6 =>" in line)
    shutil.copy(libc, root / "usr/lib")
    library = root / "usr/lib/libgnutls.so.30"
    flags = ["-shared", "-fPIC", "-Wl,-soname,libgnutls.so.30", f"-Wl,--version-script={tmp_path}/gnutls.map"]
    subprocess.run(["gcc", *flags, "-o", library, tmp_path / "gnutls.c"], check=True)
    subprocess.run(["gcc", f"-Wl,-z,{binding}", "-o", root / "usr/sbin/criu", tmp_path / "criu.c", library], check=True)
    files = bundle._criu(root, LIBEXEC)
    assert (files["libgnutls.so.30"].data == library.read_bytes()) is real


def test_plugins_come_from_nowhere(built: Bundle) -> None:
    assert list((built.path / "plugins").iterdir()) == []
    assert built.criu_argv()[-2:] == ["--libdir", "/.criproxy/plugins"]


def test_garbage(built: Bundle, tmp_path: Path) -> None:
    for name in ("old", ".new-interrupted"):
        (tmp_path / "bundles" / name).mkdir(parents=True)
    kept = tmp_path / "bundles" / built.path.name
    shutil.copytree(built.path, kept)
    removed = bundle.collect_garbage(tmp_path, {kept})
    assert {path.name for path in removed} == {"old", ".new-interrupted"}
    assert [path for path in kept.parent.iterdir() if path.is_dir()] == [kept]


def test_no_criu(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="There is no criu in"):
        bundle.build(tmp_path, LIBEXEC, tmp_path / "state")
