/* Sockets over the container's own loopback, for the programs about TCP and UDP. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>

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
