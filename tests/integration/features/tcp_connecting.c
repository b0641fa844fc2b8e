/* feature: A connect() under way (SYN_SENT) to a host that doesn't answer */
/* capability: CAP_NET_ADMIN */
#include "feature.h"
#include "sockets.h"

#include <net/route.h>
#include <sys/ioctl.h>

static int fd;

static void prepare(void)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(80), .sin_addr = { htonl(0xc0000201) } };
	struct sockaddr_in mask = { .sin_family = AF_INET, .sin_addr = { htonl(0xffffffff) } };
	struct rtentry route = { .rt_flags = RTF_UP | RTF_HOST, .rt_dev = "lo" };

	/* Nobody has 192.0.2.1 there. */
	memcpy(&route.rt_dst, &address, sizeof address);
	((struct sockaddr_in *)&route.rt_dst)->sin_port = 0;
	memcpy(&route.rt_genmask, &mask, sizeof mask);
	fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	SKIP_UNLESS(ioctl(fd, SIOCADDRT, &route) == 0);
	CHECK(connect(fd, (struct sockaddr *)&address, sizeof address) < 0 && errno == EINPROGRESS);
}

static void check(int cycle)
{
	struct tcp_info info;
	socklen_t size = sizeof info;

	(void)cycle;
	CHECK(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0 && info.tcpi_state == TCP_SYN_SENT);
}
