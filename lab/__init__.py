"""The lab: a private containerd, images built on the spot, a client that acts as kubelet does, and criproxy in between.

The demo, the benchmark, `make up` and the integration tests all stand on it. Nothing here is a part of the wheel, and
nothing here touches another containerd, another bridge or another cgroup of the machine.
"""

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
# Everything that is made from the sources and can be made again: git ignores it.
BUILD = CHECKOUT / ".build"
# Images exist only inside a lab's containerd; no registry answers to this name.
REGISTRY = "criproxy.local"


class LabError(Exception):
    """What the lab can't do, in one sentence for a person. `hint` says what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}\n  hint: {hint}" if hint else message)


def image_name(name: str) -> str:
    """The full reference of one of the lab's images: `redis` → `criproxy.local/redis:lab`. Full references stay."""
    return name if "/" in name or ":" in name else f"{REGISTRY}/{name}:lab"
