/* feature: eventfd, signalfd, timerfd */
#include "feature.h"

#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>

static int counter, signals, interval, far;

static void prepare(void)
{
	struct itimerspec often = { { 0, 10000000 }, { 0, 10000000 } }, later = { { 7, 0 }, { 1000, 0 } };
	sigset_t set;

	counter = eventfd(5, EFD_NONBLOCK);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	CHECK(sigprocmask(SIG_BLOCK, &set, NULL) == 0);
	signals = signalfd(-1, &set, SFD_NONBLOCK);
	CHECK(kill(getpid(), SIGUSR1) == 0);
	interval = timerfd_create(CLOCK_MONOTONIC, 0);
	far = timerfd_create(CLOCK_REALTIME, 0);
	CHECK(timerfd_settime(interval, 0, &often, NULL) == 0 && timerfd_settime(far, 0, &later, NULL) == 0);
}

static void check(int cycle)
{
	struct signalfd_siginfo info;
	struct itimerspec left;
	uint64_t value;

	(void)cycle;
	CHECK(read(counter, &value, 8) == 8 && value == 5);
	CHECK(read(counter, &value, 8) < 0 && errno == EAGAIN);
	value = 5;
	CHECK(write(counter, &value, 8) == 8);
	CHECK(read(signals, &info, sizeof info) == sizeof info && info.ssi_signo == SIGUSR1);
	CHECK(kill(getpid(), SIGUSR1) == 0);
	CHECK(read(interval, &value, 8) == 8 && value > 0);
	CHECK(timerfd_gettime(far, &left) == 0 && left.it_interval.tv_sec == 7);
	CHECK(left.it_value.tv_sec > 900 && left.it_value.tv_sec <= 1000);
}
