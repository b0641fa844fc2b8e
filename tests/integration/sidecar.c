/* Build: gcc -static -O2 -std=gnu11 -Wall -Wextra -o sidecar sidecar.c   (specimen.py does it)
 *
 * sidecar PORT TARGET
 *
 * A mesh's proxy: what is sent to it at PORT, also by REDIRECT or TPROXY, goes on to 127.0.0.1:TARGET, and back. One
 * connection to the target for each of a client, for as long as both are open.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static int pass_on(int from, int to)
{
	char data[65536];
	ssize_t length = read(from, data, sizeof data);

	return length > 0 && write(to, data, length) == length;
}

static _Noreturn void carry(int client, int port)
{
	struct sockaddr_in target = { .sin_family = AF_INET, .sin_port = htons(port) };
	struct pollfd both[2] = { { client, POLLIN, 0 }, { socket(AF_INET, SOCK_STREAM, 0), POLLIN, 0 } };

	target.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (connect(both[1].fd, (struct sockaddr *)&target, sizeof target))
		_exit(1);
	while (poll(both, 2, -1) > 0)
		for (int i = 0; i < 2; i++)
			if (both[i].revents && !pass_on(both[i].fd, both[1 - i].fd))
				_exit(0);
	_exit(1);
}

int main(int argc, char **argv)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;

	if (argc != 3)
		return 2;
	address.sin_port = htons(atoi(argv[1]));
	signal(SIGCHLD, SIG_IGN);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	setsockopt(listener, IPPROTO_IP, IP_TRANSPARENT, &on, sizeof on); /* for TPROXY; it may not be allowed to */
	if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 16)) {
		perror("listen");
		return 1;
	}
	dprintf(1, "listening\n");
	for (;;) {
		int client = accept(listener, NULL, NULL);

		if (client < 0)
			continue;
		if (fork() == 0) {
			close(listener);
			carry(client, atoi(argv[2]));
		}
		close(client);
	}
}
