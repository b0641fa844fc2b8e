"""WordPress, its database and an ingress, in pods annotated as in the article, under kubelet's probes.

`make demo-wordpress` is the same with the article's durations.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from specimen import PATIENCE, eventually

from lab.containerd import Containerd
from lab.daemon import Daemon
from lab.kubelet import Kubelet
from lab.prober import AnyProbe, Prober
from lab.recipes import USUAL
from lab.wordpress import IMAGES, Site

DURATION = 2.0
PERIOD = 1.0


@pytest.fixture(scope="module")
def loaded(containerd: Containerd) -> None:
    containerd.load(*set(IMAGES) - set(USUAL))


@pytest.fixture
def site(kubelet: Kubelet, loaded: None) -> Site:
    return Site.run(kubelet, f"{DURATION:g}s")


def probes(site: Site) -> list[AnyProbe]:
    """The form, which takes PHP and the database, less often: else a busy machine would be at it all the time."""
    made = site.probes(PERIOD, timeout=PATIENCE)
    return [replace(probe, period=4 * PERIOD) if probe.name == "wordpress, readiness" else probe for probe in made]


@pytest.fixture
def probing(site: Site, containerd: Containerd) -> Iterator[Prober]:
    """kubelet's probes of both, from their first success on without any failure."""
    with Prober(containerd, probes(site)) as prober:
        prober.wait_for_success()
        began = time.monotonic()
        yield prober
        assert not prober.failures(since=began)


@pytest.mark.usefixtures("probing")
def test_one_request_wakes_whoever_sleeps(site: Site, daemon: Daemon) -> None:
    site.page()
    site.until_asleep(daemon)
    with site.woken(daemon, wordpress=1, database=1):
        site.page()
    with site.another_client():
        site.until_it_sleeps(daemon, site.wordpress)
        with site.woken(daemon, wordpress=1, database=0):
            site.page()
    site.until_asleep(daemon)
    with site.woken(daemon, wordpress=1, database=1):
        site.static()
        site.page()


def test_probes_go_on_and_wake_nobody(site: Site, daemon: Daemon, probing: Prober) -> None:
    site.until_asleep(daemon)
    began = time.monotonic()
    with site.woken(daemon, wordpress=0, database=0):
        for probe in probes(site):
            wanted = 6 * PERIOD / probe.period
            eventually(lambda n=probe.name, w=wanted: len(probing.results(n, since=began)) >= w, "several of each")
    site.page()


@pytest.mark.usefixtures("probing")
def test_a_loop_of_requests_never_meets_a_scale_down(site: Site, daemon: Daemon) -> None:
    site.until_asleep(daemon)
    assert site.loop(daemon, 3 * DURATION)
