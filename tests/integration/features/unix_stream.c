/* feature: Unix stream sockets between its processes: listening, abstract, connected, with data and descriptors under way */
#include "feature.h"

#include <stddef.h>
#include <sys/un.h>

static int pair[2], listening, abstract, server, client;

static struct sockaddr_un name(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	memcpy(address.sun_path, path, strlen(path + 1) + 1);
	return address;
}

static int listener(const char *path, socklen_t *size)
{
	struct sockaddr_un address = name(path);
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	*size = offsetof(struct sockaddr_un, sun_path) + strlen(path + 1) + 1;
	CHECK(bind(fd, (struct sockaddr *)&address, *size) == 0 && listen(fd, 5) == 0);
	return fd;
}

static int connected(const char *path, socklen_t size)
{
	struct sockaddr_un address = name(path);
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	CHECK(connect(fd, (struct sockaddr *)&address, size) == 0);
	return fd;
}

static socklen_t path_size, abstract_size;

static void send_descriptor(int over, int fd)
{
	char space[CMSG_SPACE(sizeof fd)] = "", byte = '!';
	struct iovec data = { &byte, 1 };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space };
	struct cmsghdr *head = CMSG_FIRSTHDR(&message);

	head->cmsg_level = SOL_SOCKET;
	head->cmsg_type = SCM_RIGHTS;
	head->cmsg_len = CMSG_LEN(sizeof fd);
	memcpy(CMSG_DATA(head), &fd, sizeof fd);
	CHECK(sendmsg(over, &message, 0) == 1);
}

static int receive_descriptor(int over)
{
	char space[CMSG_SPACE(sizeof(int))] = "", byte;
	struct iovec data = { &byte, 1 };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space };
	int fd;

	CHECK(recvmsg(over, &message, 0) == 1 && CMSG_FIRSTHDR(&message));
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
	return fd;
}

static int rights[2];

static void prepare(void)
{
	int sent;

	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0 && put(pair[0], "under way"));
	listening = listener("/tmp/listening", &path_size);
	abstract = listener("\0abstract", &abstract_size);
	client = connected("/tmp/listening", path_size);
	server = accept(listening, NULL, NULL);
	CHECK(put(client, "to the server"));
	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, rights) == 0);
	sent = file(FOLDER "sent", "sent");
	lseek(sent, 0, SEEK_SET);
	send_descriptor(rights[0], sent);
	close(sent);
}

static void check(int cycle)
{
	int fd;

	(void)cycle;
	CHECK(gives(pair[1], "under way") && put(pair[0], "under way"));
	CHECK(gives(server, "to the server") && put(client, "to the server"));
	CHECK(put(server, "back") && gives(client, "back"));
	close(connected("/tmp/listening", path_size));
	close(accept(listening, NULL, NULL));
	close(connected("\0abstract", abstract_size));
	close(accept(abstract, NULL, NULL));
	fd = receive_descriptor(rights[1]);
	CHECK(gives(fd, "sent") && lseek(fd, 0, SEEK_SET) == 0);
	send_descriptor(rights[0], fd);
	close(fd);
}
