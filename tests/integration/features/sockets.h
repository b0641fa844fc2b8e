/* Sockets over the container's own loopback, for the programs about TCP and UDP. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>

static inline struct sockaddr_in loopback(int port)
{
	return (struct sockaddr_in){ .sin_family = AF_INET, .sin_port = htons(port), .sin_addr = { htonl(INADDR_LOOPBACK) } };
}

static inline int listener(int port)
{
	struct sockaddr_in address = loopback(port);
	int fd = socket(AF_INET, SOCK_STREAM, 0), yes = 1;

	CHECK(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes) == 0);
	CHECK(bind(fd, (struct sockaddr *)&address, sizeof address) == 0 && listen(fd, 7) == 0);
	return fd;
}

static inline int connected(int port)
{
	struct sockaddr_in address = loopback(port);
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	CHECK(connect(fd, (struct sockaddr *)&address, sizeof address) == 0);
	return fd;
}

/* Waits until there is something to read. */
static inline int arrived(int fd)
{
	struct pollfd one = { .fd = fd, .events = POLLIN };

	return poll(&one, 1, -1) == 1;
}

/* Waits until all that was sent is acknowledged, and no connection is on its way from one state to another. */
static inline void settle(void)
{
	const unsigned passing = 1 << TCP_SYN_SENT | 1 << TCP_SYN_RECV | 1 << TCP_FIN_WAIT1 | 1 << TCP_LAST_ACK | 1 << TCP_CLOSING;
	int unsettled;

	do {
		FILE *table = fopen("/proc/net/tcp", "r");
		unsigned state, unacknowledged;
		char line[256];

		CHECK(table != NULL);
		for (unsettled = 0; fgets(line, sizeof line, table);)
			if (sscanf(line, " %*d: %*x:%*x %*x:%*x %x %x:", &state, &unacknowledged) == 2)
				unsettled |= unacknowledged || passing >> state & 1;
		fclose(table);
		if (unsettled)
			usleep(1000);
	} while (unsettled);
}

static inline int option(int fd, int level, int name)
{
	int value = -1;
	socklen_t size = sizeof value;

	CHECK(getsockopt(fd, level, name, &value, &size) == 0);
	return value;
}

static inline void set(int fd, int level, int name, int value)
{
	CHECK(setsockopt(fd, level, name, &value, sizeof value) == 0);
}
