/* feature: A process that traces another (a debugger) */
/* refused: its processes can't be stopped: something else traces them */
#include "feature.h"

#include <sys/ptrace.h>

static void prepare(void)
{
	pid_t child = fork();

	if (child == 0)
		for (;;)
			pause();
	CHECK(ptrace(PTRACE_SEIZE, child, 0, 0) == 0);
}

static void check(int cycle)
{
	(void)cycle;
}
