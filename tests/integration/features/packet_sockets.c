/* feature: Packet sockets (tcpdump, DHCP), with a filter */
#include "feature.h"
#include "sockets.h"

#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>

static int fd;

static void prepare(void)
{
	struct sock_filter code[] = { BPF_STMT(BPF_RET | BPF_K, 0xffff) };
	struct sock_fprog program = { 1, code };
	struct sockaddr_ll address = { .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP), .sll_ifindex = if_nametoindex("lo") };

	fd = socket(AF_PACKET, SOCK_DGRAM | SOCK_NONBLOCK, htons(ETH_P_IP));
	SKIP_UNLESS(fd >= 0);
	CHECK(setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program) == 0);
	CHECK(bind(fd, (struct sockaddr *)&address, sizeof address) == 0);
}

static void check(int cycle)
{
	char got[2048];
	struct sockaddr_in address = loopback(9);
	int sender = socket(AF_INET, SOCK_DGRAM, 0);

	(void)cycle;
	CHECK(sendto(sender, "text", 4, 0, (struct sockaddr *)&address, sizeof address) == 4);
	close(sender);
	CHECK(arrived(fd) && recv(fd, got, sizeof got, 0) == 32);
	while (recv(fd, got, sizeof got, 0) > 0)
		;
}
