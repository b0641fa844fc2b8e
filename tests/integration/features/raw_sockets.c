/* feature: Raw sockets (ping) */
#include "feature.h"
#include "sockets.h"

static int fd;

static void prepare(void)
{
	fd = socket(AF_INET, SOCK_RAW | SOCK_NONBLOCK, IPPROTO_ICMP);
	SKIP_UNLESS(fd >= 0);
}

static void check(int cycle)
{
	unsigned char packet[8] = { 8, 0, 0xf7, 0xff }, got[128];
	struct sockaddr_in address = loopback(0);

	(void)cycle;
	CHECK(sendto(fd, packet, 8, 0, (struct sockaddr *)&address, sizeof address) == 8);
	CHECK(arrived(fd) && recv(fd, got, sizeof got, 0) == 28);
	while (recv(fd, got, sizeof got, 0) > 0)
		;
}
