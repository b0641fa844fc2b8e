"""The same cycle under each kind of network that pods can have, from everywhere that it can be reached from.

The hook sits in the pod, so that what connects the pod mustn't matter.
"""

import json
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab import requirements
from lab.containerd import NETWORKS, Containerd
from lab.daemon import Daemon
from lab.dialogues import RedisSession
from lab.kubelet import Container, Kubelet, Pod
from lab.process import run
from lab.soak import connector

PORT = 6379
FAMILIES = ("IPv4", "IPv6")


@dataclass
class Site:
    """A lab with one kind of network: a redis that is scaled down soon, and another pod."""

    daemon: Daemon
    pod: Pod
    redis: Container
    other: Pod

    def ask(self, address: str, caller: str, number: int, netns: Path | None = None) -> None:
        """From this host or from inside of a pod. redis has to count right and to see the client's own address."""
        with closing(RedisSession(connector(address, PORT, netns)(), caller)) as session:
            session.ask(number)

    def asleep(self) -> None:
        self.daemon.wait_for(self.redis.id, "scaled_down")


def known_to_the_kernel(kind: str) -> bool:
    """Whether it can make links of that kind, with modules or without."""
    # No link can be made on lo, but an unknown kind is refused before that.
    argv = ["ip", "link", "add", "link", "lo", "name", "criprobe", "type", kind]
    return "Unknown device type" not in subprocess.run(argv, capture_output=True, text=True).stderr


# The usual lab has a bridge, and all other tests run there.
@pytest.fixture(scope="module", params=[network for network in NETWORKS if network != "bridge"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    requirements.check()
    if request.param != "ptp" and not known_to_the_kernel(request.param):
        pytest.skip(f"this kernel has no {request.param}")
    with (
        Containerd(usual=("pause", "redis"), network=request.param) as containerd,
        Daemon(containerd) as daemon,
        Kubelet(daemon.endpoint, containerd) as kubelet,
    ):
        pod = kubelet.run_pod("redis", annotations={"criproxy.io/scaledown-duration": "300ms"})
        redis = pod.run("redis")
        yield Site(daemon, pod, redis, kubelet.run_pod("other"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", ["host", "another pod", "the pod itself"])
def test_it_wakes(site: Site, place: str, family: str) -> None:
    netns = {"host": None, "another pod": site.other.netns, "the pod itself": site.pod.netns}[place]
    address = site.pod.ips[FAMILIES.index(family)]
    for number in (1, 2, 3):
        site.asleep()
        site.ask(address, f"{place} {family}", number, netns)


def test_an_open_connection_lives_on(site: Site) -> None:
    sessions = [RedisSession(connector(address, PORT)(), f"open {address}") for address in site.pod.ips]
    for number in (1, 2, 3):
        site.asleep()
        for session in sessions:
            session.ask(number)
    for session in sessions:
        session.close()


def test_its_link_is_of_that_kind(site: Site, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["site"]
    shown = run(["nsenter", f"--net={site.pod.netns}", "ip", "-json", "-details", "link", "show", "eth0"])
    assert json.loads(shown)[0]["linkinfo"]["info_kind"] == {"ptp": "veth"}.get(kind, kind)
