/* feature: Huge pages (MAP_HUGETLB) */
#include "feature.h"

static char *memory;

static void prepare(void)
{
	memory = mmap(NULL, 2 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
	SKIP_UNLESS(memory != MAP_FAILED);
	strcpy(memory, "huge");
}

static void check(int cycle)
{
	(void)cycle;
	CHECK(strcmp(memory, "huge") == 0);
}
