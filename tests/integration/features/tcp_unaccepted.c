/* feature: TCP connections that the application hasn't accepted yet */
/* refused: it has connections that it hasn't accepted yet */
#include "feature.h"
#include "sockets.h"

static void prepare(void)
{
	listener(5000);
	connected(5000);
	settle();
}

static void check(int cycle)
{
	(void)cycle;
}
