"""What CRIU's logs mean, in words; the logs are CRIU's own, from dumps and restores that failed."""

import pytest

from criproxy.criu import criu_log

IO_URING = """\
Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted
pie: 7: Error (criu/pie/parasite.c:588): send_fds failed (-22)
Error (criu/parasite-syscall.c:280): Can't retrieve FDs from socket
Error (criu/cr-dump.c:1681): Dump files (pid: 7) failed with -1
Error (criu/cr-dump.c:2111): Dumping FAILED.
"""
MPTCP = """\
(00.012345) Error (criu/sk-inet.c:130): inet: Unsupported proto 262 for socket 6ae5a
(00.012399) Error (criu/cr-dump.c:2111): Dumping FAILED.
"""
SYSV = "Error (criu/cr-dump.c:460): Task 7 with SysVIPC shmem map @7ff3a271b000 doesn't live in IPC ns\n"
GONE = """\
Warn  (criu/config.c:1060): --network-lock will be ignored in restore command
     7: Error (criu/files-reg.c:2353): Can't open file data/file on restore: No such file or directory
     6: Error (criu/cr-restore.c:1258): 7 exited, status=1
Error (criu/cr-restore.c:2320): Restoring FAILED.
"""


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (IO_URING, 'it has a descriptor open that the kernel doesn\'t let CRIU have (CRIU: "send_fds failed (-22)")'),
        (
            MPTCP,
            "it listens with MPTCP, which CRIU can't dump (net.mptcp.enabled=0 in its network helps) "
            '(CRIU: "inet: Unsupported proto 262 for socket 6ae5a")',
        ),
        (
            SYSV,
            "it uses System V shared memory, which can't be dumped with it "
            '(CRIU: "Task 7 with SysVIPC shmem map @7ff3a271b000 doesn\'t live in IPC ns")',
        ),
        (
            GONE,
            "a file that it has open is gone "
            '(CRIU: "Can\'t open file data/file on restore: No such file or directory")',
        ),
        ("Error (criu/x.c:1): Something new\n", 'CRIU says "Something new"'),
        ("", "CRIU ended with code 9"),
        (
            "Warn  (criu/x.c:1): tired\nError (criu/cr-dump.c:2111): Dumping FAILED.\n",
            'CRIU ended with code 9 (its last words: "Error (criu/cr-dump.c:2111): Dumping FAILED.")',
        ),
    ],
)
def test_the_first_error_says_why(log: str, reason: str) -> None:
    assert criu_log.reason(log, "ended with code 9") == reason


def test_the_end_of_a_long_log_is_kept() -> None:
    assert criu_log.tail("\n".join(map(str, range(1000)))).splitlines()[0] == str(1000 - criu_log.LINES)
