/* feature: The program itself was deleted or replaced (an upgrade in place) */
#include "feature.h"

static void prepare(void)
{
	char path[256] = "";

	CHECK(readlink("/proc/self/exe", path, sizeof path - 1) > 0);
	CHECK(unlink(path) == 0);
	close(file(path, "another program"));
}

static void check(int cycle)
{
	int fd = open("/proc/self/exe", O_RDONLY);
	char magic[4];

	(void)cycle;
	CHECK(read(fd, magic, 4) == 4 && memcmp(magic, "\177ELF", 4) == 0);
	close(fd);
}
