/* feature: Shared memory: anonymous, POSIX (shm_open), memfd, files, between processes */
#include "feature.h"

enum { KINDS = 5 };
static char *memory[KINDS];
static int talk, fds[KINDS];

static int add(int kind)
{
	return ++memory[kind][5000];
}

static void prepare(void)
{
	fds[1] = shm_open("/shared", O_RDWR | O_CREAT, 0600);
	fds[2] = syscall(SYS_memfd_create, "shared", 0);
	fds[3] = file(FOLDER "shared", "");
	/* Deleted, as most programs do. */
	fds[4] = shm_open("/deleted", O_RDWR | O_CREAT, 0600);
	CHECK(shm_unlink("/deleted") == 0);
	for (int i = 0; i < KINDS; i++) {
		CHECK(i == 0 || ftruncate(fds[i], 8192) == 0);
		memory[i] = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED | (i ? 0 : MAP_ANONYMOUS), i ? fds[i] : -1, 0);
		CHECK(memory[i] != MAP_FAILED);
	}
	companion(add, &talk);
}

static void check(int cycle)
{
	char byte;

	for (int i = 0; i < KINDS; i++) {
		CHECK(memory[i][5000] == 2 * cycle);
		CHECK(asked(talk, i) == 2 * cycle + 1 && memory[i][5000] == 2 * cycle + 1);
		memory[i][5000]++;
		CHECK(i == 0 || (pread(fds[i], &byte, 1, 5000) == 1 && byte == 2 * cycle + 2));
	}
}
