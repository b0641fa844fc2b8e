/* feature: Settings of a process: limits, niceness, parent-death signal, subreaper, dumpable, oom_score_adj, name, arguments */
#include "feature.h"

#include <sys/resource.h>

static void score(const char *text)
{
	int fd = open("/proc/self/oom_score_adj", O_WRONLY);

	CHECK(put(fd, text));
	close(fd);
}

static void prepare(void)
{
	CHECK(setrlimit(RLIMIT_CORE, &(struct rlimit){ 4096, 8192 }) == 0);
	CHECK(setpriority(PRIO_PROCESS, 0, 5) == 0);
	CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
	CHECK(prctl(PR_SET_NAME, "another name") == 0);
	CHECK(prctl(PR_SET_PDEATHSIG, SIGUSR1) == 0);
	score("321");
	CHECK(chdir("/tmp") == 0);
}

static void check(int cycle)
{
	struct rlimit limit;
	char name[16] = "", path[64];
	int fd = open("/proc/self/oom_score_adj", O_RDONLY), reaper = 0, death = 0;

	(void)cycle;
	CHECK(getrlimit(RLIMIT_CORE, &limit) == 0 && limit.rlim_cur == 4096 && limit.rlim_max == 8192);
	CHECK(getpriority(PRIO_PROCESS, 0) == 5);
	CHECK(prctl(PR_GET_CHILD_SUBREAPER, &reaper) == 0 && reaper == 1);
	CHECK(prctl(PR_GET_PDEATHSIG, &death) == 0 && death == SIGUSR1);
	CHECK(prctl(PR_GET_NAME, name) == 0 && strcmp(name, "another name") == 0);
	CHECK(gives(fd, "321\n"));
	close(fd);
	CHECK(getcwd(path, sizeof path) && strcmp(path, "/tmp") == 0);
	fd = open("/proc/self/cmdline", O_RDONLY);
	CHECK(read(fd, path, sizeof path) > 0 && strstr(path, "process_settings"));
	close(fd);
}
