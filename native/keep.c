/* Build: gcc -static -O2 -std=gnu11 -D_GNU_SOURCE -Wall -Wextra -o keep keep.c   (setup.py does it)
 *
 * keep PIDFD
 *
 * Keeps the descriptors that it inherits open, with them the files that a sleeping container had open, until the process that
 * the pidfd stands for (the container's init) has ended, or until it is killed. It guarantees:
 *
 * - It goes on without whoever has started it: it forks, writes the child's pid to stdout, and ends. Nobody has to reap the
 *   child.
 * - It uses none of the descriptors but the pidfd and the standard streams, which the child closes.
 */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct pollfd init = { .events = POLLIN };
	pid_t child;

	if (argc != 2)
		return 1;
	init.fd = atoi(argv[1]);
	setsid();
	child = fork();
	if (child < 0) {
		perror("keep: fork");
		return 1;
	}
	if (child > 0)
		return dprintf(1, "%d\n", child) < 0;
	for (int fd = 0; fd < 3; fd++)
		close(fd);
	/* The folder may be a volume's. */
	if (chdir("/") < 0)
		return 1;
	while (poll(&init, 1, -1) <= 0)
		;
	return 0;
}
