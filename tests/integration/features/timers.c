/* feature: POSIX timers and interval timers (setitimer, alarm) */
#include "feature.h"

#include <sys/time.h>

static volatile int posix_ticks, real_ticks;
static timer_t often, later;

static void count(int signum)
{
	if (signum == SIGRTMIN)
		posix_ticks++;
	else
		real_ticks++;
}

static void until(volatile int *ticks)
{
	while (!*ticks)
		usleep(10000);
}

static void prepare(void)
{
	struct sigaction action = { .sa_handler = count, .sa_flags = SA_RESTART };
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN };
	struct itimerspec soon = { { 0, 20000000 }, { 0, 20000000 } }, far = { { 0, 0 }, { 1000, 0 } };
	struct itimerval real = { { 0, 20000 }, { 0, 20000 } }, virtual = { { 500, 0 }, { 500, 0 } };

	CHECK(sigaction(SIGRTMIN, &action, NULL) == 0 && sigaction(SIGALRM, &action, NULL) == 0);
	CHECK(timer_create(CLOCK_MONOTONIC, &event, &often) == 0 && timer_settime(often, 0, &soon, NULL) == 0);
	CHECK(timer_create(CLOCK_MONOTONIC, &event, &later) == 0 && timer_settime(later, 0, &far, NULL) == 0);
	CHECK(setitimer(ITIMER_REAL, &real, NULL) == 0 && setitimer(ITIMER_VIRTUAL, &virtual, NULL) == 0);
}

static void check(int cycle)
{
	struct itimerspec left;
	struct itimerval virtual;

	(void)cycle;
	posix_ticks = real_ticks = 0;
	until(&posix_ticks);
	until(&real_ticks);
	CHECK(timer_gettime(later, &left) == 0 && left.it_value.tv_sec > 900 && left.it_value.tv_sec <= 1000);
	CHECK(getitimer(ITIMER_VIRTUAL, &virtual) == 0 && virtual.it_value.tv_sec > 400 && virtual.it_interval.tv_sec == 500);
}
