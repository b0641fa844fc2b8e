/* feature: Mutexes shared between processes, and robust ones (their owner dies after the restore) */
#include "feature.h"

#include <pthread.h>

static pthread_mutex_t *mutex;
static pid_t child;
static int talk;

static int own(int question)
{
	if (question == 'l')
		return pthread_mutex_lock(mutex) == 0;
	_exit(0);
}

static void prepare(void)
{
	pthread_mutexattr_t attributes;

	mutex = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pthread_mutexattr_init(&attributes);
	pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
	pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
	CHECK(pthread_mutex_init(mutex, &attributes) == 0);
	child = companion(own, &talk);
	CHECK(asked(talk, 'l') == 1);
}

static void check(int cycle)
{
	CHECK(pthread_mutex_trylock(mutex) == EBUSY);
	if (cycle == 1) {
		CHECK(put(talk, "e") && waitpid(child, NULL, 0) == child);
		CHECK(pthread_mutex_lock(mutex) == EOWNERDEAD && pthread_mutex_consistent(mutex) == 0);
	}
}
