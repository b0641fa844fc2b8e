"""The daemon's own socket (api/control.proto), and what it answers there. `status.py` asks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import aio

from criproxy.api import control_pb2 as api
from criproxy.cri.listen import listen
from criproxy.node import Node
from criproxy.record import State
from criproxy.sandbox import Member

_SERVICE = api.DESCRIPTOR.services_by_name["Control"].full_name


@contextlib.asynccontextmanager
async def serve(path: Path, node: Node) -> AsyncIterator[None]:
    """Answers at `path` from what the node knows, until the block ends. Raises ListenError."""

    async def status(request: api.StatusRequest, context: object) -> api.StatusResponse:
        return _status(node)

    methods = {
        "Status": grpc.unary_unary_rpc_method_handler(
            status,
            request_deserializer=api.StatusRequest.FromString,
            response_serializer=api.StatusResponse.SerializeToString,
        )
    }
    server = aio.server(handlers=[grpc.method_handlers_generic_handler(_SERVICE, methods)])
    listening = await listen(server, path)
    try:
        yield
    finally:
        listening.remove()
        await server.stop(grace=1)


def _status(node: Node) -> api.StatusResponse:
    members = sorted(node.members(), key=lambda m: (m.record.namespace, m.record.pod, m.record.name))
    return api.StatusResponse(containers=[_container(m) for m in members if m.record.state is not State.EXITED])


def _container(member: Member) -> api.ContainerStatus:
    record = member.record
    answer = api.ContainerStatus(
        namespace=record.namespace,
        pod=record.pod,
        container=record.name,
        container_id=record.id,
        state=record.state.value,
        since=_timestamp(record.since),
        checkpoint_bytes=record.checkpoint_bytes,
        checkpoints=record.checkpoints,
        restores=record.restores,
        last_checkpoint_seconds=record.last_checkpoint_seconds,
        last_restore_seconds=record.last_restore_seconds,
        reason=record.reason,
        tier=record.tier,
    )
    if member.container is not None:
        # Packets are timed by the kernel's monotonic clock, people want the time of day.
        answer.last_activity.CopyFrom(_timestamp(time.time() - (time.monotonic() - member.container.last_activity())))
        answer.memory_bytes = member.container.memory()
        if record.state is State.SCALED_DOWN and record.awake_bytes:
            answer.freed_bytes = max(0, record.awake_bytes - answer.memory_bytes)
        answer.reason = member.container.reason()
    if member.gate is not None:
        counters = member.gate.counters()
        answer.parking.CopyFrom(
            api.Parking(
                packets=counters.parked,
                bytes=counters.parked_bytes,
                overflowed=counters.overflowed,
                dropped=counters.dropped,
                quiet=counters.quiet,
                answered=counters.answered,
                corrupt=member.gate.corrupt,
            )
        )
    return answer


def _timestamp(seconds: float) -> Timestamp:
    return Timestamp(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
