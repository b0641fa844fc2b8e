/* feature: fanotify */
/* capability: CAP_SYS_ADMIN */
#include "feature.h"

#include <sys/fanotify.h>

static int fd;

static void prepare(void)
{
	close(file("/tmp/one", "text"));
	fd = fanotify_init(FAN_CLASS_NOTIF | FAN_NONBLOCK, O_RDONLY);
	SKIP_UNLESS(fd >= 0);
	SKIP_UNLESS(fanotify_mark(fd, FAN_MARK_ADD, FAN_MODIFY, AT_FDCWD, "/tmp/one") == 0);
}

static void check(int cycle)
{
	struct fanotify_event_metadata event;

	(void)cycle;
	close(file("/tmp/one", "other"));
	CHECK(read(fd, &event, sizeof event) == sizeof event && (event.mask & FAN_MODIFY));
	close(event.fd);
	while (read(fd, &event, sizeof event) > 0)
		close(event.fd);
}
