/* feature: System V semaphores and message queues */
#include "feature.h"

#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>

static int semaphores, queue;

static void prepare(void)
{
	struct {
		long kind;
		char text[8];
	} message = { 3, "message" };

	semaphores = semget(0x5433, 2, IPC_CREAT | 0600);
	queue = msgget(0x5434, IPC_CREAT | 0600);
	SKIP_UNLESS(semaphores >= 0 && queue >= 0);
	CHECK(semctl(semaphores, 1, SETVAL, 7) == 0);
	CHECK(msgsnd(queue, &message, 8, 0) == 0);
}

static void check(int cycle)
{
	struct {
		long kind;
		char text[8];
	} message;

	(void)cycle;
	CHECK(semget(0x5433, 2, 0) == semaphores && semctl(semaphores, 1, GETVAL) == 7);
	CHECK(msgrcv(queue, &message, 8, 3, IPC_NOWAIT) == 8 && strcmp(message.text, "message") == 0);
	CHECK(msgsnd(queue, &message, 8, 0) == 0);
}
