/* feature: Timer slack (PR_SET_TIMERSLACK), I/O priority */
/* limit: they are the default's again after the restore */
#include "feature.h"

static void prepare(void)
{
	CHECK(prctl(PR_SET_TIMERSLACK, 123456) == 0);
	CHECK(syscall(SYS_ioprio_set, 1, 0, (2 << 13) | 6) == 0);
}

static void check(int cycle)
{
	(void)cycle;
	CHECK(prctl(PR_GET_TIMERSLACK) > 0);
}
