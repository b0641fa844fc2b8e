/* feature: Namespaces of its own (unshare: mount, network, UTS, IPC, PID, user), as sandboxes and browsers make them */
/* refused: it has made namespaces of its own, which CRIU can't dump */
/* capability: CAP_SYS_ADMIN */
#include "feature.h"

#include <sched.h>

static int talk;

static int named(int question)
{
	char name[16] = "";

	if (question == 'u')
		SKIP_UNLESS(unshare(CLONE_NEWUTS) == 0 && sethostname("inner", 5) == 0);
	return gethostname(name, sizeof name) == 0 && strcmp(name, "inner") == 0;
}

static void prepare(void)
{
	companion(named, &talk);
	CHECK(asked(talk, 'u') == 1);
}

static void check(int cycle)
{
	(void)cycle;
	CHECK(asked(talk, '?') == 1);
}
