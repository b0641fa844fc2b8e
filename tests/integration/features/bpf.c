/* feature: eBPF maps and programs */
/* refused: it uses a kernel object that CRIU can't dump */
/* capability: CAP_SYS_ADMIN */
#include "feature.h"

#include <linux/bpf.h>

static int program, map;

static void prepare(void)
{
	union bpf_attr attributes = { .map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4, .max_entries = 1 };
	static const struct bpf_insn code[] = { { .code = 0xb7 }, { .code = 0x95 } };
	union bpf_attr load = { .prog_type = BPF_PROG_TYPE_SOCKET_FILTER, .insn_cnt = 2, .insns = (uintptr_t)code,
				.license = (uintptr_t)"GPL" };

	map = syscall(SYS_bpf, BPF_MAP_CREATE, &attributes, sizeof attributes);
	SKIP_UNLESS(map >= 0);
	program = syscall(SYS_bpf, BPF_PROG_LOAD, &load, sizeof load);
	SKIP_UNLESS(program >= 0);
}

static void check(int cycle)
{
	(void)cycle;
}
