/* feature: pidfd of a process of its own */
#include "feature.h"

#include <poll.h>

static int fd, talk;
static pid_t child;

static int nothing(int byte)
{
	return byte;
}

static void prepare(void)
{
	child = companion(nothing, &talk);
	fd = syscall(SYS_pidfd_open, child, 0);
	CHECK(fd >= 0);
}

static void check(int cycle)
{
	struct pollfd one = { .fd = fd, .events = POLLIN };

	CHECK(poll(&one, 1, 0) == 0 && syscall(SYS_pidfd_send_signal, fd, 0, NULL, 0) == 0);
	if (cycle == 1) {
		CHECK(syscall(SYS_pidfd_send_signal, fd, SIGKILL, NULL, 0) == 0);
		CHECK(poll(&one, 1, -1) == 1 && waitpid(child, NULL, 0) == child);
	}
}
