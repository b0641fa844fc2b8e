"""kubelet finds a pod that sleeps healthy, for as long as it looks, and doesn't wake it."""

from __future__ import annotations

from lab.containerd import Containerd
from lab.daemon import Daemon
from lab.kubelet import Kubelet
from lab.view import View

SECONDS = 30.0
"""`make soak` looks for five minutes."""


def test_probes_of_all_kinds_find_it_healthy_and_asleep(
    containerd: Containerd, daemon: Daemon, kubelet: Kubelet
) -> None:
    with View(containerd, daemon, kubelet) as view:
        view.settle()
        view.watch(SECONDS)
        view.visit()
