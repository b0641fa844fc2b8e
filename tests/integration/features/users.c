/* feature: Processes of other users and groups, capabilities, securebits, no_new_privs, umask */
#include "feature.h"

#include <grp.h>
#include <linux/securebits.h>

static int talk;

static int as_before(int unused)
{
	uid_t real, effective, saved;
	gid_t groups[4];

	(void)unused;
	return getresuid(&real, &effective, &saved) == 0 && real == 1000 && effective == 1000 && saved == 1000 &&
	       getegid() == 2000 && getgroups(4, groups) == 2 && groups[0] == 3000 && groups[1] == 3001 &&
	       prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1 && setuid(0) < 0 &&
	       prctl(PR_CAPBSET_READ, 13 /* CAP_NET_RAW */, 0, 0, 0) == 0 && umask(077) == 027 && umask(027) == 077;
}

static int become(int question)
{
	static const gid_t groups[] = { 3000, 3001 };

	if (question == 'b') {
		umask(027);
		CHECK(prctl(PR_CAPBSET_DROP, 13, 0, 0, 0) == 0);
		CHECK(setgroups(2, groups) == 0 && setgid(2000) == 0 && setuid(1000) == 0);
		CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
	}
	return as_before(0);
}

static void prepare(void)
{
	companion(become, &talk);
	CHECK(asked(talk, 'b') == 1);
	CHECK(prctl(PR_SET_SECUREBITS, SECBIT_KEEP_CAPS, 0, 0, 0) == 0);
}

static void check(int cycle)
{
	(void)cycle;
	CHECK(asked(talk, '?') == 1);
	CHECK(getuid() == 0 && prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 0 && prctl(PR_CAPBSET_READ, 13, 0, 0, 0) == 1);
	CHECK(prctl(PR_GET_SECUREBITS, 0, 0, 0, 0) == SECBIT_KEEP_CAPS);
}
