"""Makes what Python alone can't: protocol modules, the static init and launcher, the eBPF objects.

`pip install .`, `pip install -e .` and `python setup.py artefacts` all do it. Everything lands in the source
tree (`criproxy/api`, `criproxy/libexec`), which is where an editable install runs from and where the wheel takes
its package data from. What is newer than its sources is left alone. Each file is made under another name and
renamed, so that two builds side by side and a running init don't disturb each other.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
API = Path("criproxy/api")
LIBEXEC = Path("criproxy/libexec")

C_FLAGS = ("-O2", "-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-fstack-protector-strong")

# Debian's package for each program that the build starts, for the error message.
PACKAGES = {"gcc": "gcc libc6-dev", "clang": "clang libbpf-dev linux-libc-dev", "llvm-strip": "llvm"}


class BuildError(SystemExit):
    """A sentence for whoever runs the build; setuptools and pip print it as it is."""


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise BuildError(f"criproxy's build needs {name}, which isn't installed: apt-get install {PACKAGES[name]}")
    return path


def run(argv: list[str]) -> None:
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"criproxy's build failed in: {' '.join(argv)}\n{done.stderr}{done.stdout}".rstrip())
    if done.stderr:
        print(done.stderr.rstrip())


def outdated(target: Path, sources: Iterable[Path]) -> bool:
    """This file counts as a source of everything: flags and rules are in it."""
    if not (ROOT / target).exists():
        return True
    made = (ROOT / target).stat().st_mtime_ns
    return any((ROOT / source).stat().st_mtime_ns > made for source in (*sources, Path("setup.py")))


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write to, in the target's folder (a rename mustn't cross file systems)."""
    folder = ROOT / target.parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as scratch:
        path = Path(scratch) / target.name
        yield path
        os.replace(path, ROOT / target)


def source(path: str) -> Path:
    if not (ROOT / path).is_file():
        raise BuildError(f"{path} is missing: this checkout or source archive of criproxy isn't complete")
    return Path(path)


def headers(folder: str) -> list[Path]:
    return [path.relative_to(ROOT) for path in sorted((ROOT / folder).glob("*.h"))]


def protocols() -> None:
    """api/x.proto → criproxy/api/x_pb2.py and .pyi."""
    for proto in sorted((ROOT / "api").glob("*.proto")):
        targets = [API / f"{proto.stem}_pb2.py", API / f"{proto.stem}_pb2.pyi"]
        if not any(outdated(target, [proto.relative_to(ROOT)]) for target in targets):
            continue
        try:
            import grpc_tools
            from grpc_tools import protoc
        except ImportError:
            raise BuildError("criproxy's build needs grpcio-tools: pip install grpcio-tools") from None
        builtin = Path(grpc_tools.__file__).parent / "_proto"
        with tempfile.TemporaryDirectory(prefix=".making-", dir=ROOT / API) as scratch:
            # The virtual path makes the module's imports and its name in the descriptor pool unique.
            argv = ["protoc", f"-I{API}={ROOT / 'api'}", f"-I{builtin}"]
            argv += [f"--python_out={scratch}", f"--pyi_out={scratch}", f"{API}/{proto.name}"]
            if protoc.main(argv) != 0:
                raise BuildError(f"protoc refuses api/{proto.name}; its reason is above")
            for target in targets:
                os.replace(Path(scratch) / target, ROOT / target)
        print(f"made {targets[0]}")


def native(name: str, target: str, *flags: str) -> None:
    path, output = source(f"native/{name}.c"), LIBEXEC / target
    if outdated(output, [path, *headers("native")]):
        with replacing(output) as made:
            run([tool("gcc"), *C_FLAGS, *flags, "-s", "-o", str(made), str(path)])
        print(f"made {output}")


def stand_in(name: str, soname: str) -> None:
    """A library that takes another one's place."""
    native(name, soname, "-shared", "-fPIC", f"-Wl,-soname,{soname}", f"-Wl,--version-script=native/{name}.map")


def ebpf(name: str) -> None:
    path, output = source(f"bpf/{name}.c"), LIBEXEC / f"{name}.bpf.o"
    if not outdated(output, [path, *headers("bpf")]):
        return
    # <asm/types.h> is in the multiarch folder, where clang doesn't look when it compiles for bpf.
    multiarch = f"-I/usr/include/{platform.machine()}-linux-gnu"
    with replacing(output) as made:
        run([tool("clang"), "-O2", "-g", "-target", "bpf", "-Wall", multiarch, "-c", "-o", str(made), str(path)])
        # Drops DWARF, keeps BTF, which libbpf needs for the maps. The object works unstripped too.
        if strip := shutil.which("llvm-strip"):
            run([strip, "-g", str(made)])
    print(f"made {output}")


def units() -> None:
    for unit in sorted((ROOT / "systemd").glob("*")):
        target = LIBEXEC / "systemd" / unit.name
        if outdated(target, [unit.relative_to(ROOT)]):
            with replacing(target) as made:
                shutil.copyfile(unit, made)


MAKERS = {
    "api": protocols,
    "init": lambda: native("init", "init", "-static"),
    "enter": lambda: native("enter", "enter", "-static"),
    "keep": lambda: native("keep", "keep", "-static"),
    "pages": lambda: native("pages", "pages", "-static"),
    "preload": lambda: native("preload", "preload.so", "-shared", "-fPIC"),
    "unused": lambda: [stand_in("gnutls", "libgnutls.so.30"), stand_in("nftables", "libnftables.so.1")],
    "bpf": lambda: [ebpf(name) for name in ("pod", "host", "kubelet")],
    "systemd": units,
}


class Artefacts(Command):
    description = "make the protocol modules and the C programs in the source tree"
    user_options: ClassVar = [("only=", None, f"some of them, by comma: {','.join(MAKERS)}")]

    def initialize_options(self) -> None:
        self.only: str | None = None

    def finalize_options(self) -> None:
        self.names = self.only.split(",") if self.only else list(MAKERS)
        if unknown := set(self.names) - set(MAKERS):
            raise BuildError(f"artefacts doesn't know {', '.join(sorted(unknown))}; it makes {', '.join(MAKERS)}")

    def run(self) -> None:
        for name in self.names:
            MAKERS[name]()


class BuildPackages(build_py):
    def run(self) -> None:
        self.run_command("artefacts")
        super().run()


class Binary(Distribution):
    def has_ext_modules(self) -> bool:
        """The wheel carries programs, so it belongs to this machine's platform."""
        return True


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3, for it extends no interpreter; this platform only."""
        return "py3", "none", super().get_tag()[2]


setup(distclass=Binary, cmdclass={"artefacts": Artefacts, "build_py": BuildPackages, "bdist_wheel": Wheel})
