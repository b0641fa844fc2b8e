/* feature: Unix datagram and seqpacket sockets between its processes, with messages under way */
#include "feature.h"

#include <sys/un.h>

static int named, sender, pair[2], packets[2];

static void prepare(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = "/tmp/datagrams" };

	named = socket(AF_UNIX, SOCK_DGRAM, 0);
	sender = socket(AF_UNIX, SOCK_DGRAM, 0);
	CHECK(bind(named, (struct sockaddr *)&address, sizeof address) == 0);
	CHECK(connect(sender, (struct sockaddr *)&address, sizeof address) == 0);
	CHECK(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair) == 0 && socketpair(AF_UNIX, SOCK_SEQPACKET, 0, packets) == 0);
	CHECK(put(sender, "one") && put(sender, "two") && put(pair[0], "three") && put(packets[0], "four") && put(packets[0], "five"));
}

static void check(int cycle)
{
	(void)cycle;
	CHECK(gives(named, "one") && gives(named, "two") && gives(pair[1], "three"));
	CHECK(gives(packets[1], "four") && gives(packets[1], "five"));
	CHECK(put(sender, "one") && put(sender, "two") && put(pair[0], "three") && put(packets[0], "four") && put(packets[0], "five"));
}
