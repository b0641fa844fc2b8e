/* feature: Open files: position, flags, descriptors that share a position, O_PATH, folders, close-on-exec */
#include "feature.h"

#include <dirent.h>

static int one, two, appended, path, folder;

static void prepare(void)
{
	one = file(FOLDER "one", "0123456789");
	CHECK(lseek(one, 4, SEEK_SET) == 4);
	two = dup(one);
	CHECK(fcntl(two, F_SETFD, FD_CLOEXEC) == 0);
	appended = open(FOLDER "log", O_WRONLY | O_CREAT | O_APPEND | O_NONBLOCK, 0600);
	CHECK(put(appended, "a"));
	path = open(FOLDER "one", O_PATH);
	folder = open(FOLDER, O_RDONLY | O_DIRECTORY);
	CHECK(path >= 0 && folder >= 0);
}

static void check(int cycle)
{
	char byte;
	int fd;

	CHECK(lseek(two, 0, SEEK_CUR) == 4 + cycle);
	CHECK(read(one, &byte, 1) == 1 && byte == '4' + cycle);
	CHECK(fcntl(two, F_GETFD) == FD_CLOEXEC && fcntl(one, F_GETFD) == 0);
	CHECK((fcntl(appended, F_GETFL) & (O_APPEND | O_NONBLOCK | O_ACCMODE)) == (O_APPEND | O_NONBLOCK | O_WRONLY));
	CHECK(put(appended, "b"));
	CHECK(fcntl(path, F_GETFL) & O_PATH);
	fd = openat(folder, "log", O_RDONLY);
	CHECK(gives(fd, cycle ? "abb" : "ab"));
	close(fd);
}
