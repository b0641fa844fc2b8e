/* feature: File locks: flock(), POSIX (fcntl) and open file description locks */
#include "feature.h"

#include <sys/file.h>

static int flocked, posix, ofd, talk;

static struct flock lock(int type)
{
	return (struct flock){ .l_type = type, .l_whence = SEEK_SET, .l_start = 2, .l_len = 3 };
}

/* Whether another process is kept from them. */
static int refused(int kind)
{
	struct flock one = lock(F_WRLCK);
	int fd;

	switch (kind) {
	case 'f':
		fd = open(FOLDER "flock", O_RDWR);
		return flock(fd, LOCK_EX | LOCK_NB) < 0 && errno == EWOULDBLOCK && close(fd) == 0;
	case 'p':
		fd = open(FOLDER "posix", O_RDWR);
		return fcntl(fd, F_SETLK, &one) < 0 && (errno == EAGAIN || errno == EACCES) && close(fd) == 0;
	default:
		fd = open(FOLDER "ofd", O_RDWR);
		return fcntl(fd, F_OFD_SETLK, &one) < 0 && (errno == EAGAIN || errno == EACCES) && close(fd) == 0;
	}
}

static void prepare(void)
{
	struct flock one = lock(F_WRLCK);

	companion(refused, &talk);
	flocked = file(FOLDER "flock", "0123456789");
	posix = file(FOLDER "posix", "0123456789");
	ofd = file(FOLDER "ofd", "0123456789");
	CHECK(flock(flocked, LOCK_EX) == 0);
	CHECK(fcntl(posix, F_SETLK, &one) == 0);
	CHECK(fcntl(ofd, F_OFD_SETLK, &one) == 0);
}

static void check(int cycle)
{
	struct flock one = lock(F_UNLCK);

	CHECK(asked(talk, 'f') == 1);
	CHECK(asked(talk, 'p') == 1);
	CHECK(asked(talk, 'o') == 1);
	if (cycle == 1) {
		CHECK(flock(flocked, LOCK_UN) == 0 && asked(talk, 'f') == 0);
		CHECK(fcntl(posix, F_SETLK, &one) == 0 && asked(talk, 'p') == 0);
		CHECK(fcntl(ofd, F_OFD_SETLK, &one) == 0 && asked(talk, 'o') == 0);
	}
}
