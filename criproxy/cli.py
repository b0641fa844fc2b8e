"""The `criproxy` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from criproxy import config
from criproxy.config import Config, ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 it failed (the reason is on standard error), 2 the command line is wrong."""
    parser = argparse.ArgumentParser(
        prog="criproxy",
        description="Stateful scale-to-zero for any Kubernetes container: a proxy on the CRI socket that checkpoints "
        "idle containers and restores them on the first packet.",
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    serve = commands.add_parser(
        "serve",
        help="serve CRI to kubelet in front of containerd",
        description="Serves CRI to kubelet (kubelet --container-runtime-endpoint=unix:///run/criproxy/criproxy.sock) "
        "in front of containerd. Needs root. Settings come from flags over the configuration file over defaults.",
    )
    config.add_arguments(serve)
    serve.set_defaults(run=_serve)

    status = commands.add_parser(
        "status",
        help="show the containers of pods that opted in",
        description="Shows the containers of pods that opted in: their state, memory, and why one isn't scaled down.",
    )
    config.add_arguments(status, "control", "listen")
    status.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    status.set_defaults(run=_status)

    parsed = parser.parse_args(arguments)
    try:
        result: int = parsed.run(parsed, config.load(parsed))
    except (ConfigError, PermissionError) as error:
        return _failed(error)
    except KeyboardInterrupt:
        return 130
    return result


# Each command imports what it needs when it runs: people wait for `status`, and the daemon's modules take 0.3 s.


def _serve(_: argparse.Namespace, settings: Config) -> int:
    import asyncio

    from criproxy import daemon, log

    log.set_up(settings.log_level)
    try:
        asyncio.run(daemon.serve(settings))
    except daemon.CANT_BEGIN as error:
        return _failed(error)
    return 0


def _status(parsed: argparse.Namespace, settings: Config) -> int:
    from criproxy import status

    try:
        containers = status.ask(settings.control)
    except status.NoAnswer as error:
        return _failed(error)
    print(status.as_json(containers) if parsed.json else status.as_table(containers))
    return 0


def _failed(error: Exception) -> int:
    print(f"criproxy: {error}", file=sys.stderr)
    return 1


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"criproxy {version('criproxy')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
