/* feature: Clocks: CLOCK_MONOTONIC and CLOCK_BOOTTIME stand still while it sleeps (criproxy.io/clock: stop), CLOCK_REALTIME doesn't */
#include "feature.h"

static double seconds(clockid_t clock)
{
	struct timespec now;

	CHECK(clock_gettime(clock, &now) == 0);
	return now.tv_sec + now.tv_nsec / 1e9;
}

static double real, monotonic, boot;

static void prepare(void)
{
	/* This one first here, and last below: what passes between two calls makes the difference only bigger. */
	real = seconds(CLOCK_REALTIME);
	monotonic = seconds(CLOCK_MONOTONIC);
	boot = seconds(CLOCK_BOOTTIME);
}

static void check(int cycle)
{
	double by_monotonic = seconds(CLOCK_MONOTONIC) - monotonic, by_boot = seconds(CLOCK_BOOTTIME) - boot;
	double by_real = seconds(CLOCK_REALTIME) - real;

	(void)cycle;
	/* The matrix sleeps for half a second between checkpoint and restore of this one. */
	CHECK(by_monotonic >= 0 && by_real - by_monotonic > 0.45);
	CHECK(by_boot >= 0 && by_real - by_boot > 0.45);
	prepare();
}
