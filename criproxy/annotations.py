"""A pod's annotations, read into a `Policy`.

Keys stand under `criproxy.io/`; those that ctrox/zeropod has work under `zeropod.ctrox.dev/` too, with the meaning,
the defaults and the value formats of its `api/shim/v1/config.go` (November 2026). Where both are set, ours wins, key
by key. An empty value is as good as none, as there.

The tables `KEYS` and `IGNORED` are all there is to know about keys: they drive the parser, its errors, and
`python -m criproxy.annotations`, which prints them as the Markdown of the README.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from criproxy.policy import (
    DEFAULT_DURATION,
    DEFAULT_REQUEST_TIMEOUT,
    HANDLER,
    Answers,
    Clock,
    Connections,
    Init,
    Lazy,
    OnStop,
    Policy,
    Port,
    Tier,
)

OURS = "criproxy.io/"
ZEROPOD = "zeropod.ctrox.dev/"
PREFIXES = (OURS, ZEROPOD)

T = TypeVar("T")


class PolicyError(Exception):
    """An annotation that can't be accepted: a sentence that names it, its value and what would be right."""


class BadValue(ValueError):
    """Raised by the parser of one value: why it is refused, then what would be right; annotation and value are added
    by whoever knows them."""


# --- Values ----------------------------------------------------------------------------------------------------

_UNITS = {
    "ns": 1,
    "us": 1_000,
    "\u00b5s": 1_000,  # the micro sign
    "\u03bcs": 1_000,  # the Greek letter mu
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_TERM = re.compile(r"([0-9]*)(?:(\.)([0-9]*))?([^0-9.]*)")
_DURATION_HINT = 'give a Go duration such as "90s", "1m30s" or "500ms", or "0" for never'


def nanoseconds(value: str) -> int:
    """A duration in nanoseconds, read as Go's `time.ParseDuration` reads it, its roundings included.

    Raises `BadValue` for everything which that refuses.
    """
    negative, rest = value.startswith("-"), value[1:] if value[:1] in ("-", "+") else value
    if rest == "0":
        return 0
    if not rest:
        raise BadValue(f"is no duration; {_DURATION_HINT}")
    total = 0
    while rest:
        match = _TERM.match(rest)
        assert match is not None  # every part of it may be empty
        whole, _, fraction, unit = match.groups()
        if not whole and not fraction:
            raise BadValue(f"is no duration; {_DURATION_HINT}")
        if not unit:
            raise BadValue(f'lacks a unit; "{value}s" would be seconds, "{value}m" minutes, and "0" is never')
        if unit not in _UNITS:
            raise BadValue(f'has the unknown unit "{unit}"; {_DURATION_HINT}')
        total += int(whole or "0") * _UNITS[unit] + _fraction(fraction or "", _UNITS[unit])
        rest = rest[match.end() :]
    # Go keeps nanoseconds in a signed 64-bit number.
    if total > (1 << 63) - (0 if negative else 1):
        raise BadValue("is longer than the 292 years a Go duration can hold")
    return -total if negative else total


def _fraction(digits: str, unit: int) -> int:
    """Digits behind the point in nanoseconds; those past 63 bits are dropped and the product is made in floating
    point, as Go does, so that the last nanosecond is the same."""
    value, scale = 0, 1.0
    for digit in digits:
        if value > ((1 << 63) - 1) // 10 or value * 10 + int(digit) > 1 << 63:
            break
        value = value * 10 + int(digit)
        scale *= 10
    return int(float(value) * (float(unit) / scale))


def _duration(value: str) -> float:
    result = nanoseconds(value)
    if result < 0:
        raise BadValue(f"is negative; {_DURATION_HINT}")
    return result / 1e9


def _boolean(value: str) -> bool:
    """As Go's `strconv.ParseBool`."""
    if value in ("1", "t", "T", "TRUE", "true", "True"):
        return True
    if value in ("0", "f", "F", "FALSE", "false", "False"):
        return False
    raise BadValue('is neither "true" nor "false"')


# Kubernetes' rule for the name of a container (RFC 1123).
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")


def _container_name(name: str) -> str:
    if not _LABEL.match(name):
        raise BadValue(f'holds "{name}", which can\'t be the name of a container: lower-case letters, digits and "-"')
    return name


def _container_names(value: str) -> frozenset[str]:
    names = frozenset(_container_name(part.strip()) for part in value.split(",") if part.strip())
    if not names:
        raise BadValue('names no container; give names with commas between, such as "web,worker", or nothing for all')
    return names


_PORT_LIST_HINT = 'give port numbers with commas between, such as "9100,9102"'
_PORTS_HINT = 'the form is "name=80,81;other=8080"'


def _ports_map(value: str) -> dict[str, frozenset[Port]]:
    result: dict[str, frozenset[Port]] = {}
    owner: dict[Port, str] = {}
    for part in value.split(";"):
        if not part.strip():
            continue
        name, equals, numbers = (piece.strip() for piece in part.partition("="))
        if not equals or not name or "=" in numbers:
            raise BadValue(f'holds "{part.strip()}"; {_PORTS_HINT}')
        ports = frozenset(_port(number.strip(), _PORTS_HINT) for number in numbers.split(",") if number.strip())
        if not ports:
            raise BadValue(f'gives no port for "{name}"; {_PORTS_HINT}')
        result[_container_name(name)] = result.get(name, frozenset()) | ports
        for port in sorted(ports):
            if owner.setdefault(port, name) != name:
                raise BadValue(
                    f'gives port {port} to both "{owner[port]}" and "{name}"; the containers of a pod share its '
                    "addresses, so only one of them can listen there"
                )
    if not result:
        raise BadValue(f"gives no port; {_PORTS_HINT}")
    return result


def _port_list(value: str) -> frozenset[Port]:
    ports = frozenset(_port(number.strip(), _PORT_LIST_HINT) for number in value.split(",") if number.strip())
    if not ports:
        raise BadValue(f"gives no port; {_PORT_LIST_HINT}")
    return ports


def _port(text: str, hint: str) -> Port:
    number, slash, name = text.partition("/")
    protocols: dict[str, Literal["tcp", "udp"]] = {"tcp": "tcp", "udp": "udp"}
    proto = protocols.get(name.lower() if slash else "tcp")
    if proto is None:
        raise BadValue(f'holds the port "{text}" of an unknown protocol; only tcp (80) and udp (53/udp) can wake')
    if not (number.isascii() and number.isdigit() and 1 <= int(number) <= 65535):
        raise BadValue(f'holds "{text}", which is no port: a number from 1 to 65535; {hint}')
    return Port(proto, int(number))


def _one_of(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in allowed:
            hint = difflib.get_close_matches(value.lower(), allowed, 1)
            raise BadValue(f"is none of {', '.join(allowed)}" + (f'; did you mean "{hint[0]}"?' if hint else ""))
        return value

    return parse


# --- Keys ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key(Generic[T]):
    """A key with a meaning. `zeropod` tells whether it works under zeropod's prefix; the rest is for the docs."""

    name: str
    parse: Callable[[str], T]
    zeropod: bool
    values: str
    default: str
    meaning: str


CONTAINER_NAMES = Key(
    "container-names",
    _container_names,
    True,
    "names with commas between: `web,worker`",
    "all",
    "The containers that are scaled down.",
)
PORTS_MAP = Key(
    "ports-map",
    _ports_map,
    True,
    "`name=80,81;other=8080`",
    "found from the sockets a container listens on",
    "The ports at which a packet wakes the container of that name. Needed in the host's network (`hostNetwork`).",
)
SCALEDOWN_DURATION = Key(
    "scaledown-duration",
    _duration,
    True,
    "a Go duration: `90s`, `1m30s`, `500ms`; `0` = never",
    "`1m`",
    "How long a container must be idle before it is scaled down.",
)
DISABLE_CHECKPOINTING = Key(
    "disable-checkpointing",
    _boolean,
    True,
    "`true`, `false`",
    "`false`",
    "No checkpoint. Under `zeropod.ctrox.dev/` the application is ended when it is scaled down and started afresh at "
    "the wake, as zeropod does; under `criproxy.io/` it is the same as `tier: freeze`.",
)
TIER = Key(
    "tier",
    _one_of("auto", "checkpoint", "freeze"),
    False,
    "`auto`, `checkpoint`, `freeze`",
    "`auto`",
    "How a container is scaled down. `freeze`: its processes stay and are stopped by the kernel's cgroup freezer, and "
    "their memory is reclaimed as far as the kernel allows (without swap, file pages only). `auto`: a checkpoint where "
    "one is possible, else the freezer. `checkpoint`: a checkpoint, or the container stays up, with the reason.",
)
INIT = Key(
    "init",
    _one_of(*Init),
    False,
    "`auto`, `always`, `never`",
    "`auto`",
    "Whether PID 1 of the container becomes criproxy's init, without which there is no checkpoint but the freezer. "
    "`auto`: unless the image's entrypoint is known to insist on being PID 1 itself (s6-overlay, systemd), or the pod "
    "has an AppArmor profile of its own, which may not let the init run.",
)
LAZY_PAGES = Key(
    "lazy-pages",
    _one_of(*Lazy),
    False,
    "`auto`, `always`, `never`",
    "`auto`",
    "Whether a woken application runs before its memory is back: a page that it touches is loaded at once, all others "
    "meanwhile, so that the wake takes the same time whatever the size. `auto`: when that pays, from 16 MiB on, unless "
    "processes share much memory since a fork (each would get a copy of its own).",
)
QUIET_PORTS = Key(
    "quiet-ports",
    _port_list,
    False,
    "`9100,9102`",
    "none",
    "Ports of the pod whose traffic (a metrics scrape) neither wakes a container nor counts as activity. While it is "
    "scaled down, what comes in there is dropped, as if the network had lost it.",
)
REQUEST_TIMEOUT = Key(
    "request-timeout",
    _duration,
    False,
    "a Go duration; `0` = it isn't looked at",
    "`10m`",
    "How long a request that has had no answer yet (the last payload of a connection came from the client), or data "
    "that the application hasn't read, keeps a container from being scaled down.",
)
CONNECTIONS = Key(
    "connections",
    _one_of(*Connections),
    False,
    "`preserve`, `close`",
    "`preserve`",
    "Established connections live on across checkpoints, or are closed by them: peers get the end of the connection, "
    "as if the application had closed it, and the application finds it closed when it is back.",
)
CLOCK = Key(
    "clock",
    _one_of(*Clock),
    False,
    "`stop`, `continue`",
    "`stop`",
    "Whether the monotonic clock stands still for the application while it is in a checkpoint, so that no watchdog or "
    "time limit of its own expires by the sleep, or goes on, so that it knows that a lease or session of its own has "
    "ended. The time of day goes on either way.",
)
PROBES = Key(
    "probes",
    _one_of(*Answers),
    False,
    "`answer`, `wake`",
    "`answer`",
    "kubelet's probes of a container that is scaled down are answered as the application answered them last. This is "
    "for those whose answers can't be seen (HTTPS): `answer` takes them for good, `wake` lets the application say.",
)
ON_STOP = Key(
    "on-stop",
    _one_of(*OnStop),
    False,
    "`restore`, `kill`",
    "`restore`",
    "What becomes of a container that is to stop while it is scaled down. `restore`: it is brought back first and gets "
    "its stop signal, so that it can save its state in the grace period; if it can't be brought back, it is killed. "
    "`kill`: it is killed as it is, and what it had only in its memory is lost.",
)
KEYS: tuple[Key[Any], ...] = (
    CONTAINER_NAMES, PORTS_MAP, SCALEDOWN_DURATION, DISABLE_CHECKPOINTING, TIER, INIT, LAZY_PAGES, QUIET_PORTS,
    REQUEST_TIMEOUT, CONNECTIONS, CLOCK, PROBES, ON_STOP,
)  # fmt: skip

# zeropod's keys that are accepted and mean nothing here: what each does there, and why it isn't needed or done.
IGNORED: Mapping[str, tuple[str, str]] = {
    "pre-dump": ("Copies memory once before the freeze (default `false`).", "A way to speed a dump up, not a wish."),
    "migrate": (
        "Containers (with commas between) whose checkpoint is fetched by the pod's successor on another node.",
        "Checkpoints don't travel yet.",
    ),
    "live-migrate": ("The one container that moves while it runs.", "Checkpoints don't travel yet."),
    "disable-migrate-data": ("Leaves the container's files behind in a migration.", "Checkpoints don't travel yet."),
    "disable-probe-detection": (
        "kubelet's probes wake the container.",
        "They are told from other connections by who makes them, so nothing goes wrong that one could want to avoid.",
    ),
    "probe-buffer-size": (
        "Bytes read of a connection to know a probe (default 1024).",
        "A probe is read until it is known.",
    ),
    "proxy-timeout": (
        "Cuts a connection that woke the container after this time (default `5s`).",
        "The client talks to the application itself: there is nothing to cut.",
    ),
    "connect-timeout": ("How long the proxy waits for the restore (default `5s`).", "There is no proxy to wait."),
}


# --- Reading ---------------------------------------------------------------------------------------------------


def policy_of(
    annotations: Mapping[str, str], runtime_handler: str, *, default_duration: float = DEFAULT_DURATION
) -> Policy | None:
    """The policy of a pod with these annotations, or None if it didn't opt in.

    A pod opts in by any key of `KEYS` or `IGNORED` under its prefix, or by the runtime handler `zeropod`.
    `default_duration` in seconds stands in where the pod gives no `scaledown-duration`.

    Raises `PolicyError` for an unknown key under `criproxy.io/` and for a bad value under either prefix.
    """
    ours = {key.removeprefix(OURS): value for key, value in annotations.items() if key.startswith(OURS)}
    theirs = {key.removeprefix(ZEROPOD): value for key, value in annotations.items() if key.startswith(ZEROPOD)}
    for name in sorted(ours):
        _check_known(name)  # never longer than the 316 characters that Kubernetes allows
    shared = {key.name for key in KEYS if key.zeropod}
    if not ours and not theirs.keys() & (shared | IGNORED.keys()) and runtime_handler != HANDLER:
        return None
    duration = _read(SCALEDOWN_DURATION, ours, theirs)
    ports = _read(PORTS_MAP, ours, theirs)
    timeout = _read(REQUEST_TIMEOUT, ours, {})
    return Policy(
        duration=default_duration if duration is None else duration,
        container_names=_read(CONTAINER_NAMES, ours, theirs),
        ports={} if ports is None else ports,
        tier=_tier(ours, theirs),
        init=Init(_read(INIT, ours, theirs) or Init.AUTO),
        lazy_pages=Lazy(_read(LAZY_PAGES, ours, theirs) or Lazy.AUTO),
        quiet_ports=_quiet_ports(ours, ports or {}),
        request_timeout=DEFAULT_REQUEST_TIMEOUT if timeout is None else timeout,
        connections=Connections(_read(CONNECTIONS, ours, {}) or Connections.PRESERVE),
        clock=Clock(_read(CLOCK, ours, {}) or Clock.STOP),
        probes=Answers(_read(PROBES, ours, {}) or Answers.ANSWER),
        on_stop=OnStop(_read(ON_STOP, ours, {}) or OnStop.RESTORE),
        ignored=tuple(ZEROPOD + name for name in sorted(theirs) if name not in shared),
    )


def _check_known(name: str) -> None:
    known = [key.name for key in KEYS]
    if name in known:
        return
    near = difflib.get_close_matches(name.lower().replace("_", "-"), known, 1)
    if near:
        hint = f"did you mean {OURS}{near[0]}?"
    elif name in IGNORED:
        hint = f"zeropod's {ZEROPOD}{name} has no counterpart; remove the annotation"
    else:
        hint = f"the known ones are {', '.join(known)}"
    raise PolicyError(f"{OURS}{name} is no annotation that criproxy knows; {hint}")


def _read(key: Key[T], ours: Mapping[str, str], theirs: Mapping[str, str]) -> T | None:
    """The value of a key from whichever prefix counts; None where neither gives one."""
    for prefix, values in ((OURS, ours), (ZEROPOD, theirs if key.zeropod else {})):
        value = values.get(key.name)
        if value:
            try:
                return key.parse(value)
            except BadValue as error:
                reason = _shortened(str(error), 400)
                raise PolicyError(f'{prefix}{key.name}: "{_shortened(value)}" {reason}') from None
    return None


def _shortened(text: str, longest: int = 80) -> str:
    """Annotations may be 256 KiB long, and the sentence ends up in an event of the pod."""
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _quiet_ports(ours: Mapping[str, str], ports: Mapping[str, frozenset[Port]]) -> frozenset[Port]:
    quiet = _read(QUIET_PORTS, ours, {}) or frozenset()
    for name, named in ports.items():
        if both := quiet & named:
            raise PolicyError(
                f'{OURS}{QUIET_PORTS.name}: "{_shortened(ours[QUIET_PORTS.name])}" has {min(both)}, at which '
                f'{PORTS_MAP.name} says that a packet wakes "{name}"; remove it from one of the two'
            )
    return quiet


def _tier(ours: Mapping[str, str], theirs: Mapping[str, str]) -> Tier:
    tier, freeze = _read(TIER, ours, {}), _read(DISABLE_CHECKPOINTING, ours, {})
    if tier == "checkpoint" and freeze:
        raise PolicyError(
            f'{OURS}{TIER.name}: "checkpoint" contradicts {OURS}{DISABLE_CHECKPOINTING.name}: "true"; remove one'
        )
    if tier == "freeze" or freeze:
        return Tier.FREEZE
    if tier is None and freeze is None and _read(DISABLE_CHECKPOINTING, {}, theirs):
        return Tier.RESTART
    return Tier.CHECKPOINT if tier == "checkpoint" else Tier.AUTO


# --- Docs ------------------------------------------------------------------------------------------------------


def markdown() -> str:
    """The tables as Markdown."""
    lines = ["| Annotation | Values | Default | Meaning |", "|---|---|---|---|"]
    for key in KEYS:
        names = f"`{OURS}{key.name}`" + (f"<br>`{ZEROPOD}{key.name}`" if key.zeropod else "")
        lines.append(f"| {names} | {key.values} | {key.default} | {key.meaning} |")
    lines += ["", "| Accepted without meaning | What zeropod does | Why not here |", "|---|---|---|"]
    lines += [f"| `{ZEROPOD}{name}` | {there} | {here} |" for name, (there, here) in IGNORED.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
