/* Build: gcc -shared -fPIC -O2 -std=gnu11 -D_GNU_SOURCE -Wall -Wextra -o preload.so preload.c   (setup.py does it)
 *
 * Preloaded into CRIU. Six of its calls to libc don't have the outcome that it needs:
 *
 * - prlimit64() of a process with another uid, where root lacks CAP_SYS_RESOURCE (containers as machines: LXC, nested
 *   sandboxes): "Can't get rlimit 0", and nothing that drops privileges can be dumped. /proc/PID/limits has the same numbers
 *   for whoever may read the process.
 * - getsockopt() of SO_PASSCRED and SO_PASSSEC on a socket that isn't a unix one. From Linux 6.16 on the kernel refuses that
 *   (EOPNOTSUPP) instead of saying 0; CRIU before 4.2 takes it for an error ("Can't get 1:16 opt"), and nothing with a TCP
 *   socket can be dumped.
 * - setsid() in the restored tree's root, which is our guard, a subreaper. A daemon whose session's leader is dead is
 *   restored as the child of a helper, which then ends so that the daemon becomes the root's. But CRIU makes the root a
 *   subreaper only after that: the daemon would become the container's init's, outside of the tree, and the next dump
 *   wouldn't have it. It has its session before it has children; so it becomes a subreaper then.
 * - splice(), with which a dump writes memory to the images, while somebody waits for the application: once there is a file
 *   "given-up" in CRIU's working folder, it fails with ECANCELED. CRIU then does what it does when a disk is full: it gives
 *   the dump up and lets the application go on.
 * - ptrace() that reads a stopped thread's registers or lets go of it, on x86-64 (elsewhere the C library has calls that
 *   the kernel begins again). The stop has interrupted what the thread waited in. Without a signal handler in the way no
 *   kernel ends poll() or nanosleep() with EINTR, but CRIU lets them: what remains of the time is known to the kernel
 *   alone. Not every application knows what to do then: MariaDB gives a connection up after ten of them. So the wait is
 *   made to begin again, in the images and, where the dump is given up, in the thread that goes on:
 *   - poll() with its whole time limit. It may end later than it would have, but never too early. So do epoll_wait() and
 *     the like, which any stop ends (signal(7)), but which few applications have ever seen ended.
 *   - nanosleep(), clock_nanosleep() with what is left, which the kernel has told the caller. Where the caller didn't want
 *     to know, it stays EINTR: of a thread that sleeps in a loop, each cycle would prolong the sleep, for ever.
 *   - futex() stays EINTR, for which its callers are prepared. So does what something else has stopped before (a debugger,
 *     the freezer of cgroups v1): it is restart_syscall() by then, and nothing tells of what.
 * - openat() of ".criproxy-kept/N", which kept.py writes into images where an inotify watch's path would be: it opens what
 *   CRIU's first process has inherited for it, as CRIPROXY_KEPT says. CRIU itself can't be given what is watched.
 *
 * It guarantees: a call that only reads, and fails in exactly this way, gets the answer that it would get elsewhere. Every
 * other call and every other error passes unchanged; nothing that sets something is imitated. Of a thread's registers only
 * those of the waits above change, and none if a handler waits to run: EINTR is what its caller expects then. Only a child of
 * CRIU's first process becomes a subreaper: the root, and CRIU's own helpers, which don't live on. PID means what it means to
 * CRIU, which sees the container's PID namespace and its /proc.
 *
 * CRIU reads limits through libc's syscall(); libc's own prlimit() and prlimit64() are covered in case it changes.
 */
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <unistd.h>

/* The lines of /proc/PID/limits begin with these, each 26 wide (fs/proc/base.c). */
static const char *const names[RLIM_NLIMITS] = {
	[RLIMIT_CPU] = "Max cpu time",
	[RLIMIT_FSIZE] = "Max file size",
	[RLIMIT_DATA] = "Max data size",
	[RLIMIT_STACK] = "Max stack size",
	[RLIMIT_CORE] = "Max core file size",
	[RLIMIT_RSS] = "Max resident set",
	[RLIMIT_NPROC] = "Max processes",
	[RLIMIT_NOFILE] = "Max open files",
	[RLIMIT_MEMLOCK] = "Max locked memory",
	[RLIMIT_AS] = "Max address space",
	[RLIMIT_LOCKS] = "Max file locks",
	[RLIMIT_SIGPENDING] = "Max pending signals",
	[RLIMIT_MSGQUEUE] = "Max msgqueue size",
	[RLIMIT_NICE] = "Max nice priority",
	[RLIMIT_RTPRIO] = "Max realtime priority",
	[RLIMIT_RTTIME] = "Max realtime timeout",
};
enum { NAME_WIDTH = 26 };

/* The kernel's struct rlimit64, whatever libc's has. */
struct limit {
	unsigned long long soft, hard;
};

static const char *value(const char *text, unsigned long long *limit)
{
	char *end;

	text += strspn(text, " ");
	if (strncmp(text, "unlimited", 9) == 0) {
		*limit = ~0ULL;
		return text + 9;
	}
	*limit = strtoull(text, &end, 10);
	return end == text ? NULL : end;
}

static int read_limit(long pid, unsigned long resource, struct limit *limit)
{
	char path[64], line[160];
	int found = -1;
	FILE *file;

	if (resource >= RLIM_NLIMITS || !names[resource])
		return -1;
	snprintf(path, sizeof path, "/proc/%ld/limits", pid);
	file = fopen(path, "re");
	if (!file)
		return -1;
	while (fgets(line, sizeof line, file)) {
		const char *rest;

		if (strncmp(line, names[resource], strlen(names[resource])) != 0 || strlen(line) < NAME_WIDTH)
			continue;
		rest = value(line + NAME_WIDTH, &limit->soft);
		if (rest && value(rest, &limit->hard))
			found = 0;
		break;
	}
	fclose(file);
	return found;
}

/* The system call without libc's syscall(), whose place we take. Arguments as the kernel takes them. */
static long call(long number, long a, long b, long c, long d, long e, long f)
{
	long result;
#if defined(__x86_64__)
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
#elif defined(__aarch64__)
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	register long x5 __asm__("x5") = f;

	__asm__ volatile("svc 0"
			 : "+r"(x0)
			 : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
			 : "memory");
	result = x0;
#else
#error "criproxy knows x86_64 and aarch64"
#endif
	if (result < 0 && result > -4096) {
		errno = -result;
		return -1;
	}
	return result;
}

static long limits(long pid, long resource, long new, long old)
{
	long result = call(SYS_prlimit64, pid, resource, new, old, 0, 0);

	if (result < 0 && errno == EPERM && pid > 0 && !new && old) {
		struct limit limit;

		if (read_limit(pid, resource, &limit) == 0) {
			memcpy((void *)old, &limit, sizeof limit);
			return 0;
		}
		errno = EPERM;
	}
	return result;
}

long syscall(long number, ...)
{
	long a, b, c, d, e, f;
	va_list arguments;

	va_start(arguments, number);
	a = va_arg(arguments, long);
	b = va_arg(arguments, long);
	c = va_arg(arguments, long);
	d = va_arg(arguments, long);
	e = va_arg(arguments, long);
	f = va_arg(arguments, long);
	va_end(arguments);
	return number == SYS_prlimit64 ? limits(a, b, c, d) : call(number, a, b, c, d, e, f);
}

int prlimit(pid_t pid, __rlimit_resource_t resource, const struct rlimit *new, struct rlimit *old)
{
	return limits(pid, resource, (long)new, (long)old);
}

int prlimit64(pid_t pid, __rlimit_resource_t resource, const struct rlimit64 *new, struct rlimit64 *old)
{
	return limits(pid, resource, (long)new, (long)old);
}

int getsockopt(int socket, int level, int option, void *restrict value, socklen_t *restrict length)
{
	long result = call(SYS_getsockopt, socket, level, option, (long)value, (long)length, 0);

	if (result < 0 && errno == EOPNOTSUPP && level == SOL_SOCKET && (option == SO_PASSCRED || option == SO_PASSSEC) &&
	    *length >= sizeof(int)) {
		memset(value, 0, sizeof(int));
		*length = sizeof(int);
		return 0;
	}
	return result;
}

ssize_t splice(int in, off64_t *in_offset, int out, off64_t *out_offset, size_t length, unsigned flags)
{
	if (call(SYS_faccessat, AT_FDCWD, (long)"given-up", F_OK, 0, 0, 0) == 0) {
		errno = ECANCELED;
		return -1;
	}
	return call(SYS_splice, in, (long)in_offset, out, (long)out_offset, length, flags);
}

#if defined(__x86_64__)
/* The kernel's own (include/linux/errno.h): begin again unless a handler runs; go on with what is left of the time. */
enum { ERESTARTNOHAND = 514, ERESTART_RESTARTBLOCK = 516 };

/* Whether a signal that the thread doesn't block waits to be taken. */
static int signalled(pid_t thread)
{
	unsigned long long pending = 0, blocked = 0, set;
	char path[64], line[160];
	FILE *file;

	snprintf(path, sizeof path, "/proc/%d/status", thread);
	file = fopen(path, "re");
	if (!file)
		return 1;
	while (fgets(line, sizeof line, file)) {
		if (sscanf(line, "SigPnd: %llx", &set) == 1 || sscanf(line, "ShdPnd: %llx", &set) == 1)
			pending |= set;
		else if (sscanf(line, "SigBlk: %llx", &set) == 1)
			blocked = set;
	}
	fclose(file);
	return (pending & ~blocked) != 0;
}

/* Makes the registers those of a wait that begins again; whether they have changed. */
static int begin_again(pid_t thread, struct user_regs_struct *registers)
{
	long result = registers->rax;

	if (result != -EINTR && result != -ERESTART_RESTARTBLOCK)
		return 0;
	switch (registers->orig_rax) {
	case SYS_poll:
	case SYS_semop:
	case SYS_semtimedop:
	case SYS_rt_sigtimedwait:
	case SYS_io_getevents:
	case SYS_epoll_wait:
	case SYS_epoll_pwait:
	case SYS_epoll_pwait2:
		break;
	case SYS_nanosleep:
		if (!registers->rsi)
			return 0;
		break;
	case SYS_clock_nanosleep:
		if (!registers->r10)
			return 0;
		break;
	default:
		return 0;
	}
	if (signalled(thread))
		return 0;
	if (registers->orig_rax == SYS_nanosleep)
		registers->rdi = registers->rsi;
	else if (registers->orig_rax == SYS_clock_nanosleep)
		registers->rdx = registers->r10;
	registers->rax = -ERESTARTNOHAND;
	return 1;
}

static void resume_wait(pid_t thread)
{
	struct user_regs_struct registers;
	struct iovec all = { &registers, sizeof registers };

	/* A 32-bit program has fewer. */
	if (call(SYS_ptrace, PTRACE_GETREGSET, thread, NT_PRSTATUS, (long)&all, 0, 0) == 0 && all.iov_len == sizeof registers &&
	    begin_again(thread, &registers))
		call(SYS_ptrace, PTRACE_SETREGSET, thread, NT_PRSTATUS, (long)&all, 0, 0);
}
#endif

long ptrace(enum __ptrace_request request, ...)
{
	int peeks = request == PTRACE_PEEKTEXT || request == PTRACE_PEEKDATA || request == PTRACE_PEEKUSER;
	long thread, address, data, word, result;
	va_list arguments;

	va_start(arguments, request);
	thread = va_arg(arguments, pid_t);
	address = va_arg(arguments, long);
	data = va_arg(arguments, long);
	va_end(arguments);
#if defined(__x86_64__)
	if (request == PTRACE_DETACH || (request == PTRACE_GETREGSET && address == NT_PRSTATUS))
		resume_wait(thread);
#endif
	/* The kernel stores what is read; libc returns it. */
	result = call(SYS_ptrace, request, thread, address, peeks ? (long)&word : data, 0, 0);
	if (result < 0 || !peeks)
		return result;
	errno = 0;
	return word;
}

static pid_t first;

static __attribute__((constructor)) void begin(void)
{
	first = getpid();
}

/* CRIU's descriptor for N in CRIPROXY_KEPT (N=DESCRIPTOR,...), or -1. */
static int kept(int wanted)
{
	const char *next = getenv("CRIPROXY_KEPT");
	int number, descriptor;

	while (next && sscanf(next, "%d=%d", &number, &descriptor) == 2) {
		if (number == wanted)
			return descriptor;
		next = strchr(next, ',');
		if (next)
			next++;
	}
	return -1;
}

int openat64(int folder, const char *path, int flags, ...)
{
	static const char watched[] = ".criproxy-kept/";
	char own[64];
	long mode = 0;

	if ((flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE) {
		va_list arguments;

		va_start(arguments, flags);
		mode = va_arg(arguments, int);
		va_end(arguments);
	}
	if (strncmp(path, watched, sizeof watched - 1) == 0) {
		snprintf(own, sizeof own, "/proc/%d/fd/%d", first, kept(atoi(path + sizeof watched - 1)));
		folder = AT_FDCWD;
		path = own;
	}
	return call(SYS_openat, folder, (long)path, flags, mode, 0, 0);
}

pid_t setsid(void)
{
	long result = call(SYS_setsid, 0, 0, 0, 0, 0, 0);

	if (result >= 0 && getppid() == first) {
		int before = errno;

		prctl(PR_SET_CHILD_SUBREAPER, 1);
		errno = before;
	}
	return result;
}
