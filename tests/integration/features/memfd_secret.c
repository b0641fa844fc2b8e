/* feature: memfd_secret() */
/* refused: it has secret memory (memfd_secret), which CRIU can't read */
#include "feature.h"

static char *memory;

static void prepare(void)
{
	int fd = syscall(447, 0);

	SKIP_UNLESS(fd >= 0);
	SKIP_UNLESS(ftruncate(fd, 4096) == 0);
	memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	SKIP_UNLESS(memory != MAP_FAILED);
	strcpy(memory, "secret");
}

static void check(int cycle)
{
	(void)cycle;
	CHECK(strcmp(memory, "secret") == 0);
}
