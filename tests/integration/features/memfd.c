/* feature: memfd: seals, names, read-only mappings, execution from it */
#include "feature.h"

static int fd;
static const char *text;

static void prepare(void)
{
	fd = syscall(SYS_memfd_create, "sealed", 2 /* MFD_ALLOW_SEALING */);
	CHECK(put(fd, "sealed"));
	CHECK(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE) == 0);
	text = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, fd, 0);
	CHECK(text != MAP_FAILED);
}

static void check(int cycle)
{
	char link[64] = "", path[64];

	(void)cycle;
	CHECK(memcmp(text, "sealed", 6) == 0);
	CHECK(fcntl(fd, F_GET_SEALS) == (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE));
	CHECK(write(fd, "x", 1) < 0 && errno == EPERM);
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	CHECK(readlink(path, link, sizeof link - 1) > 0 && strstr(link, "memfd:sealed"));
}
