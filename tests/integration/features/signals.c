/* feature: Signals: handlers, blocked and pending ones with what was sent along */
#include "feature.h"

static volatile int seen, value;

static void handler(int signum, siginfo_t *info, void *context)
{
	(void)context;
	seen = signum;
	value = info->si_value.sival_int;
}

static void prepare(void)
{
	struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO }, ignore = { .sa_handler = SIG_IGN };
	sigset_t set;

	CHECK(sigaction(SIGUSR2, &action, NULL) == 0 && sigaction(SIGRTMIN + 1, &action, NULL) == 0);
	CHECK(sigaction(SIGHUP, &ignore, NULL) == 0);
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 1);
	sigaddset(&set, SIGUSR2);
	CHECK(sigprocmask(SIG_BLOCK, &set, NULL) == 0);
	CHECK(sigqueue(getpid(), SIGRTMIN + 1, (union sigval){ 11 }) == 0);
	CHECK(sigqueue(getpid(), SIGRTMIN + 1, (union sigval){ 12 }) == 0);
	CHECK(sigqueue(getpid(), SIGUSR2, (union sigval){ 13 }) == 0);
}

static void check(int cycle)
{
	sigset_t pending, one;
	siginfo_t info;

	CHECK(seen == 0 && sigpending(&pending) == 0 && sigismember(&pending, SIGRTMIN + 1) && sigismember(&pending, SIGUSR2));
	CHECK(kill(getpid(), SIGHUP) == 0);
	if (cycle == 1) {
		sigemptyset(&one);
		sigaddset(&one, SIGRTMIN + 1);
		CHECK(sigwaitinfo(&one, &info) > 0 && info.si_value.sival_int == 11 && info.si_pid == getpid());
		CHECK(sigwaitinfo(&one, &info) > 0 && info.si_value.sival_int == 12);
		sigemptyset(&one);
		sigaddset(&one, SIGUSR2);
		CHECK(sigprocmask(SIG_UNBLOCK, &one, NULL) == 0 && seen == SIGUSR2 && value == 13);
	}
}
