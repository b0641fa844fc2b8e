/* Build: gcc -static -O2 -std=gnu11 -Wall -Wextra -pthread -o specimen specimen.c   (specimen.py does it)
 *
 * specimen [PORT [MEBIBYTES]]
 *
 * An application that does what a test tells it to. It speaks first ("ready\n", as MySQL, SSH and SMTP do), then answers
 * each line with one line; the commands are in obey(). To each UDP datagram it answers with the counter. At SIGTERM it writes "caught 15" to its stdout and ends with the
 * code that `on-term` set, 0 at first. Its memory is what a test looks for after a checkpoint: a counter and a text.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CLIENTS = 64, LINE = 4096 };

/* The listener, a second one, standard input, the UDP socket, the clients. */
enum { LISTENER, SECOND, INPUT, DATAGRAMS, FIRST };
static struct pollfd polled[FIRST + CLIENTS];
static char input[LINE];                  /* what standard input has brought */
static char kept[LINE] = "nothing";
static long counter;
static int listener;
static int term_code;
static int opened = -1;  /* a file */
static int outside = -1; /* a unix socket whose other end is out of the container */
static volatile int spinning;
static atomic_int resting; /* threads that have become what they are going to be */

static int keep(int client)
{
	for (int i = FIRST; i < FIRST + CLIENTS; i++)
		if (polled[i].fd < 0) {
			polled[i] = (struct pollfd){ client, POLLIN, 0 };
			return 0;
		}
	return close(client) - 1;
}

static int clients(void)
{
	int count = 0;

	for (int i = FIRST; i < FIRST + CLIENTS; i++)
		count += polled[i].fd >= 0;
	return count;
}

static void terminated(int number)
{
	dprintf(1, "caught %d\n", number);
	_exit(term_code);
}

static void *spin(void *nothing)
{
	(void)nothing;
	while (spinning)
		;
	return NULL;
}

static _Noreturn void rest_of_life(void)
{
	resting++;
	for (;;)
		pause();
}

/* Threads whose attributes differ from each other's, for as long as the process lives. */
static void *with_affinity(void *nothing)
{
	cpu_set_t one;

	(void)nothing;
	CPU_ZERO(&one);
	CPU_SET(0, &one);
	sched_setaffinity(0, sizeof one, &one);
	rest_of_life();
}

static void *without_capabilities(void *nothing)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct none[2] = { 0 };

	(void)nothing;
	prctl(PR_CAPBSET_DROP, CAP_NET_RAW);
	syscall(SYS_capset, &header, none);
	rest_of_life();
}

static void *without_new_privileges(void *nothing)
{
	(void)nothing;
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	rest_of_life();
}

static void *filtered(void *nothing)
{
	struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	struct sock_fprog program = { 1, &allow };

	(void)nothing;
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
	rest_of_life();
}

static void start(void *(*run)(void *))
{
	pthread_t thread;

	pthread_create(&thread, NULL, run, NULL);
}

static void orphan(void)
{
	pid_t child = fork();

	if (child == 0) {
		if (fork() == 0)
			usleep(20000);
		_exit(0);
	}
	waitpid(child, NULL, 0);
}

/* Memory that no two pages share. */
static void fill(int mebibytes)
{
	size_t words = ((size_t)mebibytes << 20) / sizeof(size_t);
	volatile size_t *memory = malloc(words * sizeof *memory);

	for (size_t i = 0; i < words; i += 4096 / sizeof *memory)
		memory[i] = i;
}

static int connect_outside(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	strncpy(address.sun_path, path, sizeof address.sun_path - 1);
	outside = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	return connect(outside, (struct sockaddr *)&address, sizeof address);
}

/* The other side then gives the commands, as a client does. Returns the socket. */
static int dialled(const char *where)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	char host[64];
	int port, outgoing;

	if (sscanf(where, "%63s %d", host, &port) != 2)
		return -1;
	inet_pton(AF_INET, host, &address.sin_addr);
	address.sin_port = htons(port);
	outgoing = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	return connect(outgoing, (struct sockaddr *)&address, sizeof address) ? -1 : outgoing;
}

static int dial(const char *where)
{
	int outgoing = dialled(where);

	return outgoing < 0 ? -1 : keep(outgoing);
}

/* It only listens: what the other side says isn't a command. */
static int dial_with_keepalive(const char *where)
{
	int outgoing = dialled(where), one = 1;
	char greeting[64];

	if (outgoing < 0 || read(outgoing, greeting, sizeof greeting) <= 0)
		return -1;
	setsockopt(outgoing, IPPROTO_TCP, TCP_KEEPIDLE, &one, sizeof one);
	setsockopt(outgoing, IPPROTO_TCP, TCP_KEEPINTVL, &one, sizeof one);
	setsockopt(outgoing, IPPROTO_TCP, TCP_KEEPCNT, &one, sizeof one);
	setsockopt(outgoing, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
	return keep(outgoing);
}

static int listen_too(int port)
{
	struct sockaddr_in6 address = { .sin6_family = AF_INET6, .sin6_addr = IN6ADDR_ANY_INIT };
	int on = 1;

	address.sin6_port = htons(port);
	polled[SECOND] = (struct pollfd){ socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0), POLLIN, 0 };
	setsockopt(polled[SECOND].fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	return bind(polled[SECOND].fd, (struct sockaddr *)&address, sizeof address) || listen(polled[SECOND].fd, 16);
}

static int drop_to(uid_t user)
{
	return setgroups(0, NULL) || setresgid(user, user, user) || setresuid(user, user, user);
}

static int is(const char *line, const char *command, const char **argument)
{
	size_t length = strlen(command);

	*argument = line + length + (line[length] == ' ');
	return strncmp(line, command, length) == 0 && (line[length] == ' ' || !line[length]);
}

static void obey(int client, const char *line)
{
	struct sockaddr_in6 peer;
	socklen_t size = sizeof peer;
	char name[INET6_ADDRSTRLEN];
	const char *argument;
	int failed = 0;

	errno = 0;
	if (is(line, "count", &argument)) {
		dprintf(client, "%ld\n", ++counter);
		return;
	}
	if (is(line, "get", &argument)) {
		dprintf(client, "%s\n", kept);
		return;
	}
	if (is(line, "after", &argument)) { /* milliseconds, without using the processor meanwhile */
		usleep(1000 * atoi(argument));
		dprintf(client, "ok\n");
		return;
	}
	if (is(line, "never", &argument)) /* answers */
		return;
	if (is(line, "echo", &argument)) {
		dprintf(client, "%s\n", argument);
		return;
	}
	if (is(line, "clients", &argument)) {
		dprintf(client, "%d\n", clients());
		return;
	}
	if (is(line, "input", &argument)) {
		dprintf(client, "%s\n", input);
		return;
	}
	if (is(line, "read", &argument)) { /* all of the file that was opened last, "/" for each end of a line */
		char text[LINE];
		ssize_t length = pread(opened, text, sizeof text - 1, 0);

		text[length < 0 ? 0 : length] = 0;
		for (char *c = text; (c = strchr(c, '\n'));)
			*c = '/';
		dprintf(client, "%s\n", length < 0 ? strerror(errno) : text);
		return;
	}
	if (is(line, "peer", &argument)) {
		getpeername(client, (struct sockaddr *)&peer, &size);
		inet_ntop(AF_INET6, &peer.sin6_addr, name, sizeof name);
		dprintf(client, "%s %d\n", name, ntohs(peer.sin6_port));
		return;
	}
	if (is(line, "set", &argument))
		strncpy(kept, argument, sizeof kept - 1);
	else if (is(line, "say", &argument))
		dprintf(1, "%s\n", argument);
	else if (is(line, "complain", &argument))
		dprintf(2, "%s\n", argument);
	else if (is(line, "begin-line", &argument)) /* without its end */
		dprintf(1, "%s", argument);
	else if (is(line, "flood", &argument))
		for (int i = 0; i < atoi(argument); i++)
			dprintf(1, "line %d\n", i);
	else if (is(line, "exit", &argument))
		_exit(atoi(argument));
	else if (is(line, "die", &argument)) {
		signal(atoi(argument), SIG_DFL);
		kill(getpid(), atoi(argument));
	} else if (is(line, "on-term", &argument))
		term_code = atoi(argument);
	else if (is(line, "ignore-term", &argument))
		signal(SIGTERM, SIG_IGN);
	else if (is(line, "become", &argument))
		failed = drop_to(atoi(argument));
	else if (is(line, "orphans", &argument))
		for (int i = 0; i < atoi(argument); i++)
			orphan();
	else if (is(line, "fill", &argument))
		fill(atoi(argument));
	else if (is(line, "spin", &argument)) {
		spinning = 1;
		start(spin);
	} else if (is(line, "rest", &argument))
		spinning = 0;
	else if (is(line, "threads", &argument)) {
		start(with_affinity);
		start(without_capabilities);
		start(without_new_privileges);
		start(filtered);
		while (resting < 4)
			usleep(1000);
	} else if (is(line, "connect", &argument))
		failed = connect_outside(argument);
	else if (is(line, "dial", &argument))
		failed = dial(argument);
	else if (is(line, "keep-alive", &argument)) /* as dial, and gives the connection up a second after the other side has */
		failed = dial_with_keepalive(argument);
	else if (is(line, "listen", &argument))
		failed = listen_too(atoi(argument));
	else if (is(line, "disconnect", &argument))
		failed = close(outside);
	else if (is(line, "deaf", &argument)) /* accepts no connection any more */
		polled[LISTENER].fd = -1;
	else if (is(line, "hear", &argument))
		polled[LISTENER].fd = listener;
	else if (is(line, "open", &argument)) {
		opened = open(argument, O_RDWR | O_CREAT | O_APPEND, 0644);
		if (opened < 0 && errno == EROFS)
			opened = open(argument, O_RDONLY);
		failed = opened < 0;
	} else if (is(line, "write", &argument)) /* a line, to the file that was opened last */
		failed = dprintf(opened, "%s\n", argument) < 0;
	else
		failed = errno = ENOSYS;
	dprintf(client, "%s\n", failed ? strerror(errno) : "ok");
}

static void accept_client(int from)
{
	int client = accept4(from, NULL, NULL, SOCK_CLOEXEC);

	if (client >= 0 && keep(client) == 0)
		dprintf(client, "ready\n");
}

/* A segment has whole lines here: those who test send no halves. */
static void serve(struct pollfd *client)
{
	char line[LINE];
	ssize_t length = read(client->fd, line, sizeof line - 1);

	if (length <= 0) {
		close(client->fd);
		client->fd = -1;
		return;
	}
	line[length] = 0;
	for (char *one = strtok(line, "\r\n"); one; one = strtok(NULL, "\r\n"))
		obey(client->fd, one);
}

static void answer_datagram(void)
{
	struct sockaddr_in6 peer;
	socklen_t size = sizeof peer;
	char text[LINE];

	if (recvfrom(polled[DATAGRAMS].fd, text, sizeof text, 0, (struct sockaddr *)&peer, &size) < 0)
		return;
	size_t length = snprintf(text, sizeof text, "%ld\n", ++counter);
	sendto(polled[DATAGRAMS].fd, text, length, 0, (struct sockaddr *)&peer, size);
}

static void read_input(void)
{
	size_t before = strlen(input);
	ssize_t length = read(0, input + before, sizeof input - before - 1);

	if (length <= 0) {
		polled[INPUT].fd = -1;
		strncat(input, "EOF", sizeof input - before - 1);
		return;
	}
	for (char *c = input + before; *c; c++)
		if (*c == '\n')
			*c = '/';
}

int main(int argc, char **argv)
{
	struct sockaddr_in6 address = { .sin6_family = AF_INET6, .sin6_addr = IN6ADDR_ANY_INIT };
	int datagrams = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	int on = 1;

	listener = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);

	address.sin6_port = htons(argc > 1 ? atoi(argv[1]) : 7000);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 16) ||
	    bind(datagrams, (struct sockaddr *)&address, sizeof address)) {
		perror("listen");
		return 1;
	}
	if (argc > 2)
		fill(atoi(argv[2]));
	signal(SIGTERM, terminated);
	signal(SIGPIPE, SIG_IGN);
	for (int i = FIRST; i < FIRST + CLIENTS; i++)
		polled[i].fd = -1;
	polled[LISTENER] = (struct pollfd){ listener, POLLIN, 0 };
	polled[SECOND].fd = -1;
	polled[INPUT] = (struct pollfd){ 0, POLLIN, 0 };
	polled[DATAGRAMS] = (struct pollfd){ datagrams, POLLIN, 0 };
	dprintf(1, "listening\n");
	for (;;) {
		if (poll(polled, FIRST + CLIENTS, -1) < 0)
			continue;
		if (polled[INPUT].revents)
			read_input();
		for (int i = FIRST; i < FIRST + CLIENTS; i++)
			if (polled[i].fd >= 0 && polled[i].revents)
				serve(&polled[i]);
		if (polled[DATAGRAMS].revents)
			answer_datagram();
		if (polled[LISTENER].revents)
			accept_client(listener);
		if (polled[SECOND].revents)
			accept_client(polled[SECOND].fd);
	}
}
