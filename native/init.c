/* Build: gcc -static -O2 -std=gnu11 -D_GNU_SOURCE -Wall -Wextra -o init init.c   (setup.py does it)
 *
 * init -- COMMAND [ARGUMENT...]
 *
 * PID 1 of a container that criproxy may checkpoint. It guarantees:
 *
 * - COMMAND runs as it would as the container's own first process: the arguments, environment, working directory,
 *   descriptors, signal mask and dispositions that this program was started with, a session of its own. It is looked up in
 *   PATH as runc does. A missing one ends with 127, one that can't be executed with 126, and a line on stderr.
 * - The container ends when COMMAND ends, with its exit code, or 128+n after signal n. Orphans are reaped.
 * - Every signal that this process gets is passed on to COMMAND (kill(2)'s rules apply: without CAP_KILL and with another
 *   uid that fails, and criproxy does it from outside). From outside the container's PID namespace, three are commands
 *   instead:
 *     HOLD     the end of COMMAND isn't the end of the container any more: its status is remembered. CRIU may now dump and
 *              kill the tree below, and restore it with the same pids.
 *     RELEASE  the opposite. If the tree is there: go on. If not: end with the remembered status.
 *     START    (while held) start COMMAND afresh.
 *   They are obeyed in their order and before any child's end is looked at, so that the sender needs no answer: what it does
 *   to the tree after kill() has returned is seen by this process after the command. (Only HOLD after a RELEASE that is still
 *   pending would be seen in the wrong order: the kernel delivers lower numbers first. The sender looks at ShdPnd before.)
 *   While it is held, COMMAND may be in the middle of a dump or of a restore, or not be there at all: other signals are kept,
 *   and passed on when it goes on. Those that ask for an end (SIGTERM, SIGINT, SIGQUIT) end the container if nothing of the
 *   tree is there. criproxy wakes a container before it lets it be stopped, so they come from elsewhere: from systemd, say,
 *   which otherwise waits 90 s for sleeping containers when the machine is shut down.
 * - CRIU can dump the tree below without touching this process: between the two stands the *guard*, the root of what is
 *   dumped, a subreaper, so that also daemons belong to the tree. It holds nothing: no descriptor, no timer, no memory that
 *   is shared with this process. Its name (comm) is "guard N", N being COMMAND's pid, for criproxy to read.
 *
 * What a container does to its own PID 1 (ptrace it, starve it) harms that container alone: criproxy trusts nothing that this
 * process says. "From outside" is si_code == SI_USER and si_pid == 0: kill() from inside carries the sender's pid, and with
 * rt_sigqueueinfo() a process may forge si_pid, but then not si_code. (Whoever overflows the queue of pending signals makes
 * the kernel drop the sender's pid, and so can steer its own init, as with ptrace.) This process stays dumpable on purpose:
 * applications write to /proc/1/fd/1.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

/* As the kernel numbers them; libc's SIGRTMIN leaves some of the range to itself. criu/init.py has the same ones. */
enum { HOLD = 61, RELEASE = 62, START = 63 };

enum { CANNOT_EXECUTE = 126, NOT_FOUND = 127, INIT_FAILED = 125 };

/* The kernel's signal sets: libc's leave out 32 and 33, which would then stay unblocked. */
typedef uint64_t signals;
#define ONE(signum) (1ULL << ((signum) - 1))

static const signals orders = ONE(HOLD) | ONE(RELEASE) | ONE(START);

static char **command;
static signals inherited_mask;
static struct sigaction inherited_chld;

static pid_t guard;       /* the root of the tree below, 0 if there is none any more */
static pid_t application; /* COMMAND; a child of the guard, of ours if the guard was killed */
static int held;
static int application_ended, guard_ended; /* taken by reap(), not yet decided upon */
static signals kept; /* what came for the application while held */
static int status; /* wait status of the application, or of the guard if that died before there was one */

static void change_mask(int how, signals set, signals *old)
{
	syscall(SYS_rt_sigprocmask, how, &set, old, sizeof set);
}

/* The next pending signal of the set, or -1 if there is none within the time. */
static int next_signal(signals set, siginfo_t *info, const struct timespec *timeout)
{
	int signum;

	do
		signum = syscall(SYS_rt_sigtimedwait, &set, info, timeout, sizeof set);
	while (signum < 0 && errno == EINTR);
	return signum;
}

static void complain(const char *what, const char *name, int error)
{
	const char *text = strerrordesc_np(error);
	struct iovec line[] = {
		{ "criproxy-init: ", 15 },
		{ (char *)what, strlen(what) },
		{ " \"", 2 },
		{ (char *)name, strlen(name) },
		{ "\": ", 3 },
		{ (char *)text, strlen(text) },
		{ "\n", 1 },
	};

	if (writev(2, line, sizeof line / sizeof *line) < 0)
		return;
}

/* Go's LookPath, which runc uses, rather than execvp(): no detour over /bin/sh for a file without a known format. */
static _Noreturn void execute(void)
{
	const char *name = command[0], *path = getenv("PATH");
	size_t name_length = strlen(name);
	int error = ENOENT;

	if (strchr(name, '/')) {
		execv(name, command);
		error = errno;
		path = NULL;
	}
	while (path && *path) {
		const char *end = strchrnul(path, ':');
		size_t length = end - path;
		char file[length + 1 + name_length + 1];
		struct stat status;

		memcpy(file, path, length);
		file[length] = '/';
		memcpy(file + length + 1, name, name_length + 1);
		/* An empty element of PATH would be the working directory; Go refuses what it finds there. */
		if (length && stat(file, &status) == 0 && !S_ISDIR(status.st_mode)) {
			execv(file, command);
			if (errno != EACCES) {
				error = errno;
				break;
			}
			error = EACCES;
		}
		path = *end ? end + 1 : NULL;
	}
	complain("exec", name, error);
	_exit(error == ENOENT || error == ENOTDIR ? NOT_FOUND : CANNOT_EXECUTE);
}

static _Noreturn void be_application(int report)
{
	pid_t self = getpid();

	/* Before any of the container's code runs: nothing that it does can keep init from learning the pid. */
	if (write(report, &self, sizeof self) != sizeof self)
		_exit(INIT_FAILED);
	close(report);
	/* runc makes the first process of a container a session leader. It also keeps kill(0, ...) off the guard. */
	setsid();
	sigaction(SIGCHLD, &inherited_chld, NULL);
	change_mask(SIG_SETMASK, inherited_mask, NULL);
	execute();
}

static void name_guard(pid_t child)
{
	char name[16] = "guard ";
	char digits[12];
	int count = 0, length = strlen(name);

	do
		digits[count++] = '0' + child % 10;
	while (child /= 10);
	while (count && length < 15)
		name[length++] = digits[--count];
	name[length] = 0;
	prctl(PR_SET_NAME, name);
}

static _Noreturn void be_guard(int report)
{
	siginfo_t ended;
	pid_t child;

	prctl(PR_SET_CHILD_SUBREAPER, 1);
	/* CRIU wants the session of what it dumps inside the dump. */
	setsid();
	child = fork();
	if (child == 0)
		be_application(report);
	if (child < 0) {
		complain("fork", command[0], errno);
		_exit(INIT_FAILED);
	}
	name_guard(child);
	/* One call each: close_range() isn't in every container's seccomp profile. Nothing above 2 is inherited but `report`. */
	for (int fd = 0; fd < 3; fd++)
		close(fd);
	close(report);
	/* Blocked signals stay blocked: what is sent to the guard (kill(-1, ...)) has no effect, save SIGKILL and SIGSTOP.
	 * The end of the application is only looked at, not taken: its zombie passes to init with the guard's end, and with
	 * it the exact status. Until then no other process can have its pid. */
	for (;;) {
		if (waitid(P_ALL, 0, &ended, WEXITED | WNOWAIT) < 0) {
			if (errno == EINTR)
				continue;
			_exit(INIT_FAILED);
		}
		if (ended.si_pid == child)
			_exit(0);
		waitpid(ended.si_pid, NULL, 0);
	}
}

static void start(void)
{
	int report[2];
	pid_t got = 0;

	status = INIT_FAILED << 8;
	guard = application = 0;
	application_ended = guard_ended = 0;
	if (pipe2(report, O_CLOEXEC) < 0) {
		complain("pipe", command[0], errno);
		return;
	}
	guard = fork();
	if (guard == 0) {
		close(report[0]);
		be_guard(report[1]);
	}
	if (guard < 0) {
		complain("fork", command[0], errno);
		guard = 0;
	}
	close(report[1]);
	/* Closed before anything can be dumped: to CRIU, a pipe between the tree and this process would be one to the outside.
	 * End of file without a pid means that the guard couldn't fork; its own end says so in a moment. */
	if (guard && read(report[0], &got, sizeof got) == sizeof got)
		application = got;
	close(report[0]);
}

/* Whether the process is our child and hasn't ended. */
static int alive(pid_t child)
{
	siginfo_t info = { 0 };

	return child > 0 && waitid(P_PID, child, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == 0;
}

static _Noreturn void finish(void)
{
	/* The kernel kills whatever is left in the namespace when its PID 1 ends. */
	_exit(WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status));
}

/* Whether the number is nobody's in this namespace. */
static int vacant(pid_t pid)
{
	return pid <= 0 || (kill(pid, 0) < 0 && errno == ESRCH);
}

/* Held, with nothing of the tree there: what asks the container to end has nobody to be passed on to. */
static void end_asleep(void)
{
	static const int ends[] = { SIGTERM, SIGINT, SIGQUIT };

	if (!held || !vacant(guard) || !vacant(application))
		return;
	for (unsigned i = 0; i < sizeof ends / sizeof *ends; i++)
		if (kept & ONE(ends[i])) {
			status = ends[i];
			finish();
		}
}

static void pass_on_kept(void)
{
	for (int signum = 1; kept; signum++)
		if (kept & ONE(signum)) {
			kept &= ~ONE(signum);
			if (application)
				kill(application, signum);
		}
}

/* Takes what has ended. What that means is for decide() to say, once the orders are known that were given before. */
static void reap(void)
{
	int how;
	pid_t child;

	while ((child = waitpid(-1, &how, WNOHANG)) > 0) {
		if (child == application) {
			application_ended = 1;
			status = how;
		} else if (child == guard) {
			guard_ended = 1;
			/* Of interest only if there never was an application. */
			if (!application)
				status = how;
		}
	}
}

static void decide(void)
{
	if (!held) {
		if (application_ended)
			finish();
		/* The guard alone was killed (kill(-1, SIGKILL)): the application is ours now and goes on. */
		if (guard_ended) {
			guard = 0;
			if (!alive(application))
				finish();
		}
	}
	application_ended = guard_ended = 0;
}

static void obey(int order)
{
	switch (order) {
	case HOLD:
		held = 1;
		break;
	case RELEASE:
		if (!held)
			break;
		reap();
		held = 0;
		if (!alive(guard) && !alive(application)) {
			reap();
			finish();
		}
		application_ended = guard_ended = 0;
		pass_on_kept();
		break;
	case START:
		if (!held)
			break;
		/* What may be left of the old ones, the guard last: while it lives, its child's number is nobody else's. The
		 * rest of the tree is criproxy's business. */
		if (alive(guard) || alive(application))
			kill(application, SIGKILL);
		if (alive(guard))
			kill(guard, SIGKILL);
		start();
		held = 0;
		if (!guard)
			finish();
		pass_on_kept();
		break;
	}
}

static int is_order(int signum, const siginfo_t *info)
{
	return signum >= HOLD && signum <= START && info->si_code == SI_USER && info->si_pid == 0;
}

static void handle(int signum, const siginfo_t *info)
{
	if (is_order(signum, info))
		obey(signum);
	else if (signum == SIGCHLD)
		return;
	else if (held)
		kept |= ONE(signum);
	else if (application)
		kill(application, signum);
}

static void obey_all(void)
{
	static const struct timespec now;
	siginfo_t info;
	int signum;

	while ((signum = next_signal(orders, &info, &now)) > 0)
		handle(signum, &info);
}

int main(int argc, char **argv)
{
	const signals all = ~0ULL;
	struct sigaction plain = { .sa_handler = SIG_DFL };
	siginfo_t info;
	int signum;

	if (argc < 3 || strcmp(argv[1], "--") != 0) {
		static const char usage[] = "usage: init -- COMMAND [ARGUMENT...]\n";

		return write(2, usage, sizeof usage - 1) < 0 ? INIT_FAILED : INIT_FAILED;
	}
	command = argv + 2;
	/* A blocked signal is kept for PID 1 although it has no handler, and is kept although it is ignored. */
	change_mask(SIG_SETMASK, all, &inherited_mask);
	/* Ignored, SIGCHLD would make the kernel reap, and no status would be left. */
	sigaction(SIGCHLD, &plain, &inherited_chld);
	start();
	if (!guard)
		finish();
	for (;;) {
		signum = next_signal(all, &info, NULL);
		if (signum < 0)
			continue;
		/* SIGCHLD has the lower number and so comes first, but what happened first may have been a HOLD. */
		if (!(ONE(signum) & orders))
			obey_all();
		handle(signum, &info);
		reap();
		/* The end that was just taken may be the work of somebody who gave an order before: it is pending by now. */
		obey_all();
		decide();
		end_asleep();
	}
}
