"""`make demo-wordpress`: WordPress and its database scale to zero under kubelet's probes, and one request wakes both.

The case of an article that doubted whether scaling pods to zero this way could ever be run in production: WordPress on
Apache and PHP in one pod, its database in another, annotated as there, with liveness and readiness probes and an
ingress that keeps connections open. It takes about three minutes, leaves nothing behind, and exits with 0 only if every
step went well.
"""

import contextlib
import http.client
import secrets
import statistics
import sys
import threading
import time
import urllib.parse
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pymysql

from criproxy.api import cri_pb2 as cri
from lab import LabError, client, prober
from lab.console import Console, Table, arguments, milliseconds, size
from lab.containerd import Containerd
from lab.daemon import COMMAND, Daemon
from lab.kubelet import Container, Kubelet
from lab.prober import Prober
from lab.process import run

IMAGES = ("pause", "nginx", "mariadb", "wordpress")
# The article's.
DURATION = "10s"
# Seconds between two probes of a kind: many times within the duration.
_PERIOD = 2.0
# A container that isn't scaled down within these seconds won't be.
_PATIENCE = 60.0
_WARM_REQUESTS = 5
# Seconds without a request, and with one after the other.
_QUIET = 10.0
_LOOP = 30.0

_FIRST, _BOTH, _DATABASE_ONLY, _WARM = "WordPress asleep", "both asleep", "database asleep", "warm"
# Seconds; measured by the article's author on another machine.
_ARTICLE = {_FIRST: 0.454, _BOTH: 0.978, _WARM: 0.088}
_COLUMNS = (("round", 5), ("before", -16), ("page|took", 7), ("then|warm", 7), ("woken", -23), ("page", -27))
_CONCLUSION = (("a page", -16), ("median", 8), ("from", 8), ("to", 8), ("n", 3), ("article", 8))

# Of WordPress: what takes no PHP, and what takes PHP and the database.
_FILE, _FORM = "/wp-includes/images/blank.gif", "/wp-login.php"
# User, password and database of the lab's image.
_LOGIN = "lab"
_INGRESS = """\
worker_processes 1;
error_log /dev/stderr warn;
events {{ worker_connections 512; }}
http {{
    access_log off;
    upstream wordpress {{
        server {wordpress}:80;
        keepalive 16;
    }}
    server {{
        listen 80;
        location / {{
            proxy_pass http://wordpress;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
        }}
    }}
}}
"""


def _annotations(container: str, port: int, duration: str) -> dict[str, str]:
    """Exactly the article's."""
    return {
        "zeropod.ctrox.dev/ports-map": f"{container}={port}",
        "zeropod.ctrox.dev/container-names": container,
        "zeropod.ctrox.dev/scaledown-duration": duration,
    }


def _select(host: str) -> list[str]:
    """A command that succeeds once the database at the address answers."""
    login = (f"--host={host}", f"--user={_LOGIN}", f"--password={_LOGIN}")
    return ["mariadb", "--no-defaults", *login, "--execute=SELECT 1"]


@dataclass
class Site:
    """WordPress with one post, its database, and the ingress in front, each in a pod of its own."""

    wordpress: Container
    database: Container
    ingress: str
    """The ingress' address."""
    title: str
    """The post's."""

    @classmethod
    def run(cls, kubelet: Kubelet, duration: str = DURATION) -> "Site":
        """As kubelet brings the pods up, and a person installs WordPress with the browser. Raises LabError."""
        annotations = _annotations("mysql", 3306, duration)
        database_pod = kubelet.run_pod("mysql", annotations=annotations, runtime_handler="zeropod")
        host = database_pod.ip
        annotations = _annotations("wordpress", 80, duration)
        wordpress_pod = kubelet.run_pod("wordpress", annotations=annotations, runtime_handler="zeropod")
        ask = 'until "$@"; do sleep 0.2; done'
        waiting = wordpress_pod.run("mariadb", "wait-for-mysql", command=["sh", "-c", ask, "sh", *_select(host)])
        database = database_pod.run("mariadb", "mysql")
        if code := waiting.wait().exit_code:
            raise LabError(f"The init container ended with {code}")
        environment = {f"WORDPRESS_DB_{key}": _LOGIN for key in ("USER", "PASSWORD", "NAME")}
        environment["WORDPRESS_DB_HOST"] = host
        wordpress = wordpress_pod.run("wordpress", environment=environment)
        configuration = kubelet.lab.logs / "ingress.conf"
        configuration.write_text(_INGRESS.format(wordpress=wordpress_pod.ip))
        ingress_pod = kubelet.run_pod("ingress")
        ingress_pod.run("nginx", mounts={configuration: "/etc/nginx/nginx.conf"})
        site = cls(wordpress, database, ingress_pod.ip, f"A post on {secrets.token_hex(8)}")
        site._install()
        return site

    def _install(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while True:
            # The ingress may not listen yet, nor what is behind it.
            with contextlib.suppress(OSError):
                if self.request("GET", _FILE)[0] == 200:
                    break
            if time.monotonic() > deadline:
                raise LabError(f"WordPress doesn't answer within {_PATIENCE:g} s", self.wordpress.logs())
            time.sleep(0.1)
        password = secrets.token_hex(8)
        form = {
            "weblog_title": "A lab",
            "user_name": "lab",
            "admin_password": password,
            "admin_password2": password,
            "admin_email": "lab@example.org",
            "blog_public": "0",
        }
        status, body = self.request("POST", "/wp-admin/install.php?step=2", form)
        if status != 200 or "Success!" not in body:
            raise LabError(f"WordPress can't be installed: {status}, {body[-2000:]}", self.wordpress.logs()[-3000:])
        with self.query() as connection, connection.cursor() as cursor:
            cursor.execute("UPDATE wp_posts SET post_title = %s WHERE post_type = 'post'", (self.title,))
            connection.commit()

    def query(self) -> "pymysql.Connection[pymysql.cursors.Cursor]":
        """A connection to the database, from outside."""
        return pymysql.connect(
            host=self.database.pod.ip,
            user=_LOGIN,
            password=_LOGIN,
            database=_LOGIN,
            connect_timeout=client.TIMEOUT,
            read_timeout=client.TIMEOUT,
        )

    def request(self, method: str, path: str, form: Mapping[str, str] | None = None) -> tuple[int, str]:
        """One request through the ingress, on a new connection: status and body. Raises OSError, or LabError."""
        connection = http.client.HTTPConnection(self.ingress, 80, timeout=client.TIMEOUT)
        with contextlib.closing(connection):
            body = urllib.parse.urlencode(form) if form else None
            headers = {"Content-Type": "application/x-www-form-urlencoded"} if form else {}
            try:
                connection.request(method, path, body, headers)
                answer = connection.getresponse()
                return answer.status, answer.read().decode(errors="replace")
            except http.client.HTTPException as error:
                raise LabError(f"The ingress broke off: {error!r}") from error

    def page(self) -> float:
        """Seconds from a new connection's first packet to the whole front page, as `curl` has them. Raises LabError if
        it isn't the page with the post, or OSError."""
        began = time.monotonic()
        status, body = self.request("GET", "/")
        seconds = time.monotonic() - began
        if status != 200 or self.title not in body:
            raise LabError(f"Instead of the page with {self.title!r} there came status {status}: {body[:2000]}")
        return seconds

    def static(self) -> None:
        """A file that takes no PHP and no database. Raises LabError or OSError."""
        status, _ = self.request("GET", _FILE)
        if status != 200:
            raise LabError(f"The ingress answered {status} for a file")

    # --- What criproxy does to it ----------------------------------------------------------------------------

    def until_asleep(self, daemon: Daemon, *, timeout: float = _PATIENCE) -> None:
        """Both. Raises LabError after `timeout` seconds for each."""
        for container in (self.wordpress, self.database):
            self.until_it_sleeps(daemon, container, timeout=timeout)

    def until_it_sleeps(self, daemon: Daemon, container: Container, *, timeout: float = _PATIENCE) -> None:
        """One of them. Raises LabError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (status := daemon.seen(container.id)).state != "scaled_down":
            if time.monotonic() > deadline:
                raise LabError(f"{container.name} isn't scaled down within {timeout:g} s: {status}")
            time.sleep(0.05)

    @contextlib.contextmanager
    def another_client(self) -> Iterator[None]:
        """Somebody else uses the database all the time. Raises what that one meets: pymysql.Error."""
        over = threading.Event()

        def use() -> None:
            with self.query() as connection:
                while not over.wait(0.2):
                    connection.ping(reconnect=False)

        with ThreadPoolExecutor(1) as threads:
            used = threads.submit(use)
            try:
                yield
            finally:
                over.set()
            used.result()

    @contextlib.contextmanager
    def woken(self, daemon: Daemon, *, wordpress: int, database: int) -> Iterator[None]:
        """What is done in the block wakes them so often, exactly. Raises LabError otherwise."""
        containers = (self.wordpress, self.database)
        before = [daemon.seen(container.id) for container in containers]
        yield
        for container, known, times in zip(containers, before, (wordpress, database), strict=True):
            status = daemon.seen(container.id)
            if status.restores != known.restores + times:
                raise LabError(f"{container.name} was to be woken {times} times; before: {known}\nthen: {status}")

    def loop(self, daemon: Daemon, seconds: float) -> list[float]:
        """One page after the other, as `while true; do curl; done`: how long each took. Raises LabError if one isn't
        right, or if anybody was scaled down, and OSError."""
        self.page()
        before = [daemon.seen(container.id).checkpoints for container in (self.wordpress, self.database)]
        deadline = time.monotonic() + seconds
        times = []
        while time.monotonic() < deadline:
            times.append(self.page())
        after = [daemon.seen(container.id).checkpoints for container in (self.wordpress, self.database)]
        if after != before:
            raise LabError(f"Checkpoints of WordPress and its database under requests: {before}, then {after}")
        return times

    def probes(self, period: float, *, timeout: float = 5.0) -> list[prober.AnyProbe]:
        """Liveness and readiness of both; WordPress is ready if its database is. `period` and `timeout` in seconds: the
        form takes PHP one where others are at work on the machine."""
        wordpress, database = self.wordpress.pod.ip, self.database.pod.ip
        return [
            prober.Http("wordpress, liveness", wordpress, 80, _FILE, period=period, timeout=timeout),
            prober.Http("wordpress, readiness", wordpress, 80, _FORM, period=period, timeout=timeout),
            prober.Tcp("mysql, liveness", database, 3306, period=period, timeout=timeout),
            prober.Exec.of("mysql, readiness", self.database, *_select("127.0.0.1"), period=period, timeout=timeout),
        ]


def main() -> int:
    parser = arguments("lab.wordpress", __doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each is woken (default: 3)")
    options = parser.parse_args()
    console = Console()
    return console.attempt("the demo", lambda: _demonstrate(console, options.rounds), pymysql.Error)


def _demonstrate(console: Console, rounds: int) -> None:
    console.say("starting a private containerd; it touches no other one on this machine")
    with Containerd(usual=IMAGES) as containerd:
        console.say("starting criproxy between kubelet and containerd")
        with Daemon(containerd) as daemon, Kubelet(daemon.endpoint, containerd) as kubelet:
            Demo(console, daemon, kubelet).show(rounds)
            console.say("cleaning up: the pods, criproxy, containerd")
    console.good("done: every step went well, and nothing is left behind")


@dataclass
class Demo:
    console: Console
    daemon: Daemon
    kubelet: Kubelet
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds for a page, by what was asleep."""

    def show(self, rounds: int) -> None:
        """Raises LabError, grpc.RpcError, OSError or pymysql.Error at the first step that goes wrong."""
        say = self.console.say
        say("as kubelet: a pod for MariaDB, one for WordPress on Apache and PHP, and one for nginx, the ingress")
        site = Site.run(self.kubelet)
        for container in (site.wordpress, site.database):
            say(f"  {container.name}, runtime handler {container.pod.runtime_handler}:")
            for key, value in container.pod.config.annotations.items():
                if key.startswith("zeropod."):
                    say(f"    {key}: {value}")
        say(f'an init container has waited for the database; WordPress is installed, with "{site.title}"')
        probes = site.probes(_PERIOD)
        say(f"kubelet begins to probe, each {_PERIOD:g} s, from a cgroup of its own:")
        for probe in probes:
            say(f"  {probe.name}: {type(probe).__name__}")
        with Prober(self.kubelet.lab, probes) as probing:
            probing.wait_for_success()
            self._warm(site)
            say(f"all succeed, and pages come; now nobody asks for any, and after {DURATION} they are scaled down")
            self._show_asleep(site, probing)
            self._rounds(site, rounds)
            self._loop(site)
            if failures := probing.failures():
                raise LabError(f"{len(failures)} probes failed, {failures[0]} among them")
            say(f"in all that time none of {len(probing.results())} probes failed")
        self._conclude()

    def _warm(self, site: Site) -> float:
        """The median of some pages from WordPress and database that are awake."""
        times = [site.page() for _ in range(_WARM_REQUESTS)]
        self.times[_WARM] += times
        return statistics.median(times)

    def _show_asleep(self, site: Site, probing: Prober) -> None:
        awake = [container.memory() for container in (site.wordpress, site.database)]
        site.until_asleep(self.daemon, timeout=_PATIENCE)
        self.console.say("both are scaled down although the probes go on; `criproxy status`:")
        self.console.block(run([COMMAND, "status", "--control", self.daemon.control]))
        began = time.monotonic()
        with site.woken(self.daemon, wordpress=0, database=0):
            time.sleep(_QUIET)
        for container, before in zip((site.wordpress, site.database), awake, strict=True):
            state = cri.ContainerState.Name(container.status().state)
            shrunk = f"{size(before)} -> {size(container.memory())}"
            self.console.say(f"  {container.name}: memory {shrunk}; for kubelet it is {state} as before")
        made = probing.results(since=began)
        self.console.say(f"  {len(made)} probes in {_QUIET:g} s, {sum(r.success for r in made)} succeeded, nobody woke")

    def _rounds(self, site: Site, rounds: int) -> None:
        self.console.say(
            "now clients come through the ingress, each on a new connection; its own to WordPress it keeps"
        )
        self.console.text()
        table = Table(self.console, _COLUMNS)

        for number in range(1, rounds + 1):
            self._round(site, number, table)
        self.console.text()

    def _round(self, site: Site, number: int, table: Table) -> None:
        def measure(asleep: str, woken: str, *, wordpress: int, database: int) -> None:
            with site.woken(self.daemon, wordpress=wordpress, database=database):
                if asleep == _DATABASE_ONLY:
                    site.static()
                seconds = site.page()
                warm = self._warm(site)
            self.times[asleep].append(seconds)
            table.row(str(number), asleep, milliseconds(seconds), milliseconds(warm), woken, site.title)

        site.until_asleep(self.daemon, timeout=_PATIENCE)
        measure(_BOTH, "WordPress, then MariaDB", wordpress=1, database=1)
        with site.another_client():
            site.until_it_sleeps(self.daemon, site.wordpress, timeout=_PATIENCE)
            measure(_FIRST, "WordPress", wordpress=1, database=0)
        site.until_asleep(self.daemon, timeout=_PATIENCE)
        # The file before it has woken WordPress.
        measure(_DATABASE_ONLY, "MariaDB", wordpress=1, database=1)

    def _loop(self, site: Site) -> None:
        self.console.say(f"`while true; do curl; done` through the ingress for {_LOOP:g} s, three times the duration")
        times = site.loop(self.daemon, _LOOP)
        worst = milliseconds(max(times))
        self.console.say(
            f"  {len(times)} pages, all right, the slowest after {worst}; nobody was scaled down meanwhile"
        )

    def _conclude(self) -> None:
        self.console.say("seconds for a page, beside those of the article, which are of another machine:")
        self.console.text()
        table = Table(self.console, _CONCLUSION)
        for asleep in (_FIRST, _BOTH, _DATABASE_ONLY, _WARM):
            times = self.times[asleep]
            article = f"{_ARTICLE[asleep]:.3f}" if asleep in _ARTICLE else "-"
            spread = [f"{value:.3f}" for value in (statistics.median(times), min(times), max(times))]
            table.row(asleep, *spread, str(len(times)), article)
        self.console.text()


if __name__ == "__main__":
    sys.exit(main())
