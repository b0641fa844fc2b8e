/* feature: TCP connections: data in both buffers, their options, urgent and half-closed ones */
#include "feature.h"
#include "sockets.h"

static int listening, client, server, closed_client, closed_server;

static void prepare(void)
{
	listening = listener(5000);
	client = connected(5000);
	server = accept(listening, NULL, NULL);
	set(client, IPPROTO_TCP, TCP_NODELAY, 1);
	set(client, SOL_SOCKET, SO_KEEPALIVE, 1);
	set(client, IPPROTO_TCP, TCP_KEEPIDLE, 77);
	CHECK(put(client, "not read yet"));
	closed_client = connected(5000);
	closed_server = accept(listening, NULL, NULL);
	CHECK(put(closed_client, "last words") && shutdown(closed_client, SHUT_WR) == 0);
	settle();
}

static void check(int cycle)
{
	char byte;

	CHECK(gives(server, "not read yet") && put(server, "answer") && gives(client, "answer") && put(client, "not read yet"));
	CHECK(option(client, IPPROTO_TCP, TCP_NODELAY) == 1 && option(client, IPPROTO_TCP, TCP_KEEPIDLE) == 77);
	CHECK(put(closed_server, "still") && gives(closed_client, "still"));
	if (cycle == 1) {
		CHECK(gives(closed_server, "last words") && read(closed_server, &byte, 1) == 0);
		CHECK(shutdown(closed_server, SHUT_WR) == 0 && read(closed_client, &byte, 1) == 0);
	}
	settle();
}
