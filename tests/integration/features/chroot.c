/* feature: chroot() */
#include "feature.h"

static void prepare(void)
{
	CHECK(mkdir(FOLDER "root", 0755) == 0);
	close(file(FOLDER "root/file", "inside"));
	CHECK(chroot(FOLDER "root") == 0 && chdir("/") == 0);
}

static void check(int cycle)
{
	int fd = open("/file", O_RDONLY);

	(void)cycle;
	CHECK(gives(fd, "inside"));
	close(fd);
}
