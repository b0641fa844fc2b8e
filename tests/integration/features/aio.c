/* feature: Linux AIO (io_setup, io_submit) */
#include "feature.h"

#include <linux/aio_abi.h>

static aio_context_t context;
static int fd;

static void prepare(void)
{
	fd = file(FOLDER "aio", "0123456789");
	CHECK(syscall(SYS_io_setup, 8, &context) == 0);
}

static void check(int cycle)
{
	char text[5] = "";
	struct iocb one = { .aio_fildes = fd, .aio_lio_opcode = IOCB_CMD_PREAD, .aio_buf = (uintptr_t)text, .aio_nbytes = 4 }, *all = &one;
	struct io_event event;

	(void)cycle;
	CHECK(syscall(SYS_io_submit, context, 1, &all) == 1);
	CHECK(syscall(SYS_io_getevents, context, 1, 1, &event, NULL) == 1 && event.res == 4);
	CHECK(strcmp(text, "0123") == 0);
}
