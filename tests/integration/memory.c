/* Build: gcc -static -O2 -std=gnu11 -Wall -Wextra -o memory memory.c   (test_pages.py does it)
 *
 * memory MEBIBYTES
 *
 * An application that knows what every page of its memory has to hold, and never rests from changing it: it writes, forks,
 * discards, unmaps, maps and moves at random, and looks at what it finds. It obeys lines of its stdin: "check" (all pages,
 * answer "good"), "rest" and "go on" (with the changing), "wide" (discards and unmaps more than 2 GiB at once). A page
 * with the wrong content is told ("bad ...") and is its end, with code 3.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, REGION = 1024 }; /* pages of a region: 4 MiB */

static int regions;
static char **where;
static uint32_t *holds; /* what each page's words begin with, 0: it is empty */
static uint32_t stamp = 1;
static uint64_t seed = 88172645463325252ULL;

static uint32_t any(uint32_t below)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed % below;
}

static uint32_t *page_at(int region, int page)
{
	return (uint32_t *)(where[region] + (size_t)page * PAGE);
}

static void fill(int region, int page)
{
	uint32_t *words = page_at(region, page), value = holds[region * REGION + page] = stamp++;

	for (int i = 0; i < PAGE / 4; i += 16)
		words[i] = value + i;
}

static void look(int region, int page, const char *when)
{
	uint32_t *words = page_at(region, page), value = holds[region * REGION + page];

	for (int i = 0; i < PAGE / 4; i += 16)
		if (words[i] != (value ? value + i : 0)) {
			dprintf(1, "bad %s: region %d page %d word %d is %u, not %u\n", when, region, page, i, words[i],
				value ? value + i : 0);
			_exit(3);
		}
}

static void check(const char *when)
{
	for (int region = 0; region < regions; region++)
		for (int page = 0; page < REGION; page++)
			look(region, page, when);
}

static void die(const char *what)
{
	perror(what);
	_exit(4);
}

static void child_looks(void)
{
	pid_t child = fork();
	int how;

	if (child < 0)
		die("fork");
	if (child == 0) {
		for (int i = 0; i < 300; i++)
			look(any(regions), any(REGION), "in a child");
		/* It writes to what it shares with its parent. */
		for (int i = 0; i < 50; i++)
			fill(any(regions), any(REGION));
		if (any(4) == 0) {
			pid_t grandchild = fork();

			if (grandchild == 0) {
				for (int i = 0; i < 300; i++)
					look(any(regions), any(REGION), "in a grandchild");
				_exit(0);
			}
			waitpid(grandchild, &how, 0);
			_exit(WEXITSTATUS(how));
		}
		_exit(0);
	}
	for (int i = 0; i < 50; i++)
		fill(any(regions), any(REGION));
	waitpid(child, &how, 0);
	if (how)
		_exit(3);
}

static void change(void)
{
	int region = any(regions), from = any(REGION), count = 1 + any(REGION - from);
	char *start = where[region] + (size_t)from * PAGE;
	size_t length = (size_t)count * PAGE;

	switch (any(12)) {
	case 0:
		child_looks();
		break;
	case 1:
		if (madvise(start, length, MADV_DONTNEED))
			die("madvise");
		memset(holds + region * REGION + from, 0, count * sizeof *holds);
		break;
	case 2:
		if (munmap(start, length))
			die("munmap");
		if (mmap(start, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != start)
			die("mmap");
		memset(holds + region * REGION + from, 0, count * sizeof *holds);
		break;
	case 3: {
		/* All its pieces, which may be several mappings, to a new place. */
		char *target = mmap(NULL, (size_t)REGION * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		for (int page = 0; page < REGION; page += 64) {
			size_t offset = (size_t)page * PAGE, part = 64 * PAGE;

			if (mremap(where[region] + offset, part, part, MREMAP_MAYMOVE | MREMAP_FIXED, target + offset) == MAP_FAILED) {
				/* Across two mappings: page by page. Linux 6.17 and later may have moved some of it (EFAULT). */
				for (size_t at = offset; at < offset + part; at += PAGE)
					if (mremap(where[region] + at, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target + at) == MAP_FAILED &&
					    errno != EFAULT)
						die("mremap");
			}
		}
		where[region] = target;
		break;
	}
	case 4:
		for (int i = 0; i < count; i++)
			fill(region, from + i);
		break;
	default:
		for (int i = 0; i < 20; i++) {
			look(any(regions), any(REGION), "at random");
			fill(any(regions), any(REGION));
		}
	}
}

static void wide(void)
{
	size_t gibibytes = 5UL << 30;
	char *space = mmap(NULL, gibibytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (space == MAP_FAILED || munmap(space, gibibytes))
		die("wide");
}

static char *wide_space;

int main(int argc, char **argv)
{
	struct pollfd input = { 0, POLLIN, 0 };
	int resting = 0;
	char line[100];

	regions = (argc > 1 ? atoi(argv[1]) : 64) / 4;
	where = calloc(regions, sizeof *where);
	holds = calloc(regions, REGION * sizeof *holds);
	for (int region = 0; region < regions; region++) {
		where[region] = mmap(NULL, (size_t)REGION * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		for (int page = 0; page < REGION; page++)
			if (page % 7)
				fill(region, page);
	}
	/* Its first and its last pages are used, and nothing in between. */
	wide_space = mmap(NULL, 5UL << 30, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	memset(wide_space, 1, 1 << 20);
	memset(wide_space + (5UL << 30) - (1 << 20), 1, 1 << 20);
	dprintf(1, "ready\n");
	for (;;) {
		if (!resting)
			change();
		if (poll(&input, 1, resting ? -1 : 0) <= 0)
			continue;
		ssize_t length = read(0, line, sizeof line - 1);
		if (length <= 0)
			return 0;
		line[length] = 0;
		if (strncmp(line, "rest", 4) == 0)
			resting = 1;
		else if (strncmp(line, "go on", 5) == 0)
			resting = 0;
		else if (strncmp(line, "check", 5) == 0)
			check("in a check");
		else if (strncmp(line, "wide", 4) == 0) {
			wide();
			if (madvise(wide_space, 5UL << 30, MADV_DONTNEED))
				die("madvise");
			for (size_t at = 0; at < 1 << 20; at += PAGE)
				if (wide_space[at] || wide_space[(5UL << 30) - PAGE - at]) {
					dprintf(1, "bad wide\n");
					_exit(3);
				}
		}
		dprintf(1, "good\n");
	}
}
