"""Checkpoints of a container that somebody else wants (kubelet's forensic ones), until its state machine makes them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from criproxy.scaledown import Refused


class Errand:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """Where the checkpoint is to be put: a new one."""
        self.unless = asyncio.Event()
        """It is no longer wanted."""
        self.done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Why it was refused, empty if it wasn't."""

    def end(self, refusal: str = "") -> None:
        if not self.done.done():
            self.done.set_result(refusal)


class Errands:
    """In the order in which they are asked for."""

    def __init__(self) -> None:
        self.waiting: list[Errand] = []
        self.asked = asyncio.Event()
        """Set with each new one."""

    async def ask(self, folder: Path) -> None:
        """Waits until it is made. Raises Refused; cancelled, it is given up, and nothing of it goes on."""
        errand = Errand(folder)
        self.waiting.append(errand)
        self.asked.set()
        try:
            refusal = await asyncio.shield(errand.done)
        except asyncio.CancelledError:
            errand.unless.set()
            if errand in self.waiting:
                self.waiting.remove(errand)
            else:
                await asyncio.wait([errand.done])
            raise
        if refusal:
            raise Refused(refusal)

    def refuse(self, why: str) -> None:
        """Those that wait."""
        for errand in self.waiting:
            errand.end(why)
