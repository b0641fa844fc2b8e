"""What `criproxy status` makes of the daemon's answer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from criproxy import cli, status
from criproxy.api import control_pb2 as api


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch) -> api.ContainerStatus:
    """The one that the daemon tells of."""
    made = api.ContainerStatus(namespace="default", pod="web-0", container="web", state="running", restores=3)

    def ask(path: Path) -> list[api.ContainerStatus]:
        return [made]

    monkeypatch.setattr(status, "ask", ask)
    return made


def shown(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert cli.main(["status", *options]) == 0
    return capsys.readouterr().out


def test_a_full_parking_is_told_with_the_reason(
    container: api.ContainerStatus, capsys: pytest.CaptureFixture[str]
) -> None:
    container.parking.CopyFrom(api.Parking(packets=2000, overflowed=12))
    assert shown(capsys).endswith("  the parking was full for 12 packets\n")
    container.reason = "it was used lately"
    assert shown(capsys).endswith("  it was used lately; the parking was full for 12 packets\n")


def test_a_parking_that_had_room_is_not_told(
    container: api.ContainerStatus, capsys: pytest.CaptureFixture[str]
) -> None:
    container.parking.CopyFrom(api.Parking(packets=2000))
    assert shown(capsys).endswith("  -\n")


def test_json_has_all_counters(container: api.ContainerStatus, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(shown(capsys, "--json"))[0]["parking"] is None
    container.parking.CopyFrom(
        api.Parking(packets=2, bytes=120, overflowed=1, dropped=3, quiet=4, answered=5, corrupt=6)
    )
    parking = json.loads(shown(capsys, "--json"))[0]["parking"]
    assert parking == {
        "packets": 2, "bytes": 120, "overflowed": 1, "dropped": 3, "quiet": 4, "answered": 5, "corrupt": 6,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("run", "left_out"),
    [
        ("try: cli.main(['status', '--help'])\nexcept SystemExit: pass", ("grpc", "asyncio")),
        ("cli.main(['status', '--control', '/nowhere/control.sock'])", ("criproxy.node", "criproxy.daemon")),
    ],
)
def test_a_command_imports_what_it_needs(run: str, left_out: tuple[str, ...]) -> None:
    program = f"import sys\nfrom criproxy import cli\n{run}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert not {*left_out} & {*done.stdout.splitlines()[-1].split()}
