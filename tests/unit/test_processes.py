"""What is read from /proc: of this very process, of children, and of made-up ones."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from criproxy.kernel import processes
from criproxy.kernel.processes import Process

ME = os.getpid()
STATUS = """\
Name:\tredis) (x
Umask:\t0022
State:\tS (sleeping)
Tgid:\t500
Pid:\t{tid}
NStgid:\t500\t7
NSpid:\t{tid}\t{ns}
CapInh:\t0000000000000001
CapPrm:\t0000000000000002
CapEff:\t0000000000000003
CapBnd:\t00000000a80425fb
CapAmb:\t0000000000000004
NoNewPrivs:\t1
Seccomp:\t2
Seccomp_filters:\t3
Cpus_allowed:\tb
Cpus_allowed_list:\t0-1,3
Mems_allowed:\t1
"""


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A /proc with process 500 (7 in its namespace), its thread 501 (9), and its child 600 made by that thread."""
    for tid, ns in ((500, 7), (501, 9)):
        task = tmp_path / "500/task" / str(tid)
        (task / "attr").mkdir(parents=True)
        (task / "status").write_text(STATUS.format(tid=tid, ns=ns))
        (task / "oom_score_adj").write_text("-5\n")
        (task / "attr/current").write_text("cri-containerd.apparmor.d (enforce)\n")
        (task / "children").write_text("600 " if tid == 501 else "")
    (tmp_path / "500/status").write_text(STATUS.format(tid=500, ns=7))
    stat = "500 (redis) (x) S 400 1 1 0 -1 0 0 0 0 0 150 50 0 0 20 0 1 0 12345 0 0\n"
    (tmp_path / "500/stat").write_text(stat)
    (tmp_path / "600/task/600").mkdir(parents=True)
    (tmp_path / "600/task/600/children").write_text("")
    (tmp_path / "600/stat").write_text(stat.replace("500 (", "600 (", 1).replace("S 400", "S 500"))
    return tmp_path


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_names_with_parentheses_do_not_shift_the_fields(proc: Path) -> None:
    assert processes.start_time(500, proc) == 12345
    assert processes.parent(500, proc) == 400


def test_numbers_inside_the_namespace(proc: Path) -> None:
    assert processes.ns_pid(500, proc) == 7


def test_attributes_of_every_thread_by_its_inner_number(proc: Path) -> None:
    found = processes.attributes([500, 999], proc)
    assert found.keys() == {7, 9}
    assert found[9] == processes.ThreadAttributes(
        label="cri-containerd.apparmor.d (enforce)",
        cap_inh=1,
        cap_prm=2,
        cap_eff=3,
        cap_bnd=0xA80425FB,
        cap_amb=4,
        no_new_privs=True,
        seccomp=2,
        seccomp_filters=3,
        oom_score_adj=-5,
        affinity=frozenset({0, 1, 3}),
    )


def test_a_kernel_without_security_module_has_no_labels(proc: Path) -> None:
    (proc / "500/task/501/attr/current").unlink()
    assert processes.attributes([500], proc)[9].label == ""


def test_zombies_have_no_attributes(proc: Path) -> None:
    status = proc / "500/task/501/status"
    status.write_text(status.read_text().replace("S (sleeping)", "Z (zombie)"))
    assert processes.attributes([500], proc).keys() == {7}


def test_children_of_any_thread(proc: Path) -> None:
    assert processes.children(500, proc) == [600]
    assert processes.tree(500, proc) == [500, 600]


def test_children_where_the_kernel_does_not_list_them(proc: Path) -> None:
    for task in (500, 501):
        (proc / f"500/task/{task}/children").unlink()
    assert processes.children(500, proc) == [600]


def test_a_process_that_is_gone(tmp_path: Path) -> None:
    for question in (processes.start_time, processes.ns_pid, processes.threads, processes.children, processes.parent):
        with pytest.raises(ProcessLookupError):
            question(500, tmp_path)
    assert not processes.alive(500, 12345, tmp_path)
    assert processes.tree(500, tmp_path) == []
    assert processes.socket_inodes([500], tmp_path) == set()
    assert processes.name(500, tmp_path) == ""
    assert processes.cmdline(500, tmp_path) == []
    assert processes.executable(500, tmp_path) == ""


def test_a_number_that_was_given_to_another_process(proc: Path) -> None:
    assert processes.alive(500, 12345, proc)
    assert not processes.alive(500, 12344, proc)


def test_a_zombie_is_not_alive(child: subprocess.Popen[bytes]) -> None:
    seen = Process.of(child.pid)
    assert seen.alive()
    assert not seen.ending()
    child.kill()
    until(lambda: not seen.alive())
    assert seen.ending()
    child.wait()


def test_this_process(child: subprocess.Popen[bytes]) -> None:
    assert processes.ns_pid(ME) == ME
    assert child.pid in processes.children(ME)
    assert processes.tree(ME)[0] == ME
    assert child.pid in processes.tree(ME)
    assert processes.threads(ME)[0] == ME
    assert processes.parent(child.pid) == ME
    assert {ME, child.pid} <= set(processes.in_namespace(ME))
    assert processes.in_namespace(ME, among=[child.pid, 4_000_000]) == sorted([ME, child.pid])
    until(lambda: processes.cmdline(child.pid) == [sys.executable, "-c", "input()"])
    assert processes.executable(child.pid) == os.path.realpath(sys.executable)


def test_affinity_is_each_threads_own() -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("needs two processors")
    started, done, tids = threading.Event(), threading.Event(), []

    def body() -> None:
        os.sched_setaffinity(0, {min(allowed)})
        tids.append(threading.get_native_id())
        started.set()
        done.wait()

    thread = threading.Thread(target=body)
    thread.start()
    try:
        started.wait()
        found = processes.attributes([ME])
        assert found[processes.ns_pid(tids[0])].affinity == {min(allowed)}
        assert found[processes.ns_pid(ME)].affinity == allowed
    finally:
        done.set()
        thread.join()


def test_sockets_by_inode() -> None:
    with socket.socket() as listener:
        inode = os.fstat(listener.fileno()).st_ino
        assert inode in processes.socket_inodes([ME])
    assert inode not in processes.socket_inodes([ME])


@pytest.mark.parametrize(("states", "found"), [("SS", None), ("SR", 500), ("DS", 500), ("ZI", None)])
def test_threads_at_work(tmp_path: Path, states: str, found: int | None) -> None:
    for tid, state in enumerate(states, 500):
        task = tmp_path / "500" / "task" / str(tid)
        task.mkdir(parents=True)
        (task / "stat").write_text(f"{tid} (redis) R x) {state} 1 500 500\n")
    assert processes.running([499, 500], tmp_path) == found


def test_a_thread_of_this_process_runs_now() -> None:
    assert processes.running([ME]) == ME
