/* feature: perf events */
/* refused: it uses a kernel object that CRIU can't dump */
#include "feature.h"

#include <linux/perf_event.h>

static void prepare(void)
{
	struct perf_event_attr attributes = {
		.type = PERF_TYPE_SOFTWARE, .size = sizeof attributes, .config = PERF_COUNT_SW_TASK_CLOCK, .exclude_kernel = 1
	};

	SKIP_UNLESS(syscall(SYS_perf_event_open, &attributes, 0, -1, -1, 0) >= 0);
}

static void check(int cycle)
{
	(void)cycle;
}
