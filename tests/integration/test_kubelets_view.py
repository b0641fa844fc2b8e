"""kubelet finds a pod that sleeps healthy, for as long as it looks, and doesn't wake it."""

from __future__ import annotations

from specimen import PATIENCE

from lab.containerd import Containerd
from lab.daemon import Daemon
from lab.kubelet import Kubelet
from lab.view import View

SECONDS = 30.0
"""`make soak` looks for five minutes."""


def test_probes_of_all_kinds_find_it_healthy_and_asleep(
    containerd: Containerd, daemon: Daemon, kubelet: Kubelet
) -> None:
    # This machine may be busy: that a probe is answered counts here, not how soon.
    with View(containerd, daemon, kubelet, timeout=PATIENCE) as view:
        view.settle()
        view.watch(SECONDS)
        view.visit()
