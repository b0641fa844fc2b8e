"""A gRPC channel to containerd's socket that is as quick as the socket itself.

grpc waits at least 100 ms, and up to two minutes, before it tries a socket again that once refused; until then every
call fails without a look at the socket. kubelet, which sees containerd through us, would take that for a containerd
that is still down. A channel in that state is therefore replaced by a fresh one, which knows of no failure: the first
call after containerd is back succeeds.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import grpc
from grpc import aio

# CRI carries lists and exec output of any size, and runc's errors come whole in the status message.
UNLIMITED: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # What grpc-go, and so containerd, takes by default. The soft limit is the first of the two.
    ("grpc.max_metadata_size", 16 << 20),
    ("grpc.absolute_max_metadata_size", 16 << 20),
)

# How long calls may still run on a channel that was replaced: its connection is gone, so that they can only fail.
_RETIREMENT: Final = 5.0  # seconds


class EndpointError(ValueError):
    """An endpoint that isn't a unix socket's. The text is one sentence for people."""


def socket_path(endpoint: str) -> Path:
    """The path in `unix:///run/x.sock`, `unix:/run/x.sock` or `/run/x.sock`, as kubelet takes them.

    Raises EndpointError for anything else.
    """
    path = endpoint
    if endpoint.startswith("unix://"):
        path = endpoint.removeprefix("unix://")
    elif endpoint.startswith("unix:"):
        path = endpoint.removeprefix("unix:")
    if not path.startswith("/"):
        raise EndpointError(f"{endpoint!r} isn't a unix socket; write it as unix:///run/containerd/containerd.sock")
    return Path(path)


class Channel:
    """A channel to `endpoint` (unix://…). Made and used on one event loop; close() it."""

    def __init__(self, endpoint: str) -> None:
        self.path = socket_path(endpoint)
        self._channel: aio.Channel | None = None
        self._retired: set[asyncio.Task[None]] = set()

    def ready(self) -> aio.Channel:
        """The channel for one call, to be used at once. Connects when that call is made."""
        if self._channel is not None:
            if self._channel.get_state() is not grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                return self._channel
            task = asyncio.get_running_loop().create_task(self._channel.close(_RETIREMENT))
            self._retired.add(task)
            task.add_done_callback(self._retired.discard)
        options = [
            *UNLIMITED,
            # Or the new channel would share the old one's connection and its wait.
            ("grpc.use_local_subchannel_pool", 1),
            # Not grpc.min_reconnect_backoff_ms, which is how long a connection may take to be made, too: a containerd
            # that is short of processor time needs more than the 100 ms of the others. The default is 20 s.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        self._channel = aio.insecure_channel(f"unix://{self.path}", options=options)
        return self._channel

    async def close(self) -> None:
        """Calls under way are cancelled."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close(None)
        for task in list(self._retired):
            task.cancel()
        await asyncio.gather(*self._retired, return_exceptions=True)
