"""What is kept of a container's threads beside a checkpoint."""

import os
from pathlib import Path

import pytest

from criproxy.criu.saved import Saved
from criproxy.kernel import processes
from criproxy.kernel.processes import ThreadAttributes

THREAD = ThreadAttributes(
    label="docker-default (enforce)",
    cap_inh=0,
    cap_prm=0xA80425FB,
    cap_eff=0xA80425FB,
    cap_bnd=0xA80425FB,
    cap_amb=0,
    no_new_privs=True,
    seccomp=2,
    seccomp_filters=1,
    oom_score_adj=500,
    affinity=frozenset({0, 2}),
)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    saved = Saved(6, {6: THREAD, 7: THREAD})
    saved.write(tmp_path / "checkpoint.json")
    assert Saved.read(tmp_path / "checkpoint.json") == saved
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.json"]


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"guard": 6, "threads": {"6": {}}}', '{"guard": 6, "threads": {"6": []}}']
)
def test_anything_else_is_a_value_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.json").write_text(text)
    with pytest.raises(ValueError, match=r"checkpoint\.json|Expecting"):
        Saved.read(tmp_path / "checkpoint.json")


def test_who_uses_all_of_the_containers_processors_follows_them() -> None:
    """This process stands for the container's first one and for the application."""
    own, tid = os.getpid(), processes.ns_pid(os.getpid())
    before = os.sched_getaffinity(0)
    saved = Saved.of(own, own, [own], {})
    assert saved.attributes[tid].affinity == frozenset()
    try:
        os.sched_setaffinity(0, {min(before)})
        assert saved.compare([own]) == []
        assert os.sched_getaffinity(0) == {min(before)}
    finally:
        os.sched_setaffinity(0, before)


def test_who_has_chosen_its_processors_gets_them_again() -> None:
    own, tid = os.getpid(), processes.ns_pid(os.getpid())
    before = os.sched_getaffinity(0)
    saved = Saved(tid, {tid: processes.attributes([own])[tid]})
    try:
        os.sched_setaffinity(0, {min(before)})
        assert saved.compare([own]) == []
        assert os.sched_getaffinity(0) == before
    finally:
        os.sched_setaffinity(0, before)
