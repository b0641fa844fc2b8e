/* feature: MPTCP (Go from 1.24 on listens with it, unless the pod has net.mptcp.enabled=0, which criproxy sets) */
/* refused: it listens with MPTCP, which CRIU can't dump */
#include "feature.h"
#include "sockets.h"

static void prepare(void)
{
	struct sockaddr_in address = loopback(5000);
	int fd = socket(AF_INET, SOCK_STREAM, 262);

	SKIP_UNLESS(fd >= 0);
	CHECK(bind(fd, (struct sockaddr *)&address, sizeof address) == 0 && listen(fd, 5) == 0);
}

static void check(int cycle)
{
	(void)cycle;
}
