/* Build: gcc -static -O2 -std=gnu11 -D_GNU_SOURCE -Wall -Wextra -o enter enter.c   (setup.py does it)
 *
 * enter --pidfd FD [--cgroup-fd FD]... [--cpu-affinity LIST] [--oom-score-adj N] [--without NAMESPACE]... -- FILE [ARG...]
 *
 * Runs FILE with this process's privileges inside the PID, mount, network, UTS, IPC and cgroup namespaces of the process
 * that the pidfd stands for. It is on the way of every wake, and what it starts (CRIU) starts the container's processes,
 * which inherit from it. It guarantees:
 *
 * - FILE starts in the cgroups that are open as the --cgroup-fd descriptors (v2: the folder; v1: the file `tasks`); this
 *   process itself stays where it is, in the host's cgroups and namespaces (but that its children are in the PID
 *   namespace), out of the container's sight. Neither way takes the kernel's lock over all processes, which a write to
 *   cgroup.procs waits 10 to 20 ms for (an RCU grace period).
 * - FILE runs in a session of its own (no Ctrl-C of a terminal reaches it), and with a session keyring of its own: the keys
 *   that this process possesses would otherwise become those of the container's processes.
 * - FILE has the processors (0-2,5) and the oom_score_adj that are given, as far as the kernel lets it.
 * - FILE inherits the descriptors that this process got, without the ones named by options.
 * - FILE is killed when this process is; what FILE has started isn't.
 * - The exit code is FILE's, or 128+n after signal n; 125 and a line on stderr if it couldn't be started.
 * - --without (mnt, net, uts, ipc, cgroup) leaves FILE in our namespace of that kind.
 *
 * FILE is looked up (no PATH) in the container's mount namespace: name only what the container can't change.
 * setns() on a pidfd is Linux 5.8, which the eBPF ring buffer needs as well.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/keyctl.h>
#include <linux/sched.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { FAILED = 125, MAX_CGROUPS = 32 };

static const struct {
	const char *name;
	int flag;
} kinds[] = {
	{ "mnt", CLONE_NEWNS }, { "net", CLONE_NEWNET },    { "uts", CLONE_NEWUTS },
	{ "ipc", CLONE_NEWIPC }, { "cgroup", CLONE_NEWCGROUP },
};
enum { KINDS = sizeof kinds / sizeof *kinds };

static _Noreturn void fail(const char *what)
{
	dprintf(2, "enter: %s: %s\n", what, strerror(errno));
	_exit(FAILED);
}

static _Noreturn void refuse(const char *option)
{
	dprintf(2, "enter: wrong option or value: %s\n", option);
	_exit(FAILED);
}

static long number(const char *text)
{
	char *end;
	long value;

	errno = 0;
	value = strtol(text, &end, 10);
	if (end == text || *end || errno)
		refuse(text);
	return value;
}

/* 0-2,5 */
static void processors(const char *text, cpu_set_t *set)
{
	char *end;

	CPU_ZERO(set);
	for (;; text = end + 1) {
		long first = strtol(text, &end, 10), last = first;

		if (end != text && *end == '-')
			last = strtol(end + 1, &end, 10);
		if (end == text || first < 0 || last >= CPU_SETSIZE)
			refuse(text);
		for (long cpu = first; cpu <= last; cpu++)
			CPU_SET(cpu, set);
		if (!*end)
			return;
		if (*end != ',')
			refuse(text);
	}
}

/* As far as it goes: without CAP_SYS_RESOURCE the value can't go below what it was. Whoever restores compares afterwards. */
static void set_oom_score_adj(const char *value)
{
	int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return;
	if (write(fd, value, strlen(value)) < 0 && errno != EACCES)
		fail("oom_score_adj");
	close(fd);
}

static int is_folder(int fd)
{
	struct stat seen;

	if (fstat(fd, &seen) < 0)
		fail("a cgroup's descriptor");
	return S_ISDIR(seen.st_mode);
}

/* For the calling process, which has one thread: of v1's files only `tasks` may be written without the lock. */
static void join_cgroup(int fd)
{
	int file = is_folder(fd) ? openat(fd, "cgroup.procs", O_WRONLY | O_CLOEXEC) : fd;

	if (file < 0 || write(file, "0", 1) < 0)
		fail("join a cgroup");
	if (file != fd)
		close(file);
}

/* fork() into the v2 cgroup whose folder is open as `fd`, or -1 with an error if that isn't possible (before Linux 5.7; the
 * cgroup is full, which a process that joins it may ignore). */
static pid_t fork_into(int fd)
{
	struct clone_args how = { .flags = CLONE_INTO_CGROUP, .exit_signal = SIGCHLD, .cgroup = fd };

	return syscall(SYS_clone3, &how, sizeof how);
}

static void die_with(int parent_pidfd)
{
	struct pollfd parent = { .fd = parent_pidfd, .events = POLLIN };

	if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
		fail("PR_SET_PDEATHSIG");
	/* It may have died before that. getppid() can't tell, it is 0 in a namespace of which the parent is no member. */
	if (poll(&parent, 1, 0) != 0)
		_exit(FAILED);
	close(parent_pidfd);
}

int main(int argc, char **argv)
{
	int pidfd = -1, cgroups[MAX_CGROUPS], cgroup_count = 0, unified = -1, flags = 0, affinity = 0, self, how;
	const char *oom_score_adj = NULL;
	cpu_set_t cpus;
	pid_t child;
	int index = 1;

	for (int kind = 0; kind < KINDS; kind++)
		flags |= kinds[kind].flag;
	for (; index + 1 < argc && strcmp(argv[index], "--") != 0; index += 2) {
		const char *option = argv[index], *value = argv[index + 1];

		if (strcmp(option, "--pidfd") == 0) {
			pidfd = number(value);
		} else if (strcmp(option, "--cgroup-fd") == 0 && cgroup_count < MAX_CGROUPS) {
			cgroups[cgroup_count++] = number(value);
		} else if (strcmp(option, "--cpu-affinity") == 0) {
			processors(value, &cpus);
			affinity = 1;
		} else if (strcmp(option, "--oom-score-adj") == 0) {
			number(value);
			oom_score_adj = value;
		} else if (strcmp(option, "--without") == 0) {
			int kind = 0;

			while (kind < KINDS && strcmp(kinds[kind].name, value) != 0)
				kind++;
			if (kind == KINDS)
				refuse(value);
			flags &= ~kinds[kind].flag;
		} else {
			refuse(option);
		}
	}
	if (pidfd < 0 || index + 1 >= argc || strcmp(argv[index], "--") != 0)
		refuse(index < argc ? argv[index] : "(none)");
	argv += index + 1;

	setsid();
	self = syscall(SYS_pidfd_open, getpid(), 0);
	if (self < 0)
		fail("pidfd_open");
	/* For the children; this process stays in its PID namespace. */
	if (setns(pidfd, CLONE_NEWPID) < 0)
		fail("setns (PID namespace)");
	for (int i = 0; i < cgroup_count; i++)
		if (is_folder(cgroups[i]))
			unified = cgroups[i];
	child = unified < 0 ? -1 : fork_into(unified);
	if (child < 0) {
		unified = -1;
		child = fork();
	}
	if (child < 0)
		fail("fork");
	if (child == 0) {
		die_with(self);
		setsid();
		for (int i = 0; i < cgroup_count; i++) {
			if (cgroups[i] != unified)
				join_cgroup(cgroups[i]);
			close(cgroups[i]);
		}
		/* Without a container's cgroup the host's processors would be wrong, so after it; EINVAL: none of them is left. */
		if (affinity && sched_setaffinity(0, sizeof cpus, &cpus) < 0 && errno != EINVAL)
			fail("sched_setaffinity");
		if (oom_score_adj)
			set_oom_score_adj(oom_score_adj);
		/* ENOSYS: a kernel without keys. */
		if (syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL) < 0 && errno != ENOSYS)
			fail("new session keyring");
		if (flags && setns(pidfd, flags) < 0) {
			/* A kernel without cgroup namespaces refuses the whole call. */
			if (errno != EINVAL || setns(pidfd, flags & ~CLONE_NEWCGROUP) < 0)
				fail("setns");
		}
		close(pidfd);
		execv(argv[0], argv);
		fail(argv[0]);
	}
	close(pidfd);
	while (waitpid(child, &how, 0) < 0)
		if (errno != EINTR)
			fail("waitpid");
	return WIFSIGNALED(how) ? 128 + WTERMSIG(how) : WEXITSTATUS(how);
}
