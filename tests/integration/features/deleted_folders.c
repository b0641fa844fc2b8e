/* feature: The working directory, or an open folder, is deleted */
#include "feature.h"

static int folder;

static void prepare(void)
{
	CHECK(mkdir(FOLDER "one", 0755) == 0 && mkdir(FOLDER "two", 0755) == 0);
	folder = open(FOLDER "two", O_RDONLY | O_DIRECTORY);
	CHECK(chdir(FOLDER "one") == 0);
	CHECK(rmdir(FOLDER "one") == 0 && rmdir(FOLDER "two") == 0);
}

static void check(int cycle)
{
	struct stat seen;

	(void)cycle;
	CHECK(open("file", O_CREAT | O_WRONLY, 0600) < 0 && errno == ENOENT);
	CHECK(fstat(folder, &seen) == 0 && S_ISDIR(seen.st_mode) && seen.st_nlink == 0);
}
