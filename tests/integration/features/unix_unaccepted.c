/* feature: Unix connections of its own that nobody has accepted yet */
/* refused: it has connections that it hasn't accepted yet */
#include "feature.h"

#include <sys/un.h>

static int listening, client;

static void prepare(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = "/tmp/listening" };

	listening = socket(AF_UNIX, SOCK_STREAM, 0);
	client = socket(AF_UNIX, SOCK_STREAM, 0);
	CHECK(bind(listening, (struct sockaddr *)&address, sizeof address) == 0 && listen(listening, 5) == 0);
	CHECK(connect(client, (struct sockaddr *)&address, sizeof address) == 0 && put(client, "hello"));
}

static void check(int cycle)
{
	int server;

	if (cycle == 1) {
		server = accept(listening, NULL, NULL);
		CHECK(server >= 0 && gives(server, "hello"));
	}
}
