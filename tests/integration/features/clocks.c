/* feature: Clocks: CLOCK_MONOTONIC and CLOCK_BOOTTIME stand still while it sleeps (criproxy.io/clock: stop), CLOCK_REALTIME doesn't */
#include "feature.h"

static struct timespec before;

static double seconds(clockid_t clock)
{
	struct timespec now;

	CHECK(clock_gettime(clock, &now) == 0);
	return now.tv_sec + now.tv_nsec / 1e9;
}

static double monotonic, boot;

static void prepare(void)
{
	clock_gettime(CLOCK_REALTIME, &before);
	monotonic = seconds(CLOCK_MONOTONIC);
	boot = seconds(CLOCK_BOOTTIME);
}

static void check(int cycle)
{
	double now = seconds(CLOCK_MONOTONIC);

	(void)cycle;
	/* The matrix sleeps for half a second between checkpoint and restore of this one. */
	CHECK(now >= monotonic && now - monotonic < 0.4);
	CHECK(seconds(CLOCK_BOOTTIME) - boot < 0.4);
	prepare();
}
