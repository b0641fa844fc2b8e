"""The `criproxy` command."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from criproxy import config, daemon, log
from criproxy.api import control_pb2 as api
from criproxy.config import Config, ConfigError
from criproxy.control import ControlError, ask_status
from criproxy.cri.listen import ListenError
from criproxy.criu.bundle import BundleError
from criproxy.kernel.bpf import BpfError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 it failed (the reason is on standard error), 2 the command line is wrong."""
    parser = argparse.ArgumentParser(
        prog="criproxy",
        description="Stateful scale-to-zero for any Kubernetes container: a proxy on the CRI socket that checkpoints "
        "idle containers and restores them on the first packet.",
    )
    parser.add_argument("--version", action="version", version=f"criproxy {version('criproxy')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    serve = commands.add_parser(
        "serve",
        help="serve CRI to kubelet in front of containerd",
        description="Serves CRI to kubelet (kubelet --container-runtime-endpoint=unix:///run/criproxy/criproxy.sock) "
        "in front of containerd. Needs root. Settings come from flags over the configuration file over defaults.",
    )
    config.add_arguments(serve)
    serve.set_defaults(run=_serve)

    status = commands.add_parser(
        "status",
        help="show the containers of pods that opted in",
        description="Shows the containers of pods that opted in: their state, memory, and why one isn't scaled down.",
    )
    config.add_arguments(status, "control", "listen")
    status.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    status.set_defaults(run=_status)

    parsed = parser.parse_args(arguments)
    try:
        result: int = parsed.run(parsed, config.load(parsed))
    except (ConfigError, ControlError, BundleError, BpfError, ListenError, PermissionError) as error:
        print(f"criproxy: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return result


def _serve(_: argparse.Namespace, settings: Config) -> int:
    log.set_up(settings.log_level)
    asyncio.run(daemon.serve(settings))
    return 0


def _status(parsed: argparse.Namespace, settings: Config) -> int:
    containers = ask_status(settings.control)
    if parsed.json:
        print(json.dumps([_as_json(c) for c in containers], indent=1))
    elif not containers:
        print("No pod has opted in.")
    else:
        print(_table(containers))
    return 0


def _as_json(container: api.ContainerStatus) -> dict[str, Any]:
    """One object. Times in seconds since the epoch, null where there is nothing to tell."""

    def optional(name: str) -> Any:
        return getattr(container, name) if container.HasField(name) else None

    def seconds(name: str) -> float | None:
        value = optional(name)
        return None if value is None else round(value.seconds + value.nanos / 1e9, 3)

    parking = optional("parking")
    return {
        "namespace": container.namespace,
        "pod": container.pod,
        "container": container.container,
        "container_id": container.container_id,
        "state": container.state,
        "tier": container.tier,
        "since": seconds("since"),
        "last_activity": seconds("last_activity"),
        "memory_bytes": optional("memory_bytes"),
        "checkpoint_bytes": optional("checkpoint_bytes"),
        "checkpoints": container.checkpoints,
        "restores": container.restores,
        "last_checkpoint_seconds": optional("last_checkpoint_seconds"),
        "last_restore_seconds": optional("last_restore_seconds"),
        "reason": container.reason,
        "parking": parking and {field.name: getattr(parking, field.name) for field in api.Parking.DESCRIPTOR.fields},
    }


_HEADINGS = (
    "NAMESPACE",
    "POD",
    "CONTAINER",
    "STATE",
    "TIER",
    "SINCE",
    "ACTIVITY",
    "MEMORY",
    "CHECKPOINT",
    "CYCLES",
    "RESTORE",
    "REASON",
)


def _table(containers: Sequence[api.ContainerStatus]) -> str:
    rows = [_HEADINGS, *(_row(_as_json(c)) for c in containers)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _row(container: dict[str, Any]) -> tuple[str, ...]:
    restore = container["last_restore_seconds"]
    remarks = [container["reason"]]
    if container["parking"] and (overflowed := container["parking"]["overflowed"]):
        remarks.append(f"the parking was full for {overflowed} packets")
    return (
        container["namespace"],
        container["pod"],
        container["container"],
        container["state"],
        container["tier"] or "-",
        _ago(container["since"]),
        _ago(container["last_activity"]),
        _size(container["memory_bytes"]),
        _size(container["checkpoint_bytes"] or None),
        str(container["restores"]),
        "-" if restore is None else f"{restore * 1e3:.0f} ms",
        "; ".join(filter(None, remarks)) or "-",
    )


def _ago(seconds: float | None) -> str:
    """As kubectl's ages: the largest two units are enough."""
    if seconds is None:
        return "-"
    age = max(0, int(time.time() - seconds))
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if age >= size:
            rest = age % size // part
            return f"{age // size}{unit}{rest}{smaller}" if rest else f"{age // size}{unit}"
    return f"{age}s"


def _size(size: int | None) -> str:
    if size is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024  # type: ignore[assignment]
    return f"{size:.1f} GiB"


if __name__ == "__main__":
    sys.exit(main())
