/* feature: Pipes and FIFOs, with data under way and sizes of their own */
#include "feature.h"

static int both[2], fifo_in, fifo_out, child_talk, to_child[2];

static int from_pipe(int question)
{
	char byte;

	(void)question;
	CHECK(read(to_child[0], &byte, 1) == 1);
	return byte;
}

static void prepare(void)
{
	CHECK(pipe(to_child) == 0);
	companion(from_pipe, &child_talk);
	close(to_child[0]);
	CHECK(pipe2(both, O_NONBLOCK) == 0 && put(both[1], "under way"));
	CHECK(fcntl(both[1], F_SETPIPE_SZ, 16384) == 16384);
	CHECK(mkfifo(FOLDER "fifo", 0600) == 0);
	fifo_out = open(FOLDER "fifo", O_RDONLY | O_NONBLOCK);
	fifo_in = open(FOLDER "fifo", O_WRONLY);
	CHECK(put(fifo_in, "fifo"));
}

static void check(int cycle)
{
	char byte;

	CHECK(fcntl(both[0], F_GETPIPE_SZ) == 16384 && (fcntl(both[0], F_GETFL) & O_NONBLOCK));
	CHECK(gives(both[0], "under way") && put(both[1], "under way"));
	CHECK(gives(fifo_out, "fifo") && put(fifo_in, "fifo"));
	CHECK(put(to_child[1], cycle ? "b" : "a") && asked(child_talk, '?') == (cycle ? 'b' : 'a'));
	if (cycle == 1) {
		CHECK(gives(both[0], "under way"));
		close(both[1]);
		CHECK(read(both[0], &byte, 1) == 0);
	}
}
