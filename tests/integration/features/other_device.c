/* feature: Other devices: /dev/fuse, /dev/kvm, /dev/net/tun, GPUs */
/* refused: it has a device open */
#include "feature.h"

#include <sys/sysmacros.h>

static void prepare(void)
{
	SKIP_UNLESS(mknod("/dev/fuse", S_IFCHR | 0600, makedev(10, 229)) == 0);
	SKIP_UNLESS(open("/dev/fuse", O_RDWR) >= 0);
}

static void check(int cycle)
{
	(void)cycle;
}
