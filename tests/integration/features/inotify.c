/* feature: inotify, with watches of files and folders, and unread events */
/* limit: events that nobody has read at the checkpoint are lost */
#include "feature.h"

#include <sys/inotify.h>

static int fd, folder, one;

static int events(int watch)
{
	char buffer[4096] __attribute__((aligned(8)));
	ssize_t size = read(fd, buffer, sizeof buffer);
	int count = 0;

	for (ssize_t at = 0; at < size; at += sizeof(struct inotify_event) + ((struct inotify_event *)(buffer + at))->len)
		count += ((struct inotify_event *)(buffer + at))->wd == watch;
	return count;
}

static void prepare(void)
{
	CHECK(mkdir(FOLDER "watched", 0755) == 0);
	close(file("/tmp/one", "text"));
	fd = inotify_init1(IN_NONBLOCK);
	folder = inotify_add_watch(fd, FOLDER "watched", IN_CREATE | IN_DELETE);
	one = inotify_add_watch(fd, "/tmp/one", IN_MODIFY);
	CHECK(folder > 0 && one > 0);
}

static void check(int cycle)
{
	(void)cycle;
	close(file(FOLDER "watched/new", "text"));
	CHECK(events(folder) == 1);
	close(file("/tmp/one", "other"));
	CHECK(events(one) >= 1);
	CHECK(unlink(FOLDER "watched/new") == 0);
	CHECK(events(folder) == 1);
	CHECK(events(folder) == 0);
}
