/* feature: Threads in the middle of poll(), select(), epoll_wait(), nanosleep(), futex waits and blocking reads go on waiting */
#include "feature.h"

#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/select.h>

static int wake[2], started, failed;
static pthread_t threads[6];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static int released;
static pid_t child;

static void *in_poll(void *unused)
{
	struct pollfd one = { .fd = wake[0], .events = POLLIN };

	__atomic_add_fetch(&started, 1, __ATOMIC_SEQ_CST);
	if (poll(&one, 1, 100000) != 1)
		failed = 1;
	return unused;
}

static void *in_select(void *unused)
{
	fd_set set;

	FD_ZERO(&set);
	FD_SET(wake[0], &set);
	__atomic_add_fetch(&started, 1, __ATOMIC_SEQ_CST);
	/* Without a time limit: with one, CRIU lets it fail with EINTR. */
	if (select(wake[0] + 1, &set, NULL, NULL, NULL) != 1)
		failed = 2;
	return unused;
}

static void *in_sleep(void *unused)
{
	struct timespec left = { 100000, 0 };

	__atomic_add_fetch(&started, 1, __ATOMIC_SEQ_CST);
	nanosleep(&left, &left);
	failed = 3;
	return unused;
}

static void *in_condition(void *unused)
{
	pthread_mutex_lock(&mutex);
	__atomic_add_fetch(&started, 1, __ATOMIC_SEQ_CST);
	while (!released)
		if (pthread_cond_wait(&condition, &mutex) != 0)
			failed = 4;
	pthread_mutex_unlock(&mutex);
	return unused;
}

static void *in_read(void *unused)
{
	char byte;

	__atomic_add_fetch(&started, 1, __ATOMIC_SEQ_CST);
	if (read(wake[0], &byte, 1) != 1)
		failed = 5;
	return unused;
}

static void *in_epoll(void *unused)
{
	struct epoll_event event = { .events = EPOLLIN };
	int set = epoll_create1(0);

	epoll_ctl(set, EPOLL_CTL_ADD, wake[0], &event);
	__atomic_add_fetch(&started, 1, __ATOMIC_SEQ_CST);
	if (epoll_wait(set, &event, 1, -1) != 1)
		failed = 6;
	return unused;
}

static void prepare(void)
{
	void *(*const all[])(void *) = { in_poll, in_select, in_condition, in_read, in_epoll, in_sleep };

	CHECK(pipe(wake) == 0);
	/* A process' first thread isn't dumped as the others are. */
	child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		in_poll(NULL);
		_exit(failed);
	}
	for (int i = 0; i < 6; i++)
		CHECK(pthread_create(&threads[i], NULL, all[i], NULL) == 0);
	while (__atomic_load_n(&started, __ATOMIC_SEQ_CST) < 6)
		usleep(1000);
	usleep(50000);
}

static void nothing_failed(void)
{
	CHECK(failed != 1 && "poll");
	CHECK(failed != 2 && "select");
	CHECK(failed != 3 && "nanosleep");
	CHECK(failed != 4 && "futex");
	CHECK(failed != 5 && "read");
	CHECK(failed != 6 && "epoll_wait");
}

static void check(int cycle)
{
	int status;

	usleep(50000);
	nothing_failed();
	CHECK(waitpid(child, NULL, WNOHANG) == 0);
	if (cycle == 0)
		return;
	/* One byte for the reader, one that stays for the others to see. */
	CHECK(put(wake[1], "ab"));
	pthread_mutex_lock(&mutex);
	released = 1;
	pthread_cond_signal(&condition);
	pthread_mutex_unlock(&mutex);
	for (int i = 0; i < 5; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	nothing_failed();
	CHECK(waitpid(child, &status, 0) == child && status == 0);
}
