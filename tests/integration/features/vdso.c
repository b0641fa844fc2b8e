/* feature: A thread in a tight loop of gettimeofday() and getcpu() (vDSO), rseq, membarrier */
#include "feature.h"

#include <pthread.h>
#include <sched.h>

static volatile int going = 1;
static volatile long rounds;
static pthread_t thread;

static void *loop(void *unused)
{
	struct timespec now, last = { 0 };

	while (going) {
		clock_gettime(CLOCK_MONOTONIC, &now);
		CHECK(now.tv_sec > last.tv_sec || (now.tv_sec == last.tv_sec && now.tv_nsec >= last.tv_nsec));
		last = now;
		sched_getcpu();
		rounds++;
	}
	return unused;
}

static void prepare(void)
{
	syscall(SYS_membarrier, 1 << 4 /* REGISTER_PRIVATE_EXPEDITED */, 0, 0);
	CHECK(pthread_create(&thread, NULL, loop, NULL) == 0);
}

static void check(int cycle)
{
	long before = rounds;

	while (rounds == before)
		usleep(1000);
	CHECK(syscall(SYS_membarrier, 1 << 3, 0, 0) == 0);
	if (cycle == 1) {
		going = 0;
		CHECK(pthread_join(thread, NULL) == 0);
	}
}
