"""What kubelet, and a mesh's agent, get of an nginx that sleeps: what test_kubelets_view.py doesn't ask."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from specimen import PATIENCE, eventually

from criproxy.kernel.namespaces import in_network_namespace
from lab.containerd import Containerd
from lab.daemon import Daemon
from lab.kubelet import Container, Kubelet, Pod
from lab.prober import Http, Prober, Tcp

QUICK = {"criproxy.io/scaledown-duration": "500ms"}
HOOK = {"User-Agent": "kube-lifecycle/1.36"}
ONCE = 3600.0
PERIOD = 0.5
AGENT = "127.0.0.6"
"""The address from which Istio's agent connects to the application."""

CONF = """\
worker_processes 1;
pid /run/nginx.pid;
error_log /dev/stderr notice;
events { worker_connections 64; }
http {
    access_log /dev/stdout;
    ssl_certificate /conf/cert.pem;
    ssl_certificate_key /conf/key.pem;
    server {
        listen 80;
        listen 443 ssl;
        location / { return 200 "for $remote_addr: $request_uri"; }
        location /sick { return 503; }
    }
}
"""


@pytest.fixture
def nginx(kubelet: Kubelet, tmp_path: Path) -> Iterator[Callable[..., Container]]:
    """Runs nginx in a pod with the given annotations."""
    tmp_path.chmod(0o755)
    command = ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-subj", "/CN=lab", "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"]
    subprocess.run(command, check=True, capture_output=True)
    (tmp_path / "nginx.conf").write_text(CONF)
    with contextlib.ExitStack() as stack:

        def run(annotations: Mapping[str, str] = QUICK) -> Container:
            pod = stack.enter_context(kubelet.run_pod(annotations=annotations))
            return pod.run("nginx", args=["-g", "daemon off;", "-c", "/conf/nginx.conf"], mounts={tmp_path: "/conf"})

        yield run


def settled(daemon: Daemon, prober: Prober, container: Container) -> int:
    """Once all probes succeed and the container sleeps in spite of them, its number of restores."""
    prober.wait_for_success()
    restores = -1
    # A probe may have come before its first answer was known.
    while restores != (restores := daemon.wait_for(container.id, "scaled_down").restores):
        probed(prober, 3)
    return restores


def probed(prober: Prober, times: int) -> None:
    """Waits until each probe has been made so often from now on."""
    began = time.monotonic()
    for probe in prober._probes:
        eventually(lambda p=probe: len(prober.results(p.name, since=began)) >= times, f"{times} probes")


def asked(containerd: Containerd, probe: Http) -> str:
    """What a probe of this kind gets once."""
    with Prober(containerd, [probe]) as prober:
        prober.wait_for_success()
        return prober.results()[0].output


def over_lo(pod: Pod, request: bytes) -> bytes:
    """The answer to a connection that the agent makes."""

    def connect() -> socket.socket:
        return socket.create_connection(("127.0.0.1", 80), 20, (AGENT, 0))

    with in_network_namespace(pod.netns, connect) as connection:
        connection.sendall(request)
        answer = b""
        while data := connection.recv(65536):
            answer += data
        return answer


def get(path: str, agent: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nUser-Agent: {agent}\r\nConnection: close\r\n\r\n".encode()


@pytest.mark.parametrize("ports", [{}, {"criproxy.io/ports-map": "nginx=443"}], ids=["found", "declared"])
def test_probes_of_a_quiet_port_are_answered(
    ports: Mapping[str, str], containerd: Containerd, daemon: Daemon, nginx: Callable[..., Container]
) -> None:
    container = nginx({"criproxy.io/scaledown-duration": "2s", "criproxy.io/quiet-ports": "80", **ports})
    with Prober(containerd, [Http("http", container.pod.ip, 80, period=PERIOD, timeout=PATIENCE)]) as prober:
        restores = settled(daemon, prober, container)
        began = time.monotonic()
        probed(prober, 4)
        assert prober.failures(since=began) == []
        assert daemon.wait_for(container.id, "scaled_down").restores == restores


def test_https_probes_let_it_sleep_and_a_hook_over_tls_reaches_it(
    containerd: Containerd, daemon: Daemon, nginx: Callable[..., Container]
) -> None:
    container = nginx()
    address = container.pod.ip
    probe = Http("tls", address, 443, "/healthz", tls=True, period=PERIOD, timeout=PATIENCE)
    with Prober(containerd, [probe]) as prober:
        restores = settled(daemon, prober, container)
        began = time.monotonic()
        probed(prober, 5)
        assert prober.failures(since=began) == []
        assert {result.output for result in prober.results(since=began)} == {"HTTP 200, 0 bytes"}
        assert daemon.seen(container.id).restores == restores
        hook = Http("hook", address, 443, "/stop", HOOK, tls=True, timeout=PATIENCE, period=ONCE)
        body = f"for {address}: /stop"  # relayed: the application sees an address of the pod
        assert asked(containerd, hook) == f"HTTP 200, {len(body)} bytes"
        assert daemon.seen(container.id).restores == restores + 1


def test_where_https_probes_are_to_wake_they_do(
    containerd: Containerd, daemon: Daemon, nginx: Callable[..., Container]
) -> None:
    container = nginx({**QUICK, "criproxy.io/probes": "wake"})
    probe = Http("tls", container.pod.ip, 443, "/healthz", tls=True, period=2, timeout=PATIENCE)
    with Prober(containerd, [probe]) as prober:
        prober.wait_for_success()
        began = time.monotonic()
        eventually(lambda: daemon.seen(container.id).restores >= 2, "each probe wakes it")
        assert prober.failures(since=began) == []
        assert {result.output for result in prober.results(since=began)} != {"HTTP 200, 0 bytes"}


def test_a_new_probe_wakes_once(containerd: Containerd, daemon: Daemon, nginx: Callable[..., Container]) -> None:
    container = nginx()
    address = container.pod.ip
    with Prober(containerd, [Http("live", address, 80, "/live", period=PERIOD, timeout=PATIENCE)]) as live:
        restores = settled(daemon, live, container)
        hook = Http("hook", address, 80, "/live", HOOK, timeout=PATIENCE, period=ONCE)
        assert asked(containerd, hook).startswith("HTTP 200")
        assert daemon.seen(container.id).restores == restores + 1
        with Prober(containerd, [Http("ready", address, 80, "/ready", period=PERIOD, timeout=PATIENCE)]) as ready:
            restores = settled(daemon, ready, container)
            began = time.monotonic()
            probed(ready, 5)
            assert ready.failures() + live.failures(since=began) == []
            assert daemon.seen(container.id).restores == restores


def test_a_probe_that_is_given_up_wakes_nobody(
    containerd: Containerd, daemon: Daemon, nginx: Callable[..., Container]
) -> None:
    """kubelet's HTTP client goes on connecting when a probe's time is over, and closes the connection then: as after a
    restart of the daemon."""
    container = nginx()
    address = container.pod.ip
    with Prober(containerd, [Http("live", address, 80, "/live", period=PERIOD, timeout=PATIENCE)]) as live:
        restores = settled(daemon, live, container)
        with Prober(containerd, [Tcp("given up", address, 80, period=PERIOD, timeout=PATIENCE)]) as given_up:
            probed(given_up, 2)
            assert given_up.failures() == []
        probed(live, 1)
        assert daemon.seen(container.id).restores == restores


def test_what_kubelet_finds_sick_is_not_scaled_down(
    containerd: Containerd, daemon: Daemon, nginx: Callable[..., Container]
) -> None:
    container = nginx()
    probe = Http("sick", container.pod.ip, 80, "/sick", period=PERIOD, timeout=PATIENCE)
    with Prober(containerd, [probe]) as prober:
        reason = "kubelet's HTTP probe GET :80/sick was last answered 503"
        eventually(lambda: daemon.seen(container.id).reason == reason, "it says why")
        # It may have been scaled down before the first probe came.
        before = daemon.seen(container.id)
        probed(prober, 4)
        eventually(lambda: daemon.seen(container.id).reason == reason, "it still says why")
        status = daemon.seen(container.id)
        assert (status.state, status.checkpoints) == ("running", before.checkpoints)


def test_an_agent_probes_in_kubelets_place(daemon: Daemon, nginx: Callable[..., Container]) -> None:
    container = nginx()
    pod = container.pod
    probe = get("/healthz", "kube-probe/1.36")
    daemon.wait_for(container.id, "scaled_down")
    first = over_lo(pod, probe)
    assert first.endswith(f"for {AGENT}: /healthz".encode())
    restores = daemon.wait_for(container.id, "scaled_down").restores
    for _ in range(10):
        again = over_lo(pod, probe)
        assert re.split(rb"\r\n\r\n", again)[1] == re.split(rb"\r\n\r\n", first)[1]
    assert daemon.seen(container.id).restores == restores
    # Whatever else it asks is for the application, which sees where it comes from.
    assert over_lo(pod, get("/shop", "curl/8")).endswith(f"for {AGENT}: /shop".encode())
    assert daemon.seen(container.id).restores == restores + 1
