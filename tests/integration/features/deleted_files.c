/* feature: Files that are open and deleted: without a name, with another hard link, made with O_TMPFILE, on tmpfs */
#include "feature.h"

static int gone, linked, nameless, on_tmpfs;
static char *mapped;

static void prepare(void)
{
	gone = file(FOLDER "gone", "gone");
	mapped = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, gone, 0);
	CHECK(unlink(FOLDER "gone") == 0);
	linked = file(FOLDER "linked", "linked");
	CHECK(link(FOLDER "linked", FOLDER "other") == 0 && unlink(FOLDER "linked") == 0);
	nameless = open(FOLDER, O_TMPFILE | O_RDWR, 0600);
	CHECK(nameless >= 0 && put(nameless, "nameless"));
	on_tmpfs = file("/tmp/gone", "tmpfs");
	CHECK(unlink("/tmp/gone") == 0);
}

static void check(int cycle)
{
	char got[16] = "";
	struct stat one, other;

	mapped[0] = 'G' + cycle;
	CHECK(pread(gone, got, 4, 0) == 4 && got[0] == 'G' + cycle && memcmp(got + 1, "one", 3) == 0);
	CHECK(lseek(gone, 0, SEEK_CUR) == 4);
	CHECK(fstat(gone, &one) == 0 && one.st_nlink == 0);
	CHECK(access(FOLDER "gone", F_OK) < 0 && access(FOLDER "linked", F_OK) < 0);
	CHECK(fstat(linked, &one) == 0 && stat(FOLDER "other", &other) == 0 && one.st_ino == other.st_ino);
	CHECK(pread(nameless, got, 8, 0) == 8 && memcmp(got, "nameless", 8) == 0);
	CHECK(pread(on_tmpfs, got, 5, 0) == 5 && memcmp(got, "tmpfs", 5) == 0);
}
