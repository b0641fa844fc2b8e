"""Flags over file over defaults, and the sentences for what can't be used."""

import argparse
import dataclasses
import io
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from criproxy import config, log
from criproxy.config import Config, ConfigError


@pytest.fixture(autouse=True)
def no_file_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "DEFAULT_CONFIG", tmp_path / "absent.toml")


def load(*arguments: str) -> Config:
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    return config.load(parser.parse_args(arguments))


def file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return str(path)


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    return str(caught.value)


class TestLayers:
    def test_defaults(self) -> None:
        result = load()
        assert result == Config()
        assert result.listen == Path("/run/criproxy/criproxy.sock")
        assert result.run_dir == Path("/run/criproxy")
        assert result.runtime_endpoint == Path("/run/containerd/containerd.sock")
        assert result.scaledown_duration == 60
        assert result.cpu_activity_percent == 5

    def test_the_file_over_defaults(self, tmp_path: Path) -> None:
        text = """
            listen = "unix:///run/a/b.sock"
            state-dir = "/srv/state"
            cpu_activity_percent = 2.5
            parking-packets = 10
            parking-bytes = "2MiB"
            scaledown-duration = "1m30s"
            log-level = "debug"
        """
        result = load("--config", file(tmp_path, text))
        assert result == Config(
            listen=Path("/run/a/b.sock"),
            control=Path("/run/a/control.sock"),
            state_dir=Path("/srv/state"),
            cpu_activity_percent=2.5,
            parking_packets=10,
            parking_bytes=2 << 20,
            scaledown_duration=90.0,
            log_level="debug",
        )

    def test_flags_over_the_file(self, tmp_path: Path) -> None:
        path = file(tmp_path, 'state-dir = "/from/file"\nlog-level = "error"\ncontrol = "/run/c.sock"')
        result = load("--config", path, "--state-dir", "/from/flag")
        assert (result.state_dir, result.log_level) == (Path("/from/flag"), "error")
        assert result.control == Path("/run/c.sock")

    def test_the_usual_file_is_read_if_it_is_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(config, "DEFAULT_CONFIG", Path(file(tmp_path, 'log-level = "error"')))
        assert load().log_level == "error"

    def test_control_is_beside_listen(self) -> None:
        assert load("--listen", "unix:///run/x/y.sock").control == Path("/run/x/control.sock")

    def test_every_setting_has_a_flag(self) -> None:
        parser = argparse.ArgumentParser()
        config.add_arguments(parser)
        text = parser.format_help()
        for field in dataclasses.fields(Config):
            assert f"--{field.name.replace('_', '-')} " in text
        assert re.search(r"default:\s+unix:///run/containerd/containerd\.sock", text)

    def test_a_command_can_take_some_of_the_flags(self) -> None:
        parser = argparse.ArgumentParser()
        config.add_arguments(parser, "listen", "control")
        assert config.load(parser.parse_args(["--control", "/run/c.sock"])).control == Path("/run/c.sock")
        with pytest.raises(SystemExit):
            parser.parse_args(["--state-dir", "/x"])


class TestKubelet:
    def test_defaults(self) -> None:
        result = load()
        assert (result.kubelet_cgroup, result.kubelet_process, result.kubelet_addresses) == (None, "kubelet", ())

    def test_a_cgroup(self) -> None:
        for value in ("system.slice/kubelet.service", "/system.slice/kubelet.service/"):
            assert load("--kubelet-cgroup", value).kubelet_cgroup == "system.slice/kubelet.service"
        assert load("--kubelet-cgroup", "").kubelet_cgroup is None

    @pytest.mark.parametrize("value", ['["10.0.0.1", "fd00::1"]', '"10.0.0.1, fd00:0::1"'])
    def test_addresses(self, tmp_path: Path, value: str) -> None:
        path = file(tmp_path, f"kubelet-addresses = {value}")
        assert load("--config", path).kubelet_addresses == ("10.0.0.1", "fd00::1")

    def test_too_many_addresses(self) -> None:
        many = ",".join(f"10.0.0.{n}" for n in range(65))
        assert refusal("--kubelet-addresses", many).endswith("has 65 addresses; there may be 64")


class TestSockets:
    @pytest.mark.parametrize("value", ["unix:///run/a.sock", "unix:/run/a.sock", "/run/a.sock"])
    def test_forms(self, value: str) -> None:
        assert load("--listen", value).listen == Path("/run/a.sock")

    @pytest.mark.parametrize("value", ["", "run/a.sock", "unix://run/a.sock", "tcp://1.2.3.4:5", "/run/", "unix://"])
    def test_others(self, value: str) -> None:
        assert refusal("--runtime-endpoint", value) == (
            f'--runtime-endpoint: "{value}" is no Unix socket; the form is unix:///run/criproxy/criproxy.sock'
        )

    def test_the_kernels_limit(self) -> None:
        assert load("--listen", "/" + "a" * 106).listen
        assert "is too long for a Unix socket; its path may have 107 bytes" in refusal("--listen", "/" + "a" * 107)

    def test_two_on_one_path(self) -> None:
        sentence = refusal("--listen", "/run/containerd/containerd.sock")
        assert (
            sentence
            == "listen and runtime-endpoint are both /run/containerd/containerd.sock; each needs a socket of its own"
        )


class TestRefusals:
    @pytest.mark.parametrize(
        ("flag", "value", "reason"),
        [
            ("--state-dir", "var/lib", "is no absolute path"),
            ("--criu-root", "", "is no absolute path"),
            ("--log-level", "loud", "is none of debug, info, warning, error"),
            ("--cpu-activity-percent", "0", "must be above 0; 100 is one whole core"),
            ("--cpu-activity-percent", "much", "is no number"),
            ("--cpu-activity-percent", "nan", "is no number"),
            ("--parking-packets", "0", "must be 1 or more"),
            ("--parking-packets", "1.5", "is no whole number"),
            ("--parking-bytes", "4MB", 'is no whole number; give bytes, or a size such as "4MiB"'),
            ("--kubelet-cgroup", "/a/../b", "is no path below the root of cgroup v2"),
            ("--kubelet-cgroup", "/", "is the root cgroup, which has every process of the node"),
            ("--kubelet-process", "", "is no name of a process"),
            ("--kubelet-process", "/usr/bin/kubelet", "is no name of a process"),
            ("--kubelet-process", "longer-than-comm", "is no name of a process"),
            ("--kubelet-addresses", "10.0.0.1,node1", 'has "node1", which is no IP address'),
            ("--kubelet-addresses", "10.0.0.0/8", 'has "10.0.0.0/8", which is no IP address'),
            ("--scaledown-duration", "60", 'lacks a unit; "60s" would be seconds'),
            ("--scaledown-duration", "-1s", 'is negative; "0" never scales down'),
        ],
    )
    def test_a_value(self, flag: str, value: str, reason: str, tmp_path: Path) -> None:
        assert refusal(f"{flag}={value}").startswith(f'{flag}: "{value}" {reason}')
        path = file(tmp_path, f'{flag.removeprefix("--")} = "{value}"')
        assert refusal("--config", path).startswith(f'{path}: {flag.removeprefix("--")}: "{value}" {reason}')

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("parking-packets = true", "is no whole number"),
            ("parking-packets = 1.5", "is no whole number"),
            ("parking-packets = [1]", "is no whole number"),
            ("cpu-activity-percent = inf", "is no number"),
            ("state-dir = 1", "is no absolute path"),
            ("listen = 1", "is no Unix socket"),
            ("kubelet-cgroup = 1", "is no path below the root of cgroup v2"),
            ("kubelet-addresses = 1", "is no list of IP addresses"),
            ("kubelet-addresses = [1]", 'has "1", which is no IP address'),
            ("log-level = 1", "is none of"),
            ("scaledown-duration = 60", "lacks a unit"),
        ],
    )
    def test_a_value_of_the_wrong_type(self, line: str, reason: str, tmp_path: Path) -> None:
        assert reason in refusal("--config", file(tmp_path, line))

    def test_an_unknown_key(self, tmp_path: Path) -> None:
        assert "statedir is no setting; did you mean state-dir?" in refusal(
            "--config", file(tmp_path, 'statedir = "/x"')
        )
        sentence = refusal("--config", file(tmp_path, "[xyz]"))
        assert "xyz is no setting; there are listen, runtime-endpoint, control" in sentence

    def test_a_key_in_both_spellings(self, tmp_path: Path) -> None:
        path = file(tmp_path, 'state-dir = "/x"\nstate_dir = "/y"')
        assert "state-dir is given twice" in refusal("--config", path)

    def test_what_isnt_toml(self, tmp_path: Path) -> None:
        path = file(tmp_path, "state-dir: /x")
        assert refusal("--config", path).startswith(f"{path}: the configuration file isn't TOML: ")

    def test_a_file_that_was_named_and_isnt_there(self, tmp_path: Path) -> None:
        assert "there is no such configuration file" in refusal("--config", str(tmp_path / "none.toml"))

    def test_a_file_that_cant_be_read(self, tmp_path: Path) -> None:
        assert "can't be read: Is a directory" in refusal("--config", str(tmp_path))
        path = tmp_path / "latin"
        path.write_bytes(b"# \xe9")
        assert "can't be read: it isn't UTF-8" in refusal("--config", str(path))


class TestLog:
    @pytest.fixture(autouse=True)
    def restored(self) -> Iterator[None]:
        root = logging.getLogger()
        handlers, level = list(root.handlers), root.level
        yield
        root.handlers[:] = handlers
        root.setLevel(level)

    def test_text_has_the_time(self) -> None:
        stream = io.StringIO()
        log.set_up("info", stream, {"JOURNAL_STREAM": "8:123"})
        logging.getLogger("criproxy.x").info("hello")
        logging.getLogger("criproxy.x").debug("unseen")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO    criproxy\.x: hello\n", stream.getvalue())

    def test_the_journal_gets_a_priority_in_each_line(self, tmp_path: Path) -> None:
        with (tmp_path / "stream").open("w+") as stream:
            status = os.fstat(stream.fileno())
            log.set_up("debug", stream, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
            logger = logging.getLogger("c")
            logger.debug("d")
            logger.warning("two\nlines")
            try:
                raise ValueError("bad")
            except ValueError:
                logger.exception("e")
            stream.seek(0)
            lines = stream.read().splitlines()
        assert lines[:3] == ["<7>c: d", "<4>c: two", "<4>lines"]
        assert lines[3] == "<3>c: e"
        assert len(lines) > 5
        assert all(line.startswith("<3>") for line in lines[3:])

    def test_a_second_set_up_replaces_the_first(self) -> None:
        first, second = io.StringIO(), io.StringIO()
        log.set_up("info", first, {})
        log.set_up("error", second, {})
        logging.getLogger("c").error("once")
        assert not first.getvalue()
        assert second.getvalue().count("once") == 1
