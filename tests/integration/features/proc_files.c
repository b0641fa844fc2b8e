/* feature: Open files of /proc and /sys */
#include "feature.h"

static int own, self_folder, cpu, sysfs;

static void prepare(void)
{
	own = open("/proc/self/stat", O_RDONLY);
	self_folder = open("/proc/self/fd", O_RDONLY | O_DIRECTORY);
	cpu = open("/proc/stat", O_RDONLY);
	sysfs = open("/sys/kernel/mm/transparent_hugepage/enabled", O_RDONLY);
	CHECK(own >= 0 && self_folder >= 0 && cpu >= 0);
}

static void check(int cycle)
{
	char text[64] = "";

	(void)cycle;
	CHECK(pread(own, text, 63, 0) > 0 && atoi(text) == getpid());
	CHECK(faccessat(self_folder, "0", F_OK, 0) == 0);
	CHECK(pread(cpu, text, 3, 0) == 3 && memcmp(text, "cpu", 3) == 0);
	CHECK(sysfs < 0 || pread(sysfs, text, 8, 0) > 0);
}
