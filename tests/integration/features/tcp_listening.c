/* feature: TCP sockets that listen: IPv4, IPv6, several on one port (SO_REUSEPORT), and their options */
#include "feature.h"
#include "sockets.h"

static int four, six, shared[2];

static void prepare(void)
{
	struct sockaddr_in6 address = { .sin6_family = AF_INET6, .sin6_port = htons(6000), .sin6_addr = IN6ADDR_ANY_INIT };
	struct sockaddr_in same = loopback(6001);

	four = listener(5000);
	set(four, SOL_SOCKET, SO_KEEPALIVE, 1);
	set(four, IPPROTO_TCP, TCP_DEFER_ACCEPT, 3);
	set(four, IPPROTO_TCP, TCP_NODELAY, 1);
	six = socket(AF_INET6, SOCK_STREAM, 0);
	set(six, IPPROTO_IPV6, IPV6_V6ONLY, 1);
	CHECK(bind(six, (struct sockaddr *)&address, sizeof address) == 0 && listen(six, 5) == 0);
	for (int i = 0; i < 2; i++) {
		shared[i] = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
		set(shared[i], SOL_SOCKET, SO_REUSEPORT, 1);
		CHECK(bind(shared[i], (struct sockaddr *)&same, sizeof same) == 0 && listen(shared[i], 5) == 0);
	}
}

static void check(int cycle)
{
	struct sockaddr_in6 address = { .sin6_family = AF_INET6, .sin6_port = htons(6000), .sin6_addr = IN6ADDR_LOOPBACK_INIT };
	struct pollfd both[] = { { .fd = shared[0], .events = POLLIN }, { .fd = shared[1], .events = POLLIN } };
	int client = connected(5000), server, client6 = socket(AF_INET6, SOCK_STREAM, 0);

	(void)cycle;
	CHECK(put(client, "hello"));
	server = accept(four, NULL, NULL);
	CHECK(server >= 0 && gives(server, "hello"));
	CHECK(option(four, SOL_SOCKET, SO_KEEPALIVE) == 1 && option(four, IPPROTO_TCP, TCP_NODELAY) == 1);
	CHECK(option(six, IPPROTO_IPV6, IPV6_V6ONLY) == 1 && option(shared[0], SOL_SOCKET, SO_REUSEPORT) == 1);
	if (connect(client6, (struct sockaddr *)&address, sizeof address) == 0)
		close(accept(six, NULL, NULL));
	close(connected(6001));
	/* The kernel chooses which of the two gets it. */
	CHECK(poll(both, 2, -1) == 1);
	close(accept(shared[both[1].revents != 0], NULL, NULL));
	/* Whoever closes first keeps the port for a minute. */
	close(client), close(client6), close(server);
}
