"""How a checkpoint, or a restore, fails: in words for people, with what CRIU has said."""

from __future__ import annotations


class _Failure(Exception):
    def __init__(self, reason: str, log: str = "") -> None:
        """`reason` is for people, `log` CRIU's own, if any."""
        super().__init__(reason)
        self.reason = reason
        self.log = log


class CheckpointError(_Failure):
    """The processes couldn't be dumped and go on as before."""


class GivenUp(CheckpointError):
    """A dump was given up because its caller wanted it so; the processes go on as before."""


class RestoreError(_Failure):
    """The processes couldn't be restored; the checkpoint is still there and the container still held."""


class OutOfMemory(RestoreError):
    """It was killed for a limit of the container's memory, or its pod's."""
