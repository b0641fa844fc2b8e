/* feature: Process groups, sessions, daemons, stopped and ended (not yet awaited) children */
#include "feature.h"

static pid_t leader, member, stopped, zombie;

static pid_t sleeper(pid_t group, int session)
{
	int done[2];
	char byte;
	pid_t pid;

	CHECK(pipe(done) == 0);
	pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		if (session)
			setsid();
		else
			setpgid(0, group);
		close(done[0]);
		close(done[1]);
		for (;;)
			pause();
	}
	/* Its end of the pipe is closed. */
	close(done[1]);
	CHECK(read(done[0], &byte, 1) == 0);
	close(done[0]);
	return pid;
}

static void prepare(void)
{
	siginfo_t info;

	leader = sleeper(0, 0);
	member = sleeper(leader, 0);
	stopped = sleeper(0, 1);
	CHECK(kill(stopped, SIGSTOP) == 0);
	CHECK(waitid(P_PID, stopped, &info, WSTOPPED | WNOWAIT) == 0);
	zombie = fork();
	if (zombie == 0)
		_exit(42);
	CHECK(waitid(P_PID, zombie, &info, WEXITED | WNOWAIT) == 0);
}

static void check(int cycle)
{
	siginfo_t info;
	int status;

	CHECK(getpgid(leader) == leader && getpgid(member) == leader && getsid(leader) == getsid(0));
	CHECK(getsid(stopped) == stopped && getpgid(stopped) == stopped);
	CHECK(waitid(P_PID, zombie, &info, WEXITED | WNOWAIT) == 0 && info.si_status == 42);
	if (cycle == 1) {
		CHECK(waitpid(zombie, &status, 0) == zombie && WEXITSTATUS(status) == 42);
		CHECK(kill(stopped, SIGTERM) == 0 && waitpid(stopped, &status, WNOHANG) == 0);
		CHECK(kill(stopped, SIGCONT) == 0 && waitpid(stopped, &status, 0) == stopped && WTERMSIG(status) == SIGTERM);
		CHECK(kill(-leader, SIGKILL) == 0 && waitpid(-leader, NULL, 0) > 0 && waitpid(-leader, NULL, 0) > 0);
	}
}
