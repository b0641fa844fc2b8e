"""Stateful scale-to-zero for any Kubernetes container: a proxy on the CRI socket between kubelet and containerd."""

from pathlib import Path
from typing import Final

LIBEXEC: Final = Path(__file__).parent / "libexec"
"""What is built for nodes: programs, eBPF objects, the unit."""
