/* feature: userfaultfd */
/* refused: it uses a kernel object that CRIU can't dump */
#include "feature.h"

static void prepare(void)
{
	SKIP_UNLESS(syscall(SYS_userfaultfd, O_CLOEXEC | 1 /* UFFD_USER_MODE_ONLY */) >= 0);
}

static void check(int cycle)
{
	(void)cycle;
}
