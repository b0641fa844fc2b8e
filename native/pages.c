/* Build: gcc -static -O2 -std=gnu11 -D_GNU_SOURCE -Wall -Wextra -o pages pages.c   (setup.py does it)
 *
 * pages IMAGES-FD SOCKET-FD
 *
 * Gives processes that `criu restore --lazy-pages` has restored their memory: each page when it is touched, all others one
 * after the other meanwhile. It takes the place of `criu lazy-pages`. IMAGES-FD is the checkpoint's folder, SOCKET-FD listens
 * where that restore connects to. It runs on the host, outside of the container. It guarantees:
 *
 * - It listens from the start (the socket is its caller's), so that it and the restore can be started at the same time.
 * - When every page of every process is where it belongs, it writes "loaded" to its stdout and ends with 0. Processes that
 *   are gone need nothing.
 * - If it ends in any other way, SIGKILL included, processes that touch a missing page wait. They never read zeros instead,
 *   which is what the kernel gives them when the last descriptor of their userfaultfd is closed: a second process, the
 *   keeper, shares this one's table of descriptors and keeps it until those processes are gone. Whoever started this has to
 *   kill them, for nobody can load the rest any more: the kernel tells only once what they have unmapped, moved and shared.
 * - A change of a process's memory is known here before a page is put into it: the kernel refuses copies (EAGAIN) until its
 *   message has been read. So pages that were unmapped or discarded meanwhile don't come back, pages that were moved are
 *   found at their new place, and a child has what its parent had at the fork.
 * - Every page is charged to the cgroup of the process which it is for (the kernel's doing).
 *
 * With CRIU's socket: for each process its pid (an int, negative if it has no memory) and its userfaultfd (SCM_RIGHTS, with
 * one byte of data); in the end FINISHED. The images: pagemap-PID.img and pages-N.img (CRIU's images/pagemap.proto).
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { FINISHED = 0x52535446, COMMON_MAGIC = 0x54564319, PAGEMAP_MAGIC = 0x56084025 };
enum { LAZY = 2, PRESENT = 4 }; /* flags of a pagemap entry */

static const uint64_t around = 64 << 10;     /* loaded at once where a page is waited for */
static const uint64_t background = 256 << 10; /* loaded at once meanwhile; whoever touches a page waits for that long */
static const uint64_t ahead = 8 << 20;       /* read from the disk before it is needed */

enum { CALL_MS = 150000, OUT_OF_MEMORY_MS = 5000 };

/* Right after the restore somebody waits for the application's first answer, and this process would be in the way: at
 * first nothing is loaded unasked, then only when no page was touched for a moment, and then as fast as it goes. */
enum { ALONE_MS = 15, CONSIDERATE_MS = 100, CALM_MS = 2 };

struct range {
	uint64_t start, end; /* where in the process, at present */
	uint64_t at;         /* where in the image */
};

/* The memory of one process: what is still missing, sorted. */
struct space {
	struct space *next;
	int uffd;
	const char *pages;
	uint64_t size, advised; /* of the image */
	struct range *ranges;
	size_t first, count, room; /* those from first to count */
	uint64_t *waiting;         /* addresses that are waited for and couldn't be loaded yet */
	size_t waiting_count, waiting_room;
};

static struct space *spaces;
static int64_t restored, touched; /* when the restore had finished, and when a page was touched last */
static int images;
static uint64_t page;

static _Noreturn void fail(const char *what)
{
	dprintf(2, "pages: %s: %s\n", what, strerror(errno));
	_exit(1);
}

static _Noreturn void refuse(const char *what)
{
	dprintf(2, "pages: %s\n", what);
	_exit(1);
}

static int64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000LL + time.tv_nsec / 1000000;
}

static void *more(void *items, size_t *room, size_t size)
{
	*room = *room ? 2 * *room : 64;
	items = reallocarray(items, *room, size);
	if (!items)
		fail("memory");
	return items;
}

/* --- What is missing ------------------------------------------------------------------------------------------------- */

/* The first range that ends behind the address. */
static size_t find(const struct space *space, uint64_t address)
{
	size_t low = space->first, high = space->count;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (space->ranges[middle].end > address)
			high = middle;
		else
			low = middle + 1;
	}
	return low;
}

static void insert(struct space *space, size_t index, struct range range)
{
	if (space->count == space->room)
		space->ranges = more(space->ranges, &space->room, sizeof range);
	memmove(space->ranges + index + 1, space->ranges + index, (space->count - index) * sizeof range);
	space->ranges[index] = range;
	space->count++;
}

/* What lies there isn't missing any more. */
static void drop(struct space *space, uint64_t start, uint64_t end)
{
	size_t from = find(space, start), to;

	if (from == space->count || space->ranges[from].start >= end)
		return;
	if (space->ranges[from].start < start) {
		struct range rest = space->ranges[from];

		space->ranges[from].end = start;
		from++;
		if (rest.end > end) {
			rest.at += end - rest.start;
			rest.start = end;
			insert(space, from, rest);
			return;
		}
	}
	for (to = from; to < space->count && space->ranges[to].end <= end; to++)
		;
	if (to < space->count && space->ranges[to].start < end) {
		space->ranges[to].at += end - space->ranges[to].start;
		space->ranges[to].start = end;
	}
	/* In their order they are loaded from the first on: nothing has to be moved then. */
	if (from == space->first) {
		space->first = to;
	} else {
		memmove(space->ranges + from, space->ranges + to, (space->count - to) * sizeof *space->ranges);
		space->count -= to - from;
	}
}

static void move(struct space *space, uint64_t from, uint64_t to, uint64_t length)
{
	struct range *moved = NULL;
	size_t count = 0, room = 0;

	for (size_t i = find(space, from); i < space->count && space->ranges[i].start < from + length; i++) {
		struct range part = space->ranges[i];

		if (part.start < from) {
			part.at += from - part.start;
			part.start = from;
		}
		if (part.end > from + length)
			part.end = from + length;
		if (count == room)
			moved = more(moved, &room, sizeof part);
		part.start += to - from;
		part.end += to - from;
		moved[count++] = part;
	}
	drop(space, from, from + length);
	drop(space, to, to + length);
	for (size_t i = 0; i < count; i++)
		insert(space, find(space, moved[i].start), moved[i]);
	free(moved);
}

static void forget(struct space *space)
{
	/* The table is the keeper's, too: what is closed here is closed for good. */
	close(space->uffd);
	space->uffd = -1;
	space->first = space->count = space->waiting_count = 0;
}

/* --- The images ------------------------------------------------------------------------------------------------------ */

static const char *map(const char *name, uint64_t *size)
{
	int fd = openat(images, name, O_RDONLY | O_CLOEXEC);
	struct stat status;
	void *content = NULL;

	if (fd < 0 || fstat(fd, &status) < 0)
		fail(name);
	*size = status.st_size;
	if (*size && (content = mmap(NULL, *size, PROT_READ, MAP_SHARED, fd, 0)) == MAP_FAILED)
		fail(name);
	close(fd);
	return content;
}

static uint64_t varint(const uint8_t **at, const uint8_t *end)
{
	uint64_t value = 0;

	for (int shift = 0; shift < 64 && *at < end; shift += 7) {
		uint8_t byte = *(*at)++;

		value |= (uint64_t)(byte & 0x7f) << shift;
		if (!(byte & 0x80))
			return value;
	}
	refuse("a pagemap isn't what CRIU writes");
}

/* The numbers of a protobuf message's fields 1 to 5; there are no others in a pagemap. */
static const uint8_t *message(const uint8_t *at, const uint8_t *end, uint64_t fields[6])
{
	uint32_t length;

	memset(fields, 0, 6 * sizeof *fields);
	if (end - at < 4)
		refuse("a pagemap is cut off");
	memcpy(&length, at, 4);
	at += 4;
	if (length > end - at)
		refuse("a pagemap is cut off");
	end = at + length;
	while (at < end) {
		uint64_t key = varint(&at, end);

		if ((key & 7) || key >> 3 > 5)
			refuse("a pagemap has fields that aren't known here");
		fields[key >> 3] = varint(&at, end);
	}
	return end;
}

static void read_pagemap(struct space *space, int pid)
{
	char name[64];
	uint64_t size, fields[6], at = 0;
	uint32_t magic[2];
	const uint8_t *text, *position, *end;

	snprintf(name, sizeof name, "pagemap-%d.img", pid);
	text = (const uint8_t *)map(name, &size);
	if (size < sizeof magic)
		refuse("a pagemap is cut off");
	memcpy(magic, text, sizeof magic);
	if (magic[0] != COMMON_MAGIC || magic[1] != PAGEMAP_MAGIC)
		refuse("a pagemap isn't what CRIU writes");
	end = text + size;
	position = message(text + sizeof magic, end, fields);
	snprintf(name, sizeof name, "pages-%u.img", (unsigned)fields[1]);
	space->pages = map(name, &space->size);
	while (position < end) {
		uint64_t address, length;

		position = message(position, end, fields);
		address = fields[1];
		length = (fields[5] ? fields[5] : fields[2]) * page;
		if (fields[3] || !(fields[4] & PRESENT))
			refuse("a page is in another checkpoint");
		if (at + length > space->size)
			refuse("an image of pages is cut off");
		if (fields[4] & LAZY) {
			if (space->count && address < space->ranges[space->count - 1].end)
				refuse("a pagemap isn't sorted");
			insert(space, space->count, (struct range){ address, address + length, at });
		}
		at += length;
	}
	munmap((void *)text, size);
}

/* --- Loading --------------------------------------------------------------------------------------------------------- */

enum outcome { DONE, AGAIN };

static void wake(const struct space *space, uint64_t address)
{
	struct uffdio_range one = { address, page };

	ioctl(space->uffd, UFFDIO_WAKE, &one);
}

/* The memory cgroup of the process is full, or the machine's memory is. With v1 only the process itself could have the
 * kernel kill somebody for it. */
static void out_of_memory(void)
{
	static int waited;

	if (waited >= OUT_OF_MEMORY_MS)
		refuse("there isn't enough memory for the pages");
	usleep(10000);
	waited += 10;
}

static enum outcome load(struct space *space, uint64_t start, uint64_t end, uint64_t at)
{
	while (start < end) {
		struct uffdio_copy copy = { .dst = start, .src = (uintptr_t)space->pages + at, .len = end - start };
		uint64_t step;

		if (ioctl(space->uffd, UFFDIO_COPY, &copy) == 0) {
			drop(space, start, end);
			return DONE;
		}
		if (copy.copy > 0) {
			step = copy.copy;
		} else if (errno == EAGAIN) {
			return AGAIN;
		} else if (errno == EEXIST) {
			wake(space, start);
			step = page;
		} else if (errno == ENOENT && end - start > page) {
			/* A copy may not cross the border of two mappings. */
			uint64_t half = (end - start) / page / 2 * page;
			enum outcome outcome = load(space, start, start + half, at);

			if (outcome != DONE || space->uffd < 0)
				return outcome;
			start += half;
			at += half;
			continue;
		} else if (errno == ENOENT) {
			step = page; /* unmapped, and no message of it: not missing */
		} else if (errno == ESRCH || errno == ENOSPC) {
			forget(space); /* the process is gone */
			return DONE;
		} else if (errno == ENOMEM) {
			out_of_memory();
			continue;
		} else {
			fail("UFFDIO_COPY");
		}
		drop(space, start, start + step);
		start += step;
		at += step;
	}
	return DONE;
}

static enum outcome zero(struct space *space, uint64_t address)
{
	struct uffdio_zeropage zeropage = { .range = { address, page } };

	while (ioctl(space->uffd, UFFDIO_ZEROPAGE, &zeropage) < 0) {
		if (errno == EAGAIN)
			return AGAIN;
		if (errno == EEXIST || errno == ENOENT) {
			wake(space, address);
			return DONE;
		}
		if (errno == ESRCH || errno == ENOSPC) {
			forget(space);
			return DONE;
		}
		if (errno != ENOMEM)
			fail("UFFDIO_ZEROPAGE");
		out_of_memory();
	}
	return DONE;
}

static enum outcome load_around(struct space *space, uint64_t address)
{
	size_t index = find(space, address);
	uint64_t start = address & ~(around - 1), end = start + around;
	struct range range;

	if (index == space->count || space->ranges[index].start > address)
		return zero(space, address);
	range = space->ranges[index];
	if (start < range.start)
		start = range.start;
	if (end > range.end)
		end = range.end;
	return load(space, start, end, range.at + (start - range.start));
}

static void load_next(struct space *space)
{
	struct range range = space->ranges[space->first];
	uint64_t end = range.end - range.start > background ? range.start + background : range.end;

	if (range.at + ahead / 2 > space->advised) {
		uint64_t from = space->advised > range.at ? space->advised : range.at & ~(page - 1);

		space->advised = from + ahead;
		if (from < space->size)
			madvise((char *)space->pages + from, space->size - from < ahead ? space->size - from : ahead, MADV_WILLNEED);
	}
	load(space, range.start, end, range.at);
}

/* --- Messages -------------------------------------------------------------------------------------------------------- */

static void add_child(const struct space *parent, int uffd)
{
	struct space *child = calloc(1, sizeof *child);

	if (!child)
		fail("memory");
	*child = *parent;
	child->uffd = uffd;
	child->waiting = NULL;
	child->waiting_count = child->waiting_room = 0;
	child->first = 0;
	child->count = child->room = parent->count - parent->first;
	child->ranges = NULL;
	if (child->count) {
		child->ranges = reallocarray(NULL, child->count, sizeof *child->ranges);
		if (!child->ranges)
			fail("memory");
		memcpy(child->ranges, parent->ranges + parent->first, child->count * sizeof *child->ranges);
	}
	child->next = spaces;
	spaces = child;
}

static void wait_for(struct space *space, uint64_t address)
{
	if (space->waiting_count == space->waiting_room)
		space->waiting = more(space->waiting, &space->waiting_room, sizeof address);
	space->waiting[space->waiting_count++] = address;
}

static void obey(struct space *space)
{
	struct uffd_msg messages[16];
	ssize_t length;

	while (space->uffd >= 0 && (length = read(space->uffd, messages, sizeof messages)) > 0) {
		for (size_t i = 0; i < length / sizeof *messages; i++) {
			const struct uffd_msg *one = messages + i;

			if (one->event == UFFD_EVENT_PAGEFAULT) {
				touched = now();
				wait_for(space, one->arg.pagefault.address & ~(page - 1));
			} else if (one->event == UFFD_EVENT_FORK)
				add_child(space, one->arg.fork.ufd);
			else if (one->event == UFFD_EVENT_REMAP)
				move(space, one->arg.remap.from, one->arg.remap.to, one->arg.remap.len);
			else if (one->event == UFFD_EVENT_REMOVE || one->event == UFFD_EVENT_UNMAP)
				drop(space, one->arg.remove.start, one->arg.remove.end);
			else
				refuse("a message from the kernel isn't known here");
		}
	}
	if (space->uffd >= 0 && length < 0 && errno != EAGAIN && errno != EINTR)
		fail("userfaultfd");
	/* Those that the kernel refuses now are tried again after its next message. */
	for (size_t left = space->waiting_count; left && space->uffd >= 0; left--) {
		uint64_t address = space->waiting[0];

		memmove(space->waiting, space->waiting + 1, --space->waiting_count * sizeof address);
		if (load_around(space, address) == AGAIN)
			wait_for(space, address);
	}
}

/* --- CRIU's restore -------------------------------------------------------------------------------------------------- */

static int receive_descriptor(int client)
{
	char byte, control[CMSG_SPACE(sizeof(int))];
	struct iovec data = { &byte, 1 };
	struct msghdr header = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
	struct cmsghdr *part;
	int fd;

	if (recvmsg(client, &header, MSG_CMSG_CLOEXEC) != 1)
		fail("a process's userfaultfd");
	part = CMSG_FIRSTHDR(&header);
	if (!part || part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
		refuse("the restore has sent no userfaultfd");
	memcpy(&fd, CMSG_DATA(part), sizeof fd);
	return fd;
}

/* Whether the restore has finished. */
static int listen_to(int client)
{
	struct space *space;
	int pid;

	if (recv(client, &pid, sizeof pid, MSG_WAITALL) != sizeof pid)
		refuse("the restore has failed");
	if (pid == FINISHED)
		return 1;
	if (pid < 0)
		return 0;
	space = calloc(1, sizeof *space);
	if (!space)
		fail("memory");
	space->uffd = receive_descriptor(client);
	if (fcntl(space->uffd, F_SETFL, O_NONBLOCK) < 0)
		fail("a process's userfaultfd");
	read_pagemap(space, pid);
	space->next = spaces;
	spaces = space;
	return 0;
}

static int calm(void)
{
	int64_t since = now() - restored;

	return since >= CONSIDERATE_MS || (since >= ALONE_MS && now() - touched >= CALM_MS);
}

static void serve(int client)
{
	struct pollfd *polled = NULL;
	size_t room = 0;

	for (;;) {
		struct space **link = &spaces, *busy = NULL;
		int waiting = 0, pause;
		size_t count = 1;

		while (*link) {
			struct space *space = *link;

			if (space->uffd >= 0 && client < 0 && space->first == space->count && !space->waiting_count)
				forget(space);
			if (space->uffd < 0) {
				*link = space->next;
				free(space->ranges);
				free(space->waiting);
				free(space);
				continue;
			}
			if (space->first < space->count)
				busy = space;
			waiting |= space->waiting_count > 0;
			count++;
			link = &space->next;
		}
		if (client < 0 && !spaces)
			return;
		if (count > room) {
			room = count;
			polled = more(polled, &room, sizeof *polled);
		}
		polled[0] = (struct pollfd){ client, POLLIN, 0 };
		count = 1;
		for (struct space *space = spaces; space; space = space->next)
			polled[count++] = (struct pollfd){ space->uffd, POLLIN, 0 };
		pause = waiting ? 1 : -1;
		if (client < 0 && busy)
			pause = calm() ? 0 : 1;
		if (poll(polled, count, pause) < 0 && errno != EINTR)
			fail("poll");
		/* New ones come to the front of the list: those that were polled are its end, in the same order. */
		count = 1;
		for (struct space *space = spaces; space; space = space->next, count++)
			if (polled[count].revents || space->waiting_count)
				obey(space);
		if (polled[0].revents && listen_to(client)) {
			close(client);
			client = -1;
			restored = now();
		}
		/* Not while it is being restored: the restore is what is waited for. */
		if (client < 0 && busy && busy->uffd >= 0 && busy->first < busy->count && calm())
			load_next(busy);
	}
}

/* --- The keeper ------------------------------------------------------------------------------------------------------ */

/* Whether a descriptor is the userfaultfd of a process that is still there. The range is in no mapping as a whole, so that
 * nothing is ever put there. */
static int needed(int fd)
{
#ifdef __x86_64__
	struct uffdio_zeropage nowhere = { .range = { 1UL << 30, 0x7f0000000000UL } };
#else
	struct uffdio_zeropage nowhere = { .range = { 1UL << 30, (1UL << 39) - (2UL << 30) } };
#endif
	return ioctl(fd, UFFDIO_ZEROPAGE, &nowhere) < 0 && (errno == ENOENT || errno == EAGAIN);
}

static void keep(int parent, const volatile int *loaded)
{
	struct pollfd polled = { parent, POLLIN, 0 };
	int someone = 1;

	while (poll(&polled, 1, -1) < 0 && errno == EINTR)
		;
	while (!*loaded && someone) {
		someone = 0;
		for (int fd = 3; fd < 4096 && !someone; fd++)
			someone = needed(fd);
		usleep(20000);
	}
	_exit(0);
}

int main(int argc, char **argv)
{
	int *loaded = mmap(NULL, sizeof *loaded, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int listener, client, self, adjustment;
	struct pollfd call;
	pid_t keeper;

	if (argc != 3)
		refuse("wrong arguments");
	if (loaded == MAP_FAILED)
		fail("memory");
	images = atoi(argv[1]);
	listener = atoi(argv[2]);
	page = sysconf(_SC_PAGESIZE);
	/* As far as that is allowed: nobody should be killed for lack of memory whose death costs others theirs. */
	adjustment = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (adjustment >= 0 && write(adjustment, "-1000", 5) < 0 && errno != EACCES)
		fail("oom_score_adj");
	close(adjustment);
	self = syscall(SYS_pidfd_open, getpid(), 0);
	if (self < 0)
		fail("pidfd_open");
	keeper = syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0);
	if (keeper < 0)
		fail("the keeper");
	if (keeper == 0)
		keep(self, loaded);
	call = (struct pollfd){ listener, POLLIN, 0 };
	if (poll(&call, 1, CALL_MS) <= 0)
		refuse("no restore has called");
	client = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	if (client < 0)
		fail("accept");
	close(listener);
	serve(client);
	*loaded = 1;
	if (write(1, "loaded\n", 7) != 7)
		fail("stdout");
	_exit(0);
}
