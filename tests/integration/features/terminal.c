/* feature: A terminal of its own (pty): both ends, a session with a controlling terminal, its settings and size */
#include "feature.h"

#include <sys/ioctl.h>
#include <termios.h>

static int master, slave, talk;

static int foreground(int unused)
{
	(void)unused;
	return tcgetpgrp(slave) == getpid() && getsid(0) == getpid();
}

static void prepare(void)
{
	struct winsize size = { .ws_row = 33, .ws_col = 99 };
	struct termios settings;
	int both[2];

	master = open("/dev/ptmx", O_RDWR | O_NOCTTY);
	SKIP_UNLESS(master >= 0 && grantpt(master) == 0 && unlockpt(master) == 0);
	slave = open(ptsname(master), O_RDWR | O_NOCTTY);
	CHECK(slave >= 0);
	CHECK(ioctl(master, TIOCSWINSZ, &size) == 0 && tcgetattr(slave, &settings) == 0);
	cfmakeraw(&settings);
	CHECK(tcsetattr(slave, TCSANOW, &settings) == 0);
	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, both) == 0);
	if (fork() == 0) {
		unsigned char byte;

		close(both[0]);
		CHECK(setsid() > 0 && ioctl(slave, TIOCSCTTY, 0) == 0);
		while (read(both[1], &byte, 1) == 1) {
			byte = foreground(0);
			CHECK(write(both[1], &byte, 1) == 1);
		}
		_exit(0);
	}
	close(both[1]);
	talk = both[0];
	CHECK(asked(talk, '?') == 1);
}

static void check(int cycle)
{
	struct winsize size;
	struct termios settings;

	(void)cycle;
	CHECK(asked(talk, '?') == 1);
	CHECK(ioctl(slave, TIOCGWINSZ, &size) == 0 && size.ws_row == 33 && size.ws_col == 99);
	CHECK(tcgetattr(slave, &settings) == 0 && !(settings.c_lflag & (ECHO | ICANON)));
	CHECK(put(master, "in") && gives(slave, "in") && put(slave, "out") && gives(master, "out"));
}
