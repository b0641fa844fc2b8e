/* feature: Memory: private and shared mappings of files, protections, guard pages, locked memory, madvise(), big stacks */
/* limit: a mapping that is wiped for children (MADV_WIPEONFORK) isn't any more */
#include "feature.h"

#include <sys/resource.h>

static char *anonymous, *private, *shared, *locked, *wiped, *read_only, *huge;

static void prepare(void)
{
	int fd = file(FOLDER "mapped", "mapped");

	CHECK(ftruncate(fd, 8192) == 0);
	anonymous = mmap(NULL, 16384, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(mprotect(anonymous + 4096, 4096, PROT_NONE) == 0);
	anonymous[0] = 'a', anonymous[8192] = 'b';
	private = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	shared = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	private[0] = 'P', shared[4096] = 's';
	read_only = mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);
	close(fd);
	locked = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED, -1, 0);
	wiped = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(madvise(wiped, 4096, MADV_WIPEONFORK) == 0 && madvise(anonymous, 16384, MADV_DONTFORK) == 0);
	huge = mmap(NULL, 8 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	madvise(huge, 8 << 20, MADV_HUGEPAGE);
	memset(huge, 'h', 8 << 20);
	CHECK(locked != MAP_FAILED && read_only != MAP_FAILED);
	locked[0] = 'l', wiped[0] = 'w';
}

/* "Flags" in /proc/self/smaps of the mapping with this address. */
static int has(const void *address, const char *flag)
{
	char line[512], start[32];
	FILE *maps = fopen("/proc/self/smaps", "r");
	int inside = 0, found = 0;

	snprintf(start, sizeof start, "%lx-", (unsigned long)address);
	while (fgets(line, sizeof line, maps)) {
		if (strncmp(line, start, strlen(start)) == 0)
			inside = 1;
		if (inside && strncmp(line, "VmFlags:", 8) == 0) {
			found = strstr(line, flag) != NULL;
			break;
		}
	}
	fclose(maps);
	return found;
}

static void check(int cycle)
{
	int status;
	pid_t child;

	CHECK(anonymous[0] == 'a' + cycle && anonymous[8192] == 'b');
	anonymous[0]++;
	CHECK(private[0] == 'P' && private[1] == 'a' && shared[0] == 'm' && shared[4096] == 's');
	CHECK(read_only[0] == 'm');
	CHECK(locked[0] == 'l' && has(locked, " lo"));
	CHECK(wiped[0] == 'w');
	CHECK(has(anonymous, " dc"));
	CHECK(huge[0] == 'h' && huge[(8 << 20) - 1] == 'h');
	child = fork();
	if (child == 0) {
		anonymous[4096] = 'x';
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
}
