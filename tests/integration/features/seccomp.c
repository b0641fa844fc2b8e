/* feature: seccomp filters that a process has put on itself */
#include "feature.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>

static void prepare(void)
{
	/* personality() fails with ENOTTY (25). */
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_personality, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOTTY),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { 4, code };

	CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
	CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
}

static void check(int cycle)
{
	(void)cycle;
	CHECK(syscall(SYS_personality, -1) < 0 && errno == ENOTTY);
	CHECK(prctl(PR_GET_SECCOMP) == 2);
}
