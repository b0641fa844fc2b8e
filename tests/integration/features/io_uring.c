/* feature: io_uring */
/* refused: it uses io_uring, which CRIU can't dump */
#include "feature.h"

static void prepare(void)
{
	char parameters[512] = "";

	SKIP_UNLESS(syscall(425, 4, parameters) >= 0);
}

static void check(int cycle)
{
	(void)cycle;
}
