/* feature: The usual devices: /dev/null, zero, full, random, urandom */
#include "feature.h"

static int fds[5];

static void prepare(void)
{
	static const char *const names[] = { "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom" };

	for (int i = 0; i < 5; i++)
		CHECK((fds[i] = open(names[i], O_RDWR)) >= 0);
	CHECK(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, fds[1], 0) != MAP_FAILED);
}

static void check(int cycle)
{
	char byte = 1;

	(void)cycle;
	CHECK(read(fds[0], &byte, 1) == 0 && read(fds[1], &byte, 1) == 1 && byte == 0);
	CHECK(write(fds[2], &byte, 1) < 0 && errno == ENOSPC && read(fds[4], &byte, 1) == 1);
}
