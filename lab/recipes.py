"""The lab's images: one function each, which lists what its layers hold, and how it is started (`RECIPES`).

A program is this machine's, with the libraries that the dynamic loader gives it here, or is compiled on the spot.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from lab import BUILD, LabError
from lab.layers import Layer, Recipe
from lab.process import run

CACHE = BUILD / "images"
SOURCES = Path(__file__).parent / "sources"


def _compiled(source: Path, compiler: Sequence[str], environment: dict[str, str] | None = None) -> Path:
    """A program from a source of ours, compiled once: `compiler` gets the output's and the source's path added."""
    found = shutil.which(compiler[0])
    if found is None:
        raise LabError(f"Cannot find {compiler[0]} for {source.name}", "`make setup` installs what is missing")
    version = Path(found).resolve().stat()
    made_of = f"{compiler}{environment}{version.st_size}{version.st_mtime_ns}".encode() + source.read_bytes()
    target = CACHE / f"{source.stem}-{hashlib.sha256(made_of).hexdigest()[:16]}"
    if not target.exists():
        unfinished = target.with_suffix(".unfinished")
        run([*compiler, "-o", unfinished, source], env={**os.environ, **(environment or {})}, timeout=600)
        unfinished.rename(target)
    return target


def _base() -> Layer:
    """A shell with its tools, the users that Debian's packages want, and the folders that programs expect."""
    layer = Layer()
    busybox = Path("/usr/bin/busybox")  # Debian's two packages of it have it there, or by the merged /bin
    layer.program(busybox, "/bin/busybox")
    for applet in run([busybox, "--list"]).split():
        layer.hard_link(f"/bin/{applet}", "/bin/busybox")
    for directory in ("proc", "sys", "dev", "root", "run", "home", "etc", "var/log", "var/lib", "usr/bin", "usr/sbin"):
        layer.directory(directory)
    layer.symlink("/var/run", "/run")
    layer.directory("/tmp", 0o1777)
    layer.text(
        "/etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/sh\n"
        "mysql:x:101:101:mysql:/var/lib/mysql:/bin/sh\nredis:x:102:102:redis:/data:/bin/sh\n"
        "postgres:x:103:103:postgres:/var/lib/postgresql:/bin/sh\nmemcache:x:104:104:memcache:/:/bin/sh\n"
        "nobody:x:65534:65534:nobody:/:/bin/sh\n",
    )
    layer.text(
        "/etc/group",
        "root:x:0:\nwww-data:x:33:\nmysql:x:101:\nredis:x:102:\npostgres:x:103:\nmemcache:x:104:\nnogroup:x:65534:\n",
    )
    layer.text("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")
    return layer


def _pause() -> list[Layer]:
    layer = Layer()
    layer.file(_compiled(SOURCES / "pause.c", ["gcc", "-static", "-O2", "-Wall"]), "/pause", 0o755)
    return [layer]


def _hello() -> list[Layer]:
    # Debian's compiler, also where another Go comes first in PATH; and no toolchain is fetched from anywhere.
    go = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "-trimpath", "GO111MODULE": "off", "HOME": str(BUILD)}
    go |= {"GOCACHE": str(BUILD / "go-cache"), "GOPATH": str(BUILD / "go")}
    layer = Layer()
    layer.file(_compiled(SOURCES / "hello.go", ["/usr/bin/go", "build"], go), "/hello", 0o755)
    return [layer]


def _redis() -> list[Layer]:
    layer = Layer()
    # Debian's redis-tools has the server too, under the name of its checker; argv[0] decides what it is.
    layer.program(Path("/usr/bin/redis-check-rdb"), "/usr/bin/redis-server")
    layer.program(Path("/usr/bin/redis-cli"))
    layer.directory("/data", owner=102)
    return [_base(), layer]


_NGINX_CONF = """\
user www-data;
worker_processes 3;
pid /run/nginx.pid;
error_log /dev/stderr notice;
events { worker_connections 512; }
http {
    include mime.types;
    access_log /dev/stdout;
    server {
        listen 80;
        listen [::]:80;
        root /var/www;
        # Clients' connections may stay for as long as they like.
        keepalive_timeout 3600;
        keepalive_requests 1000000;
    }
}
"""


# More than fits into a segment or a socket's buffer.
LARGE_PAGE = "".join(f"line {number} of a large page\n" for number in range(10_000))


def _nginx() -> list[Layer]:
    layer = Layer()
    layer.program(Path("/usr/sbin/nginx"))
    layer.file(Path("/etc/nginx/mime.types"))
    layer.text("/etc/nginx/nginx.conf", _NGINX_CONF)
    for directory in ("/var/lib/nginx", "/var/log/nginx"):
        layer.directory(directory, owner=33)
    layer.text("/var/www/index.html", "nginx in the lab\n")
    layer.text("/var/www/large.txt", LARGE_PAGE)
    return [_base(), layer]


_APACHE_CONF = """\
ServerRoot /etc/apache2
ServerName lab
PidFile /run/apache2.pid
Listen 80
User www-data
Group www-data
{modules}
{more}
ErrorLog /dev/stderr
LogFormat "%h %l %u %t \\"%r\\" %>s %b" common
CustomLog /dev/stdout common
TypesConfig /etc/mime.types
DirectoryIndex index.php index.html
DocumentRoot {root}
<FilesMatch \\.php$>
    SetHandler application/x-httpd-php
</FilesMatch>
"""
_FEW_PROCESSES = """\
StartServers 3
MinSpareServers 2
MaxSpareServers 5
KeepAliveTimeout 3600
MaxKeepAliveRequests 0"""


def _apache() -> list[Layer]:
    layer = _apache_and_php("/var/www", _FEW_PROCESSES)
    layer.text("/var/www/index.html", "apache in the lab\n")
    layer.text("/var/www/index.php", "<?php echo 'php in the lab: ', PHP_SAPI, \"\\n\";")
    return [_base(), layer]


def _apache_and_php(root: str, more: str) -> Layer:
    """Apache with PHP in its processes, as the official image has it. `more` is added to its configuration."""
    layer = Layer()
    layer.program(Path("/usr/sbin/apache2"))
    modules = {f"{name}_module": f"mod_{name}" for name in ("mpm_prefork", "authz_core", "dir", "mime")}
    modules["php_module"] = _newest("/usr/lib/apache2/modules/libphp*.so").stem
    for file in modules.values():
        layer.program(Path(f"/usr/lib/apache2/modules/{file}.so"))
    loaded = "\n".join(f"LoadModule {name} /usr/lib/apache2/modules/{file}.so" for name, file in modules.items())
    layer.text("/etc/apache2/apache2.conf", _APACHE_CONF.format(modules=loaded, root=root, more=more))
    layer.text("/etc/mime.types", "text/html html\ntext/plain txt\ntext/css css\nimage/gif gif\n")
    return layer


_WORDPRESS = Path("/usr/share/wordpress")
_WORDPRESS_MODULES = ("mysqlnd", "mysqli", "ctype", "exif", "fileinfo", "iconv", "tokenizer")
# The names are those of the official image's environment. No page may ask anything of anybody else.
_WORDPRESS_CONFIG = """\
<?php
define('DB_HOST', getenv('WORDPRESS_DB_HOST'));
define('DB_USER', getenv('WORDPRESS_DB_USER'));
define('DB_PASSWORD', getenv('WORDPRESS_DB_PASSWORD'));
define('DB_NAME', getenv('WORDPRESS_DB_NAME'));
define('WP_CONTENT_DIR', '/usr/share/wordpress/wp-content');
define('WP_HTTP_BLOCK_EXTERNAL', true);
"""


def _wordpress() -> list[Layer]:
    """Debian's package on Apache and PHP, with the usual number of processes and the opcode cache."""
    server = _apache_and_php(str(_WORDPRESS), "")
    modules = _newest("/usr/lib/php/*/opcache.so").parent
    for name in ("opcache", *_WORDPRESS_MODULES):
        server.program(modules / f"{name}.so")
    extensions = "".join(f"extension={name}\n" for name in _WORDPRESS_MODULES)
    # Where Debian's build looks: /etc/php/8.2/apache2/php.ini.
    version = _newest("/etc/php/*/apache2").parent.name
    server.text(f"/etc/php/{version}/apache2/php.ini", f"zend_extension=opcache\n{extensions}")
    # Debian's PHP has no time zones of its own, and crashes without these.
    server.tree(Path("/usr/share/zoneinfo"))
    site = Layer()
    site.text("/etc/wordpress/config-default.php", _WORDPRESS_CONFIG)
    site.tree(_WORDPRESS)
    # Links lead there.
    for library in ("javascript", "php"):
        site.tree(_WORDPRESS.with_name(library))
    return [_base(), server, site]


def _memcached() -> list[Layer]:
    layer = Layer()
    layer.program(Path("/usr/bin/memcached"))
    return [_base(), layer]


def _etcd() -> list[Layer]:
    layer = Layer()
    layer.program(Path("/usr/bin/etcd"))
    return [_base(), layer]


def _newest(pattern: str) -> Path:
    """The file of the highest version in its path. Raises LabError if none is there."""
    found = sorted(Path("/").glob(pattern.lstrip("/")), key=lambda p: [int(n) for n in re.findall(r"\d+", str(p))])
    if not found:
        raise LabError(f"Cannot find {pattern}, which an image needs", "`make setup` installs what is missing")
    return found[-1]


def _initialised(name: str, program: Path, recipe: str, initialise: Callable[[Path], None]) -> Path:
    """A database's first files, made once per `program` (as it is now) and `recipe` (the words that say how)."""
    seen = program.stat()
    made_of = f"{program}{seen.st_size}{seen.st_mtime_ns}{recipe}".encode()
    target = CACHE / f"{name}-data-{hashlib.sha256(made_of).hexdigest()[:16]}"
    if not target.exists():
        # Their own users make them, and may not be able to look into the checkout.
        with tempfile.TemporaryDirectory(prefix=f"criproxy-lab-{name}-") as place:
            os.chmod(place, 0o711)
            made = Path(place, "data")
            made.mkdir(mode=0o700)
            initialise(made)
            unfinished = target.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(made, unfinished)
        for old in CACHE.glob(f"{name}-data-{'?' * 16}"):
            shutil.rmtree(old)
        unfinished.rename(target)
    return target


def _as_user(number: int, directory: Path, *argv: str | os.PathLike[str]) -> list[str | os.PathLike[str]]:
    """The command as a user, who need not have a name here, and owns the folder."""
    os.chown(directory, number, number)
    identity = [f"--reuid={number}", f"--regid={number}", "--clear-groups"]
    return ["env", "-C", directory, "setpriv", *identity, "--", *argv]


# Large enough for the lab, and quick to copy.
_MARIADB_SIZES = ["--innodb-log-file-size=4M", "--innodb-buffer-pool-size=16M"]
# As in the official image: no name server is asked before a client is greeted.
_MARIADB_OPTIONS = [*_MARIADB_SIZES, "--skip-name-resolve"]
_MARIADB_USER = "CREATE USER lab IDENTIFIED BY 'lab';\nGRANT ALL ON *.* TO lab;\nCREATE DATABASE lab;\n"


def _mariadb() -> list[Layer]:
    program = Path("/usr/sbin/mariadbd")
    share = _newest("/usr/share/m[ya][sr]*/*_system_tables.sql").parent
    parts = [_newest(f"{share}/*_{part}.sql") for part in ("system_tables", "performance_tables", "system_tables_data")]

    def initialise(directory: Path) -> None:
        script = directory.with_name("script.sql")
        # What mariadb-install-db does, which wants a program of another package. One statement a line.
        begin = "CREATE DATABASE mysql;\nUSE mysql;\nSET @auth_root_socket=NULL, @skip_auth_anonymous=1;\n"
        script.write_text(
            begin + "\n".join([*(part.read_text() for part in parts), "FLUSH PRIVILEGES;", _MARIADB_USER])
        )
        options = ["--no-defaults", "--bootstrap", f"--datadir={directory}", *_MARIADB_SIZES]
        server = _as_user(101, directory, program, *options)
        run(["sh", "-c", 'script=$1; shift; "$@" <"$script"', "sh", script, *server])

    layer = Layer()
    layer.program(program)
    layer.program(Path("/usr/bin/mariadb"))
    layer.tree(share / "charsets")
    layer.tree(share / "english")
    layer.directory("/run/mysqld", owner=101)
    data = Layer()
    recipe = f"{_MARIADB_SIZES}{_MARIADB_USER}"
    data.tree(_initialised("mariadb", program, recipe, initialise), "/var/lib/mysql", owner=101)
    return [_base(), layer, data]


_NOBODY = 65534
_POSTGRESQL_INIT = ["--auth=trust", "--encoding=UTF8", "--locale=C", "--wal-segsize=1", "--no-sync"]
_POSTGRESQL_CONF = """
listen_addresses = '*'
timezone = 'GMT'
log_timezone = 'GMT'
unix_socket_directories = '/run/postgresql'
"""
_POSTGRESQL_CLIENTS = "host all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n"


def _postgresql() -> list[Layer]:
    home = _newest("/usr/lib/postgresql/*/bin/postgres").parent.parent
    program = home / "bin" / "postgres"

    def initialise(directory: Path) -> None:
        # initdb wants a user who has a name on this machine; in the image the files are the server's.
        run(_as_user(_NOBODY, directory, home / "bin" / "initdb", "--username=lab", *_POSTGRESQL_INIT, directory))
        for name, more in (("postgresql.conf", _POSTGRESQL_CONF), ("pg_hba.conf", _POSTGRESQL_CLIENTS)):
            with (directory / name).open("a") as file:
                file.write(more)

    layer = Layer()
    layer.program(program)
    layer.symlink("/usr/bin/postgres", str(program))
    # Not the compiler of expressions, which brings all of LLVM.
    for library in sorted((home / "lib").glob("*.so")):
        if library.stem in ("plpgsql", "dict_snowball"):
            layer.program(library)
    layer.tree(Path("/usr/share/postgresql", home.name, "timezonesets"))
    layer.tree(Path("/usr/share/postgresql", home.name, "tsearch_data"))
    layer.directory("/run/postgresql", owner=103)
    data = Layer()
    recipe = f"{_POSTGRESQL_INIT}{_POSTGRESQL_CONF}{_POSTGRESQL_CLIENTS}"
    data.tree(_initialised("postgresql", program, recipe, initialise), "/var/lib/postgresql/data", owner=103)
    return [_base(), layer, data]


RECIPES: dict[str, Recipe] = {
    "pause": Recipe(_pause, entrypoint=["/pause"]),
    "busybox": Recipe(lambda: [_base()], command=["sh"]),
    "redis": Recipe(
        _redis,
        entrypoint=["redis-server"],
        command=["--save", "", "--protected-mode", "no"],
        directory="/data",
        ports=["6379/tcp"],
    ),
    "nginx": Recipe(
        _nginx, entrypoint=["nginx"], command=["-g", "daemon off;"], stop_signal="SIGQUIT", ports=["80/tcp"]
    ),
    "hello": Recipe(_hello, entrypoint=["/hello"], ports=["8080/tcp"]),
    "apache-php": Recipe(
        _apache,
        entrypoint=["apache2"],
        command=["-d", "/etc/apache2", "-f", "apache2.conf", "-D", "FOREGROUND"],
        directory="/var/www",
        stop_signal="SIGWINCH",
        ports=["80/tcp"],
    ),
    "wordpress": Recipe(
        _wordpress,
        entrypoint=["apache2"],
        command=["-d", "/etc/apache2", "-f", "apache2.conf", "-D", "FOREGROUND"],
        directory=str(_WORDPRESS),
        stop_signal="SIGWINCH",
        ports=["80/tcp"],
    ),
    "mariadb": Recipe(
        _mariadb,
        entrypoint=["mariadbd"],
        command=["--no-defaults", "--datadir=/var/lib/mysql", "--socket=/run/mysqld/mysqld.sock", *_MARIADB_OPTIONS],
        directory="/var/lib/mysql",
        user="mysql",
        ports=["3306/tcp"],
        volumes=["/var/lib/mysql"],
    ),
    "postgresql": Recipe(
        _postgresql,
        entrypoint=["postgres"],
        command=["-D", "/var/lib/postgresql/data"],
        directory="/var/lib/postgresql",
        user="postgres",
        stop_signal="SIGINT",
        ports=["5432/tcp"],
        volumes=["/var/lib/postgresql/data"],
    ),
    "etcd": Recipe(
        _etcd,
        entrypoint=["etcd", "--data-dir=/data"],
        command=["--listen-client-urls=http://0.0.0.0:2379", "--advertise-client-urls=http://127.0.0.1:2379"],
        ports=["2379/tcp"],
    ),
    "memcached": Recipe(_memcached, entrypoint=["memcached"], user="memcache", ports=["11211/tcp"]),
}
# What every lab has from its start; others are imported when they are asked for.
USUAL = ("pause", "busybox", "redis", "nginx", "hello")
