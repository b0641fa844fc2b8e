/* feature: System V shared memory (PostgreSQL), attached, also a deleted segment */
#include "feature.h"

#include <sys/ipc.h>
#include <sys/shm.h>

static int id, talk;
static char *kept, *deleted;

static int add(int unused)
{
	(void)unused;
	deleted[0]++;
	return ++kept[5000];
}

static void prepare(void)
{
	int other;

	id = shmget(0x5432, 8192, IPC_CREAT | 0600);
	other = shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0600);
	SKIP_UNLESS(id >= 0 && other >= 0);
	kept = shmat(id, NULL, 0);
	deleted = shmat(other, NULL, 0);
	CHECK(kept != (void *)-1 && deleted != (void *)-1);
	CHECK(shmctl(other, IPC_RMID, NULL) == 0);
	companion(add, &talk);
}

static void check(int cycle)
{
	struct shmid_ds status;

	CHECK(kept[5000] == cycle && deleted[0] == cycle);
	CHECK(asked(talk, 0) == cycle + 1 && kept[5000] == cycle + 1 && deleted[0] == cycle + 1);
	CHECK(shmget(0x5432, 8192, 0) == id);
	CHECK(shmctl(id, IPC_STAT, &status) == 0 && status.shm_nattch == 2 && (status.shm_perm.mode & 0777) == 0600);
}
