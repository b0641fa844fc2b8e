"""What the daemon is told: flags over the configuration file over defaults, in one `Config`.

The file is TOML with the flags' names as its keys (`state-dir = "/var/lib/criproxy"`; an underscore does as well).
Each field's metadata holds all there is to know about its setting, so that flag, key, check and help can't differ.
"""

# ruff: noqa: RUF009 (`_setting` is `dataclasses.field` with that metadata, which the rule would allow)

from __future__ import annotations

import argparse
import dataclasses
import difflib
import ipaddress
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from criproxy import log
from criproxy.annotations import BadValue, nanoseconds
from criproxy.policy import DEFAULT_DURATION

DEFAULT_CONFIG = Path("/etc/criproxy/config.toml")
# sun_path of a Unix socket's address has 108 bytes, the last of which is a NUL (unix(7)).
_LONGEST_SOCKET_PATH = 107
MAX_ADDRESSES = 64
"""As many as kubelet.h has room for."""


class ConfigError(Exception):
    """A setting that can't be used: a sentence that names it, its value and what would be right."""


class _BadValue(ValueError):
    """Why one value is refused, then what would be right."""


# --- Values ----------------------------------------------------------------------------------------------------
# Each takes what the file (any TOML type) or a flag (a string) gave.


def _path(value: object) -> Path:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise _BadValue("is no absolute path, such as /var/lib/criproxy")
    return Path(value)


def _socket(value: object) -> Path:
    """gRPC's forms unix:///a/b and unix:/a/b, and the plain path."""
    text = value.removeprefix("unix:") if isinstance(value, str) else ""
    if text.startswith("//"):
        text = text.removeprefix("//")
    if not text.startswith("/") or text.endswith("/") or "\0" in text:
        raise _BadValue("is no Unix socket; the form is unix:///run/criproxy/criproxy.sock")
    if len(text.encode()) > _LONGEST_SOCKET_PATH:
        raise _BadValue(f"is too long for a Unix socket; its path may have {_LONGEST_SOCKET_PATH} bytes")
    return Path(text)


def _level(value: object) -> str:
    if value not in log.LEVELS:
        raise _BadValue(f"is none of {', '.join(log.LEVELS)}")
    return str(value)


def _number(value: object, whole: bool) -> float:
    try:
        # bool is an int to Python, and `true` no number to anyone else.
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError
        number = int(value) if whole and isinstance(value, (str, int)) else float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (whole and number != int(number)):
        raise _BadValue(f"is no {'whole ' if whole else ''}number")
    return number


def _percent(value: object) -> float:
    number = _number(value, whole=False)
    # More than 100 is right on a machine with more than one core.
    if number <= 0:
        raise _BadValue("must be above 0; 100 is one whole core")
    return number


def _count(value: object) -> int:
    number = int(_number(value, whole=True))
    if number < 1:
        raise _BadValue("must be 1 or more")
    return number


_SIZES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def _size(value: object) -> int:
    """A whole number of bytes, or a string such as "4MiB"."""
    if isinstance(value, str):
        for suffix, factor in _SIZES.items():
            if value.endswith(suffix):
                return _count(value.removesuffix(suffix).rstrip()) * factor
    try:
        return _count(value)
    except _BadValue as error:
        raise _BadValue(f'{error}; give bytes, or a size such as "4MiB"') from None


def _cgroup(value: object) -> str | None:
    """A path below the root of the cgroup v2 tree, without the slash in front; None: not given."""
    if value == "":
        return None
    if not isinstance(value, str) or ".." in value.split("/") or "\0" in value:
        raise _BadValue("is no path below the root of cgroup v2, such as system.slice/kubelet.service")
    if not value.strip("/"):
        raise _BadValue("is the root cgroup, which has every process of the node")
    return value.strip("/")


def _process(value: object) -> str:
    # /proc/PID/comm has 15 bytes of a longer name (proc_pid_comm(5)).
    if not isinstance(value, str) or not value or "/" in value or len(value.encode()) > 15:
        raise _BadValue("is no name of a process as /proc/PID/comm has it, such as kubelet: 1 to 15 bytes, no slash")
    return value


def _addresses(value: object) -> tuple[str, ...]:
    """A list of IP addresses, or a string with commas between them."""
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, list):
        raise _BadValue('is no list of IP addresses, such as "10.0.0.1,fd00::1"')
    found = []
    for word in words:
        try:
            if str(word).strip():
                found.append(str(ipaddress.ip_address(str(word).strip())))
        except ValueError:
            raise _BadValue(f'has "{word}", which is no IP address; the form is "10.0.0.1,fd00::1"') from None
    if len(found) > MAX_ADDRESSES:
        raise _BadValue(f"has {len(found)} addresses; there may be {MAX_ADDRESSES}")
    return tuple(found)


def _duration(value: object) -> float:
    """Seconds from a Go duration, as in the annotation."""
    try:
        # TOML's bare 0 and 60 are left to the parser, which says what they lack.
        duration = nanoseconds(str(value))
    except BadValue as error:
        raise _BadValue(str(error)) from None
    if duration < 0:
        raise _BadValue('is negative; "0" never scales down')
    return duration / 1e9


# --- The settings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setting:
    parse: Callable[[object], Any]
    metavar: str
    help: str
    # How the default reads in help.
    shown: str


def _setting(default: Any, parse: Callable[[object], Any], metavar: str, help: str, shown: str | None = None) -> Any:
    setting = _Setting(parse, metavar, help, str(default) if shown is None else shown)
    return dataclasses.field(default=default, metadata={"setting": setting})


@dataclass(frozen=True)
class Config:
    """Every setting of the daemon. Sockets are paths without `unix://`; times in seconds, sizes in bytes."""

    listen: Path = _setting(
        Path("/run/criproxy/criproxy.sock"),
        _socket,
        "ENDPOINT",
        "the socket kubelet talks to; its folder also holds the daemon's other run-time files",
        "unix:///run/criproxy/criproxy.sock",
    )
    runtime_endpoint: Path = _setting(
        Path("/run/containerd/containerd.sock"),
        _socket,
        "ENDPOINT",
        "containerd's socket",
        "unix:///run/containerd/containerd.sock",
    )
    control: Path = _setting(
        Path("/run/criproxy/control.sock"),
        _socket,
        "ENDPOINT",
        "the socket that `criproxy status` and the other commands talk to",
        "control.sock beside --listen",
    )
    state_dir: Path = _setting(
        Path("/var/lib/criproxy"), _path, "FOLDER", "where checkpoints, bundles and the state of containers are kept"
    )
    log_level: str = _setting("info", _level, "LEVEL", f"what is logged: {', '.join(log.LEVELS)}")
    cpu_activity_percent: float = _setting(
        5.0, _percent, "PERCENT", "a container that uses more than this much of one core counts as active", "5"
    )
    parking_packets: int = _setting(
        1024, _count, "N", "packets kept for a container that is scaled down; what comes after is dropped"
    )
    parking_bytes: int = _setting(4 << 20, _size, "SIZE", "bytes kept for a container that is scaled down", "4MiB")
    scaledown_duration: float = _setting(
        DEFAULT_DURATION,
        _duration,
        "DURATION",
        "idle time before a scale-down for pods that don't give their own",
        "1m",
    )
    criu_root: Path = _setting(
        Path("/"), _path, "FOLDER", "the root whose CRIU and libraries are used: / for this machine's own"
    )
    kubelet_cgroup: str | None = _setting(
        None,
        _cgroup,
        "PATH",
        "the cgroup of kubelet, whose probes are known by it: a path below the root of cgroup v2",
        "found by the names of the services of kubelet, k3s and rke2",
    )
    kubelet_process: str = _setting(
        "kubelet", _process, "NAME", "the process whose cgroup it is, where no such service is found"
    )
    kubelet_addresses: tuple[str, ...] = _setting(
        (),
        _addresses,
        "ADDRESSES",
        "IP addresses that are taken for kubelet's wherever they come from: a last resort",
        "none",
    )

    @property
    def run_dir(self) -> Path:
        """The folder of run-time files: that of `listen`."""
        return self.listen.parent


_SETTINGS: Mapping[str, _Setting] = {field.name: field.metadata["setting"] for field in dataclasses.fields(Config)}


def _flag(name: str) -> str:
    return name.replace("_", "-")


# --- Reading ---------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds --config and a flag for each setting, or for those of `Config`'s fields that are named.

    Values are checked by `load`, which says what would be right.
    """
    parser.add_argument(
        "--config", metavar="FILE", help=f"the configuration file (default: {DEFAULT_CONFIG}, which may be absent)"
    )
    for name in names or _SETTINGS:
        setting = _SETTINGS[name]
        parser.add_argument(
            f"--{_flag(name)}",
            metavar=setting.metavar,
            help=f"{setting.help} (default: {setting.shown})".replace("%", "%%"),
        )


def load(args: argparse.Namespace) -> Config:
    """The settings from flags (of a parser that went through `add_arguments`), file and defaults.

    Raises `ConfigError`, also for a file that was named and isn't there.
    """
    values = read(Path(args.config)) if args.config is not None else read(DEFAULT_CONFIG, optional=True)
    for name, setting in _SETTINGS.items():
        given = getattr(args, name, None)
        if given is not None:
            values[name] = _parse(f"--{_flag(name)}", setting, given)
    return _complete(values)


def read(file: Path, *, optional: bool = False) -> dict[str, Any]:
    """The checked settings that a file gives, by the names of `Config`'s fields. Raises `ConfigError`."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        if optional:
            return {}
        raise ConfigError(f"{file}: there is no such configuration file; --config names another") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8"
        raise ConfigError(f"{file}: the configuration file can't be read: {reason}") from None
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: the configuration file isn't TOML: {error}") from None
    values: dict[str, Any] = {}
    for key, value in document.items():
        name = key.replace("-", "_")
        if name not in _SETTINGS:
            near = difflib.get_close_matches(name, _SETTINGS, 1)
            hint = f"did you mean {_flag(near[0])}?" if near else f"there are {', '.join(map(_flag, _SETTINGS))}"
            raise ConfigError(f"{file}: {key} is no setting; {hint}")
        if name in values:
            raise ConfigError(f"{file}: {_flag(name)} is given twice, once with an underscore; remove one")
        values[name] = _parse(f"{file}: {key}", _SETTINGS[name], value)
    return values


def _parse(where: str, setting: _Setting, value: object) -> Any:
    try:
        return setting.parse(value)
    except _BadValue as error:
        raise ConfigError(f'{where}: "{value}" {error}') from None


def _complete(values: dict[str, Any]) -> Config:
    """Fills in what depends on other settings, and checks what only shows when all are known."""
    if "control" not in values and "listen" in values:
        values["control"] = values["listen"].with_name("control.sock")
    config = Config(**values)
    sockets = {"listen": config.listen, "runtime-endpoint": config.runtime_endpoint, "control": config.control}
    for name, path in sockets.items():
        for other, same in sockets.items():
            if name < other and path == same:
                raise ConfigError(f"{name} and {other} are both {path}; each needs a socket of its own")
    return config
