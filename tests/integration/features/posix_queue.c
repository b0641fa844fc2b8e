/* feature: POSIX message queues (mq_open) */
/* refused: it has a file open that isn't in its mounts */
#include "feature.h"

#include <mqueue.h>

static mqd_t queue;

static void prepare(void)
{
	struct mq_attr attributes = { .mq_maxmsg = 4, .mq_msgsize = 16 };

	queue = mq_open("/queue", O_RDWR | O_CREAT, 0600, &attributes);
	SKIP_UNLESS(queue != (mqd_t)-1);
	CHECK(mq_send(queue, "one", 4, 1) == 0);
}

static void check(int cycle)
{
	char text[16];

	(void)cycle;
	CHECK(mq_receive(queue, text, 16, NULL) == 4 && strcmp(text, "one") == 0);
	CHECK(mq_send(queue, "one", 4, 1) == 0);
}
