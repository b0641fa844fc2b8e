/* What every program of this folder includes. Each has two functions about one feature of the kernel:
 *
 *   prepare()    uses the feature, before the first checkpoint
 *   check(cycle) after each of two cycles of checkpoint and restore (0, 1): is all as it was, and does it still work?
 *
 * The head of each file is its line in docs/checkpoint.md (see matrix.py):
 *
 *   feature:  what it is about
 *   refused:  the reason that criproxy gives, where it can't be checkpointed
 *   limit:    what isn't as before, where that can't be helped
 *   capability: what the container needs beyond containerd's default set to use it
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CHECK(condition)                                                                                                    \
	do {                                                                                                                \
		if (!(condition)) {                                                                                         \
			int error = errno;                                                                                  \
			printf("wrong: %s:%d: %s (%s)\n", __FILE__, __LINE__, #condition, strerror(error));                 \
			fflush(stdout);                                                                                     \
			for (;;)                                                                                            \
				pause();                                                                                    \
		}                                                                                                           \
	} while (0)

/* What this kernel or machine doesn't have can't be tried. */
#define SKIP_UNLESS(condition)                                                                                              \
	do {                                                                                                                \
		if (!(condition)) {                                                                                         \
			printf("skip: %s: %s\n", #condition, strerror(errno));                                              \
			fflush(stdout);                                                                                     \
			for (;;)                                                                                            \
				pause();                                                                                    \
		}                                                                                                           \
	} while (0)

static void prepare(void);
static void check(int cycle);

/* A folder on the container's own file system, for files. */
#define FOLDER "/data/made/"

static inline int file(const char *name, const char *text)
{
	int fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0644);

	CHECK(fd >= 0);
	CHECK(write(fd, text, strlen(text)) == (ssize_t)strlen(text));
	return fd;
}

/* Whether reading gives exactly this text, now. */
static inline int gives(int fd, const char *text)
{
	char got[256];
	ssize_t size = read(fd, got, sizeof got);

	return size == (ssize_t)strlen(text) && memcmp(got, text, size) == 0;
}

static inline int put(int fd, const char *text)
{
	return write(fd, text, strlen(text)) == (ssize_t)strlen(text);
}

/* A child that answers each byte with answer(byte), and the descriptor to talk to it. */
static inline pid_t companion(int (*answer)(int), int *talk)
{
	int both[2];
	pid_t pid;

	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, both) == 0);
	fflush(stdout);
	pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		unsigned char byte;

		close(both[0]);
		while (read(both[1], &byte, 1) == 1) {
			byte = answer(byte);
			CHECK(write(both[1], &byte, 1) == 1);
		}
		_exit(0);
	}
	close(both[1]);
	*talk = both[0];
	return pid;
}

static inline int asked(int talk, int question)
{
	unsigned char byte = question;

	CHECK(write(talk, &byte, 1) == 1);
	CHECK(read(talk, &byte, 1) == 1);
	return byte;
}

int main(void)
{
	char line[16];

	CHECK(mkdir(FOLDER, 0777) == 0);
	prepare();
	for (int cycle = 0; cycle < 2; cycle++) {
		puts("ready");
		fflush(stdout);
		CHECK(read(0, line, sizeof line) > 0);
		check(cycle);
	}
	puts("done");
	fflush(stdout);
	_exit(0);
}
