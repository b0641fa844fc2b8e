"""A node with a bridge, a pod and a neighbour, all of them network namespaces of the test's own, none the host's.

node (br0 10.99.0.1, fd99::1) ── pod (eth0 10.99.0.2, fd99::2)
                              └─ peer (eth0 10.99.0.3, fd99::3)
"""

import os
import shlex
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from criproxy.kernel.bpf import mount_bpffs
from criproxy.kernel.namespaces import in_network_namespace
from criproxy.kubelet import connections as kubelet

NODE4, POD4, PEER4 = "10.99.0.1", "10.99.0.2", "10.99.0.3"
NODE6, POD6, PEER6 = "fd99::1", "fd99::2", "fd99::3"


class Topology:
    def __init__(self, bpffs: Path) -> None:
        prefix = f"criproxy-test-{os.getpid()}"
        self.node, self.pod, self.peer = (f"{prefix}-{name}" for name in ("node", "pod", "peer"))
        self.bpffs = bpffs
        self.pins = bpffs / "pod"

    @property
    def netns(self) -> Path:
        return path(self.pod)

    def up(self) -> None:
        for name in (self.node, self.pod, self.peer):
            run(f"ip netns add {name}")
            run(f"ip -n {name} link set lo up")
        run(f"ip -n {self.node} link add br0 type bridge")
        run(f"ip -n {self.node} addr add {NODE4}/24 dev br0")
        run(f"ip -n {self.node} -6 addr add {NODE6}/64 dev br0 nodad")
        run(f"ip -n {self.node} link set br0 up")
        for name, veth, v4, v6 in ((self.pod, "v0", POD4, POD6), (self.peer, "v1", PEER4, PEER6)):
            run(f"ip -n {self.node} link add {veth} type veth peer name eth0 netns {name}")
            run(f"ip -n {self.node} link set {veth} master br0 up")
            run(f"ip -n {name} addr add {v4}/24 dev eth0")
            run(f"ip -n {name} -6 addr add {v6}/64 dev eth0 nodad")
            run(f"ip -n {name} link set eth0 up")
            run(f"ip -n {name} route add default via {NODE4}")

    def down(self) -> None:
        for name in (self.pod, self.peer, self.node):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def inventory(self) -> dict[str, str]:
        """What a hook may leave in a pod."""
        settings = ("net.ipv4.conf.lo.route_localnet", "net.ipv4.conf.lo.accept_local", "net.mptcp.enabled")
        return {
            "qdiscs": run(f"tc -n {self.pod} qdisc show"),
            **{
                f"{link} {side}": run(f"tc -n {self.pod} filter show dev {link} {side}", check=False)
                for link in ("eth0", "lo")
                for side in ("ingress", "egress")
            },
            **{name: run(f"ip netns exec {self.pod} sysctl -ne {name}", check=False) for name in settings},
            "packet sockets": run(f"ip netns exec {self.pod} cat /proc/net/packet").split("\n", 1)[1],
            "pins": " ".join(sorted(pin.name for pin in self.bpffs.iterdir() if pin.name != kubelet.FOLDER)),
        }


@contextmanager
def topology() -> Iterator[Topology]:
    bpffs = Path(tempfile.mkdtemp(prefix="criproxy-bpf-"))
    net = Topology(bpffs)
    mount_bpffs(bpffs)
    try:
        # What a run that was killed, with the same number, has left.
        net.down()
        net.up()
        yield net
    finally:
        net.down()
        shutil.rmtree(net.pins, ignore_errors=True)
        run(f"umount {bpffs}")
        bpffs.rmdir()


def path(name: str) -> Path:
    return Path("/run/netns") / name


def run(command: str, check: bool = True) -> str:
    """Runs a command (quoted as in a shell) and returns what it prints."""
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def make_socket(name: str, family: int, kind: int = socket.SOCK_STREAM, proto: int = 0) -> socket.socket:
    """A socket that lives in a namespace."""
    made = in_network_namespace(path(name), lambda: socket.socket(family, kind, proto))
    made.setblocking(False)
    return made


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def checksum(data: bytes) -> int:
    """The Internet checksum as RFC 1071 has it, word by word: another way than the product's."""
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def segment(
    source: tuple[str, int], target: tuple[str, int], seq: int, ack: int, flags: int, data: bytes, window: int = 64000
) -> bytes:
    """An IPv4 packet with a TCP segment, its checksums right."""
    addresses = socket.inet_aton(source[0]) + socket.inet_aton(target[0])
    head = struct.pack("!HHIIBBHHH", source[1], target[1], seq, ack, 5 << 4, flags, window, 0, 0)
    pseudo = addresses + struct.pack("!BBH", 0, 6, len(head) + len(data))
    head = head[:16] + struct.pack("!H", checksum(pseudo + head + data)) + head[18:]
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(head) + len(data), 1, 0, 64, 6, 0) + addresses
    return ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:] + head + data
