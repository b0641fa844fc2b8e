/* feature: UDP sockets: bound, connected, broadcast, multicast options, with datagrams under way */
/* limit: datagrams that weren't read at the checkpoint are lost, as UDP may lose any */
#include "feature.h"
#include "sockets.h"

static int bound, client;

static void prepare(void)
{
	struct sockaddr_in address = loopback(5300);

	bound = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
	set(bound, SOL_SOCKET, SO_BROADCAST, 1);
	CHECK(bind(bound, (struct sockaddr *)&address, sizeof address) == 0);
	client = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
	CHECK(connect(client, (struct sockaddr *)&address, sizeof address) == 0);
}

static void check(int cycle)
{
	(void)cycle;
	CHECK(put(client, "datagram") && arrived(bound) && gives(bound, "datagram"));
	CHECK(option(bound, SOL_SOCKET, SO_BROADCAST) == 1);
}
