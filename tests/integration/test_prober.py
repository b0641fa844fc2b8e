"""The lab's prober probes as kubelet does: all four kinds, at their periods, from kubelet's cgroup."""

from __future__ import annotations

import contextlib
import http.server
import ssl
import subprocess
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from specimen import PATIENCE, eventually

from lab import cgroups, prober
from lab.containerd import Containerd
from lab.kubelet import Kubelet
from lab.prober import Prober


class _Handler(http.server.BaseHTTPRequestHandler):
    """Remembers the requests, and answers with the status that the path names."""

    requests: list[list[str]]

    def do_GET(self) -> None:
        self.requests.append([self.requestline, *(f"{key}: {value}" for key, value in self.headers.items())])
        self.send_response(int(self.path.strip("/")))
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def server(address: str, tls: ssl.SSLContext | None = None) -> Iterator[tuple[int, list[list[str]]]]:
    """Its port, and the lines of the requests that it has got."""
    handler = type("Handler", (_Handler,), {"requests": []})
    with http.server.ThreadingHTTPServer((address, 0), handler) as made:
        if tls:
            made.socket = tls.wrap_socket(made.socket, server_side=True)
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        try:
            yield made.server_port, handler.requests
        finally:
            made.shutdown()
            thread.join()


@contextlib.contextmanager
def health(address: str, answers: dict[bytes, bytes]) -> Iterator[tuple[int, list[str]]]:
    """A gRPC health service: its port, and the user agents that it has seen. `answers` maps requests to answers."""
    agents = []

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
            if details.method != "/grpc.health.v1.Health/Check":
                return None
            agents.append(dict(details.invocation_metadata)["user-agent"])
            return grpc.unary_unary_rpc_method_handler(lambda request, _context: answers[request])

    made = grpc.server(futures.ThreadPoolExecutor(), handlers=[Handler()])
    port = made.add_insecure_port(f"{address}:0")
    made.start()
    try:
        yield port, agents
    finally:
        made.stop(None).wait()


def certificate(folder: Path) -> ssl.SSLContext:
    key, made = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-subj", "/CN=lab", "-keyout", str(key), "-out", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made, key)
    return context


def test_http(containerd: Containerd, tmp_path: Path) -> None:
    seen_names: list[str | None] = []
    tls = certificate(tmp_path)
    tls.sni_callback = lambda _socket, name, _context: seen_names.append(name)
    gateway = containerd.gateway
    with server(gateway) as (port, requests), server(gateway, tls) as (secure, _):
        probes = [
            prober.Http("good", gateway, port, "/204", period=0.2, timeout=PATIENCE),
            prober.Http("moved", gateway, port, "/302", headers={"X-Lab": "yes"}, timeout=PATIENCE),
            prober.Http("bad", gateway, port, "/503", timeout=PATIENCE),
            prober.Http("secure", gateway, secure, "/200", tls=True, timeout=PATIENCE),
        ]
        with Prober(containerd, probes) as made:
            eventually_seen(made, 5)
            results = {name: made.results(name)[0] for name in ("good", "moved", "bad", "secure")}
            pids = cgroups.processes(containerd.kubelet_cgroup)
            assert len(pids) == 1
            with pytest.raises(Exception, match="bad"):
                made.wait_for_success(timeout=0.1)
        assert not cgroups.processes(containerd.kubelet_cgroup)
    assert [name for name, result in results.items() if not result.success] == ["bad"]
    assert results["bad"].output.startswith("HTTP 503")
    assert made.failures() == made.results("bad")
    host = f"Host: {gateway}:{port}"
    kubelets = [host, "User-Agent: kube-probe/1.36", "Accept: */*", "Connection: close"]
    assert ["GET /204 HTTP/1.1", *kubelets] in requests
    assert ["GET /302 HTTP/1.1", *kubelets[:3], "X-Lab: yes", kubelets[3]] in requests
    assert seen_names
    assert set(seen_names) == {None}


def test_grpc(containerd: Containerd) -> None:
    answers = {b"": b"\x08\x01", b"\x0a\x03lab": b"\x08\x02"}
    with health(containerd.gateway, answers) as (port, agents):
        probes = [
            prober.Grpc("all", containerd.gateway, port, timeout=PATIENCE),
            prober.Grpc("lab", containerd.gateway, port, "lab", timeout=PATIENCE),
        ]
        with Prober(containerd, probes) as made:
            eventually_seen(made, 2)
    assert {result.name for result in made.results() if result.success} == {"all"}
    assert all(agent.startswith("kube-probe/1.36 ") for agent in agents)


def test_tcp_and_exec(containerd: Containerd, direct: Kubelet) -> None:
    with direct.run_pod() as pod:
        container = pod.run("redis")
        eventually(lambda: container.exec_sync("redis-cli", "ping").stdout == "PONG\n", "redis listens")
        probes = [
            prober.Tcp("connect", pod.ip, 6379, timeout=PATIENCE),
            prober.Tcp("refused", pod.ip, 6380, timeout=PATIENCE),
            prober.Exec.of("ping", container, "redis-cli", "ping", timeout=PATIENCE),
            prober.Exec.of("fails", container, "sh", "-c", "echo no; exit 3", timeout=PATIENCE),
            prober.Exec.of("hangs", container, "sleep", "1000", period=5),
        ]
        with Prober(containerd, probes) as made:
            eventually_seen(made, 5)
            failed = {result.name: result.output for result in made.failures()}
            good = {result.name: result.output for result in made.results() if result.success}
    assert good == {"connect": "connected", "ping": "PONG\n"}
    assert failed.keys() == {"refused", "fails", "hangs"}
    assert failed["fails"] == "exit code 3: no\n"
    assert failed["hangs"].startswith("DEADLINE_EXCEEDED")


def eventually_seen(made: Prober, number: int) -> None:
    """That many results at least, and one of each probe."""
    names = {probe.name for probe in made._probes}
    eventually(lambda: len(made.results()) >= number, f"{number} results")
    eventually(lambda: {result.name for result in made.results()} == names, "one of each")
