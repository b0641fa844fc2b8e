/* feature: Sockets of other families (AF_ALG, AF_VSOCK, SCTP, Bluetooth) */
/* refused: it has a socket of a protocol that CRIU can't dump */
#include "feature.h"

static void prepare(void)
{
	int fd = socket(AF_ALG, SOCK_SEQPACKET, 0);

	if (fd < 0)
		fd = socket(AF_VSOCK, SOCK_STREAM, 0);
	SKIP_UNLESS(fd >= 0);
}

static void check(int cycle)
{
	(void)cycle;
}
