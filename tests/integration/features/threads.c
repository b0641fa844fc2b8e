/* feature: Threads: names, thread-local data, signal masks, alternate stacks, processors, scheduling, floating point */
#include "feature.h"

#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>

static __thread int own;
static volatile int turn, done[4];
static volatile double numbers[4];

static void *work(void *argument)
{
	int number = (int)(intptr_t)argument;
	static char stacks[4][65536];
	stack_t stack = { .ss_sp = stacks[number], .ss_size = sizeof stacks[number] }, seen;
	char name[16];
	cpu_set_t cpus;
	sigset_t mask, seen_mask;
	double value = number + 0.5;

	own = 100 + number;
	sprintf(name, "worker %d", number);
	pthread_setname_np(pthread_self(), name);
	sigemptyset(&mask);
	sigaddset(&mask, SIGRTMIN + number);
	pthread_sigmask(SIG_SETMASK, &mask, NULL);
	sigaltstack(&stack, NULL);
	if (number == 1)
		setpriority(PRIO_PROCESS, syscall(SYS_gettid), 7);
	if (number == 2)
		CHECK(sched_setscheduler(0, SCHED_BATCH, &(struct sched_param){ 0 }) == 0);
	CPU_ZERO(&cpus);
	CPU_SET(0, &cpus);
	CHECK(sched_setaffinity(0, sizeof cpus, &cpus) == 0);
	for (int round = 1; round <= 2; round++) {
		done[number] = round;
		while (turn < round)
			value = value * 1.0000001 / 1.0000001, usleep(1000);
		numbers[number] = value;
		CHECK(own == 100 + number);
		pthread_getname_np(pthread_self(), name, sizeof name);
		CHECK(name[7] == '0' + number);
		pthread_sigmask(SIG_BLOCK, NULL, &seen_mask);
		CHECK(sigismember(&seen_mask, SIGRTMIN + number) && !sigismember(&seen_mask, SIGRTMIN + number + 1));
		CHECK(sigaltstack(NULL, &seen) == 0 && seen.ss_sp == stacks[number]);
		CHECK(number != 1 || getpriority(PRIO_PROCESS, syscall(SYS_gettid)) == 7);
		CHECK(number != 2 || sched_getscheduler(0) == SCHED_BATCH);
	}
	done[number] = 3;
	return NULL;
}

static void until(int round)
{
	for (int i = 0; i < 4; i++)
		while (done[i] < round)
			usleep(1000);
}

static void prepare(void)
{
	pthread_t thread;

	for (intptr_t i = 0; i < 4; i++)
		CHECK(pthread_create(&thread, NULL, work, (void *)i) == 0);
	until(1);
}

static void check(int cycle)
{
	turn = cycle + 1;
	until(cycle + 2);
	for (int i = 0; i < 4; i++)
		CHECK(numbers[i] > i + 0.499 && numbers[i] < i + 0.501);
}
