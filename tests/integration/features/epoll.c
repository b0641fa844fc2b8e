/* feature: epoll: level and edge triggered, one-shot, nested, with the data that was given */
#include "feature.h"

#include <sys/epoll.h>

static int outer, inner, level[2], edge[2], once[2];

static void add(int set, int fd, uint32_t events, uint64_t data)
{
	struct epoll_event event = { .events = events, .data.u64 = data };

	CHECK(epoll_ctl(set, EPOLL_CTL_ADD, fd, &event) == 0);
}

static uint64_t events(int set)
{
	struct epoll_event seen[8];
	int count = epoll_wait(set, seen, 8, 0);
	uint64_t sum = 0;

	CHECK(count >= 0);
	for (int i = 0; i < count; i++)
		sum += seen[i].data.u64;
	return sum;
}

static void prepare(void)
{
	CHECK(pipe(level) == 0 && pipe(edge) == 0 && pipe(once) == 0);
	outer = epoll_create1(0);
	inner = epoll_create1(EPOLL_CLOEXEC);
	add(inner, level[0], EPOLLIN, 1);
	add(inner, edge[0], EPOLLIN | EPOLLET, 10);
	add(inner, once[0], EPOLLIN | EPOLLONESHOT, 100);
	add(outer, inner, EPOLLIN, 1ULL << 40);
	CHECK(put(level[1], "l") && put(once[1], "o"));
	CHECK(events(outer) == 1ULL << 40 && events(inner) == 101);
}

static void check(int cycle)
{
	(void)cycle;
	CHECK(events(outer) == 1ULL << 40);
	/* The one-shot has had its shot. */
	CHECK(events(inner) == 1);
	CHECK(put(edge[1], "e") && events(inner) == 11 && events(inner) == 1);
	CHECK(gives(edge[0], "e"));
}
