/* feature: System V semaphores with SEM_UNDO */
/* limit: what a process holds at the checkpoint is given back then, as if it had ended */
#include "feature.h"

#include <sys/ipc.h>
#include <sys/sem.h>

static int semaphores;

static void prepare(void)
{
	struct sembuf take = { 0, -1, SEM_UNDO };

	semaphores = semget(IPC_PRIVATE, 1, IPC_CREAT | 0600);
	SKIP_UNLESS(semaphores >= 0);
	CHECK(semctl(semaphores, 0, SETVAL, 3) == 0 && semop(semaphores, &take, 1) == 0);
}

static void check(int cycle)
{
	(void)cycle;
	CHECK(semctl(semaphores, 0, GETVAL) == 3);
}
