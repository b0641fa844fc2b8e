"""Takes CRIU from another Debian release than the machine's own, without installing them.

This machine's own package sources name the mirror; apt fetches and verifies (with Debian's keys) as ever, but with a
private state: the machine's package lists, cache and installed packages are neither read nor changed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from criproxy import run

_KEYRINGS: Final = tuple(Path(f"/usr/share/keyrings/debian-archive-keyring.{ending}") for ending in ("pgp", "gpg"))

_PACKAGE: Final = "criu"

# Seconds for each of apt's steps: a slow mirror is no error, a dead one should be.
_TIMEOUT: Final = 600


class DownloadError(Exception):
    """The packages couldn't be had. The text is a sentence for people, with a hint."""


def download(suite: str, into: Path, *, say: Callable[[str], object] = print) -> None:
    """Unpacks CRIU of a Debian release (`trixie`, `sid`) and all that it depends on into the folder `into`.

    If `into` is there, it is complete, and nothing is done. Raises DownloadError if this isn't a Debian machine, if the
    signatures don't hold or if the mirror can't be reached.
    """
    if into.is_dir():
        return
    mirror = _mirror()
    keyring = next((path for path in _KEYRINGS if path.exists()), None)
    if keyring is None:
        raise DownloadError("Debian's keys are missing. Install debian-archive-keyring.")
    into.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{into.name}-", dir=into.parent))
    try:
        work.chmod(0o755)  # apt downloads as a user of its own
        options = _private(work, f"deb [signed-by={keyring}] {mirror} {suite} main\n")
        try:
            say(f"Reading the package list of Debian {suite} from {urlsplit(mirror).hostname or mirror}")
            run.run(["apt-get", *options, "-q", "update"], env=_environment(), timeout=_TIMEOUT).check()
            say(f"Fetching {_PACKAGE} and its libraries")
            get = ["apt-get", *options, "-q", "-y", "--no-install-recommends", "--download-only", "install", _PACKAGE]
            run.run(get, env=_environment(), timeout=_TIMEOUT).check()
            packages = sorted((work / "cache/archives").glob("*.deb"))
            say(f"Unpacking {len(packages)} packages")
            for archive in packages:
                run.run(["dpkg-deb", "-x", archive, work / "root"], timeout=_TIMEOUT).check()
        except run.CommandError as error:
            # apt's own words: the command line is nobody's business.
            words = error.completed.stderr.decode(errors="replace").strip() if error.completed else ""
            said = words.splitlines()[-1] if words else str(error)
            raise DownloadError(f"{_PACKAGE} of Debian {suite} can't be fetched from {mirror}: {said}") from error
        if not packages:
            raise DownloadError(f"{_PACKAGE} of Debian {suite} wasn't fetched, although apt reported no error.")
        os.sync()
        (work / "root").rename(into)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _mirror() -> str:
    """The URI of Debian's own archive (not of its security updates) in this machine's package sources."""
    listing = "$(REPO_URI)\t$(ORIGIN)\t$(LABEL)"
    try:
        lines = run.run(["apt-get", "indextargets", "--format", listing], timeout=60).check().stdout.decode()
    except run.CommandError as error:
        raise DownloadError(f"{error}. Only on Debian can CRIU be downloaded: elsewhere give --criu-root.") from error
    targets = [line.split("\t") for line in lines.splitlines()]
    # Before the first `apt-get update` of a machine nothing is known about a source but its URI.
    for uri, *kind in targets:
        if kind == ["Debian", "Debian"]:
            return uri
    for uri, *_kind in targets:
        if uri.rstrip("/").endswith("/debian"):
            return uri
    raise DownloadError("There is no Debian archive among this machine's package sources. Give --criu-root instead.")


def _private(work: Path, sources: str) -> list[str]:
    """Options that keep apt to `work`; what /etc/apt/apt.conf says about proxies and the like still holds."""
    for name in ("state/lists/partial", "cache/archives/partial", "root"):
        (work / name).mkdir(parents=True)
    (work / "sources.list").write_text(sources)
    (work / "status").touch()
    settings = {
        "Dir::State": work / "state",
        "Dir::State::status": work / "status",
        "Dir::Cache": work / "cache",
        "Dir::Etc::sourcelist": work / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::Log": work,
        "Acquire::Languages": "none",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
        "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled": "false",
        "APT::Architectures": run.run(["dpkg", "--print-architecture"]).check().stdout.decode().strip(),
    }
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]


def _environment() -> dict[str, str]:
    return {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}


__all__ = ["DownloadError", "download"]
