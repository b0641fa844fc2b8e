/* feature: TCP connections that the other side has closed, and TIME_WAIT */
#include "feature.h"
#include "sockets.h"

static int listening, waiting, unbound, bound;

static void prepare(void)
{
	struct sockaddr_in address = loopback(5002);
	int client, server;

	listening = listener(5000);
	/* CLOSE_WAIT */
	client = connected(5000);
	waiting = accept(listening, NULL, NULL);
	close(client);
	/* TIME_WAIT */
	client = connected(5000);
	server = accept(listening, NULL, NULL);
	close(server);
	CHECK(arrived(client));
	close(client);
	unbound = socket(AF_INET, SOCK_STREAM, 0);
	bound = socket(AF_INET, SOCK_STREAM, 0);
	CHECK(bind(bound, (struct sockaddr *)&address, sizeof address) == 0);
	settle();
}

static void check(int cycle)
{
	char byte;

	(void)cycle;
	CHECK(read(waiting, &byte, 1) == 0);
	if (cycle == 1) {
		CHECK(listen(bound, 1) == 0);
		close(connected(5002));
	}
}
