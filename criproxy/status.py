"""`criproxy status`: asks the daemon (api/control.proto), and shows what it knows.

A person waits for it: it imports nothing of the daemon.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import grpc

from criproxy.api import control_pb2 as api

TIMEOUT: Final = 10.0
"""Seconds that the command waits for the daemon."""

_HEADINGS: Final = (
    "NAMESPACE",
    "POD",
    "CONTAINER",
    "STATE",
    "TIER",
    "SINCE",
    "ACTIVITY",
    "MEMORY",
    "FREED",
    "CHECKPOINT",
    "CYCLES",
    "RESTORE",
    "REASON",
)


class NoAnswer(Exception):
    """The daemon can't be asked. A sentence for people, with a hint."""


def ask(path: Path) -> list[api.ContainerStatus]:
    """What the daemon whose control socket is at `path` knows of its containers. Raises NoAnswer."""
    with grpc.insecure_channel(f"unix://{path}") as channel:
        call = channel.unary_unary(
            f"/{api.DESCRIPTOR.services_by_name['Control'].full_name}/Status",
            request_serializer=api.StatusRequest.SerializeToString,
            response_deserializer=api.StatusResponse.FromString,
        )
        try:
            return list(call(api.StatusRequest(), timeout=TIMEOUT).containers)
        except grpc.RpcError as error:
            raise NoAnswer(
                f"The daemon doesn't answer at {path}: {error.details()}. Is it running (systemctl status criproxy), "
                "and is this its --control socket?"
            ) from None


def as_json(containers: Sequence[api.ContainerStatus]) -> str:
    """A list of objects. Times in seconds since the epoch, null where there is nothing to tell."""
    return json.dumps([_object(c) for c in containers], indent=1)


def as_table(containers: Sequence[api.ContainerStatus]) -> str:
    """For people."""
    if not containers:
        return "No pod has opted in."
    rows = [_HEADINGS, *(_row(_object(c)) for c in containers)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _object(container: api.ContainerStatus) -> dict[str, Any]:
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
        "freed_bytes": optional("freed_bytes"),
        "checkpoint_bytes": optional("checkpoint_bytes"),
        "checkpoints": container.checkpoints,
        "restores": container.restores,
        "last_checkpoint_seconds": optional("last_checkpoint_seconds"),
        "last_restore_seconds": optional("last_restore_seconds"),
        "reason": container.reason,
        "parking": parking and {field.name: getattr(parking, field.name) for field in api.Parking.DESCRIPTOR.fields},
    }


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
        _size(container["freed_bytes"]),
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
