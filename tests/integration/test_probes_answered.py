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
from specimen import eventually

from criproxy.kernel.namespaces import in_network_namespace
from lab.containerd import Containerd
from lab.daemon import Daemon
from lab.kubelet import Container, Kubelet, Pod
from lab.prober import Http, Prober, Tcp

QUICK = {"criproxy.io/scaledown-duration": "500ms"}
HOOK = {"User-Agent": "kube-lifecycle/1.36"}
ONCE = 3600.0
SECONDS = 5.0
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
    daemon.wait_for(container.id, "scaled_down")
    time.sleep(1.5)  # a probe may have come before its first answer was known
    return int(daemon.wait_for(container.id, "scaled_down")["restores"])


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


def test_https_probes_let_it_sleep_and_a_hook_over_tls_reaches_it(
    containerd: Containerd, daemon: Daemon, nginx: Callable[..., Container]
) -> None:
    container = nginx()
    address = container.pod.ip
    with Prober(containerd, [Http("tls", address, 443, "/healthz", tls=True)]) as prober:
        restores = settled(daemon, prober, container)
        began = time.monotonic()
        time.sleep(SECONDS)
        assert prober.failures(since=began) == []
        assert {result.output for result in prober.results(since=began)} == {"HTTP 200, 0 bytes"}
        assert daemon.container(container.id)["restores"] == restores
        hook = Http("hook", address, 443, "/stop", HOOK, tls=True, timeout=10, period=ONCE)
        body = f"for {address}: /stop"  # relayed: the application sees an address of the pod
        assert asked(containerd, hook) == f"HTTP 200, {len(body)} bytes"
        assert daemon.container(container.id)["restores"] == restores + 1


def test_where_https_probes_are_to_wake_they_do(
    containerd: Containerd, daemon: Daemon, nginx: Callable[..., Container]
) -> None:
    container = nginx({**QUICK, "criproxy.io/probes": "wake"})
    probe = Http("tls", container.pod.ip, 443, "/healthz", tls=True, period=3, timeout=3)
    with Prober(containerd, [probe]) as prober:
        prober.wait_for_success()
        eventually(lambda: int(daemon.container(container.id)["restores"]) >= 2, "each probe wakes it")
        assert prober.failures() == []
        assert {result.output for result in prober.results()} != {"HTTP 200, 0 bytes"}


def test_a_new_probe_wakes_once(containerd: Containerd, daemon: Daemon, nginx: Callable[..., Container]) -> None:
    container = nginx()
    address = container.pod.ip
    with Prober(containerd, [Http("live", address, 80, "/live")]) as live:
        restores = settled(daemon, live, container)
        assert asked(containerd, Http("hook", address, 80, "/live", HOOK, timeout=10, period=ONCE)).startswith(
            "HTTP 200"
        )
        assert daemon.container(container.id)["restores"] == restores + 1
        with Prober(containerd, [Http("ready", address, 80, "/ready", timeout=10)]) as ready:
            restores = settled(daemon, ready, container)
            began = time.monotonic()
            time.sleep(SECONDS)
            assert ready.failures() + live.failures(since=began) == []
            assert daemon.container(container.id)["restores"] == restores


def test_a_probe_that_is_given_up_wakes_nobody(
    containerd: Containerd, daemon: Daemon, nginx: Callable[..., Container]
) -> None:
    """kubelet's HTTP client goes on connecting when a probe's time is over, and closes the connection then: as after a
    restart of the daemon."""
    container = nginx()
    address = container.pod.ip
    with Prober(containerd, [Http("live", address, 80, "/live")]) as live:
        restores = settled(daemon, live, container)
        with Prober(containerd, [Tcp("given up", address, 80)]) as given_up:
            given_up.wait_for_success()
            time.sleep(1)
        assert daemon.container(container.id)["restores"] == restores


def test_what_kubelet_finds_sick_is_not_scaled_down(
    containerd: Containerd, daemon: Daemon, nginx: Callable[..., Container]
) -> None:
    container = nginx()
    with Prober(containerd, [Http("sick", container.pod.ip, 80, "/sick")]):
        reason = "kubelet's HTTP probe GET :80/sick was last answered 503"
        eventually(lambda: daemon.container(container.id)["reason"] == reason, "it says why")
        before = daemon.container(container.id)
        time.sleep(3)
        status = daemon.container(container.id)
        # It may have been scaled down before the first probe came.
        assert (status["state"], status["reason"], status["checkpoints"]) == ("running", reason, before["checkpoints"])


def test_an_agent_probes_in_kubelets_place(daemon: Daemon, nginx: Callable[..., Container]) -> None:
    container = nginx()
    pod = container.pod
    probe = get("/healthz", "kube-probe/1.36")
    daemon.wait_for(container.id, "scaled_down")
    first = over_lo(pod, probe)
    assert first.endswith(f"for {AGENT}: /healthz".encode())
    restores = int(daemon.wait_for(container.id, "scaled_down")["restores"])
    for _ in range(10):
        again = over_lo(pod, probe)
        assert re.split(rb"\r\n\r\n", again)[1] == re.split(rb"\r\n\r\n", first)[1]
    assert daemon.container(container.id)["restores"] == restores
    # Whatever else it asks is for the application, which sees where it comes from.
    assert over_lo(pod, get("/shop", "curl/8")).endswith(f"for {AGENT}: /shop".encode())
    assert daemon.container(container.id)["restores"] == restores + 1
