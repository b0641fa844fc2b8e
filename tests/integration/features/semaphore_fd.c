/* feature: eventfd with EFD_SEMAPHORE (seen from Linux 6.5 on) */
/* refused: it has an eventfd with EFD_SEMAPHORE, which CRIU would restore without it */
#include "feature.h"

#include <sys/eventfd.h>

static void prepare(void)
{
	char path[64], info[512] = "";
	int fd = eventfd(3, EFD_SEMAPHORE);

	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
	fd = open(path, O_RDONLY);
	CHECK(read(fd, info, sizeof info - 1) > 0);
	close(fd);
	SKIP_UNLESS(strstr(info, "eventfd-semaphore: 1"));
}

static void check(int cycle)
{
	(void)cycle;
}
