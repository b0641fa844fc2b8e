"""Keeps periodic timers (timerfd) alive that had expired when they were dumped.

The kernel rearms such a timer when its owner reads it. Until then it says that no time is left, which CRIU takes for a
timer that isn't armed: restored, it would never expire again. A dump falls into that moment easily, as time goes on
while CRIU looks.
"""

from __future__ import annotations

from pathlib import Path

from criproxy.api import criu_pb2 as criu
from criproxy.criu import images as image_files


def rearm(images: Path) -> None:
    """Changes a complete dump as described above. Raises OSError, ValueError."""
    path = images / "files.img"
    files = list(image_files.read(path, criu.File))
    rearmed = False
    for file in files:
        timer = file.tfd
        if timer.ticks and (timer.isec or timer.insec) and not (timer.vsec or timer.vnsec):
            timer.vsec, timer.vnsec = timer.isec, timer.insec
            rearmed = True
    if rearmed:
        image_files.replace(path, files)
