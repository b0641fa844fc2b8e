/* feature: File leases (F_SETLEASE) */
#include "feature.h"

static int fd;

static void prepare(void)
{
	close(file(FOLDER "leased", "text"));
	fd = open(FOLDER "leased", O_RDONLY);
	CHECK(fcntl(fd, F_SETLEASE, F_RDLCK) == 0);
}

static void check(int cycle)
{
	(void)cycle;
	CHECK(fcntl(fd, F_GETLEASE) == F_RDLCK);
}
