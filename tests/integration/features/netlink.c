/* feature: Netlink sockets (routes, kernel events) */
#include "feature.h"

#include <linux/netlink.h>
#include <linux/rtnetlink.h>

static int route, events;

static void prepare(void)
{
	struct sockaddr_nl address = { .nl_family = AF_NETLINK, .nl_groups = RTMGRP_LINK };
	struct sockaddr_nl uevents = { .nl_family = AF_NETLINK, .nl_groups = 1 };

	route = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
	CHECK(bind(route, (struct sockaddr *)&address, sizeof address) == 0);
	events = socket(AF_NETLINK, SOCK_RAW, NETLINK_KOBJECT_UEVENT);
	CHECK(bind(events, (struct sockaddr *)&uevents, sizeof uevents) == 0);
}

static void check(int cycle)
{
	struct {
		struct nlmsghdr head;
		struct rtgenmsg body;
	} request = { { sizeof request, RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, 1, 0 }, { AF_UNSPEC } };
	char answer[16384];
	struct nlmsghdr *head = (struct nlmsghdr *)answer;

	(void)cycle;
	CHECK(send(route, &request, sizeof request, 0) == sizeof request);
	do
		CHECK(recv(route, answer, sizeof answer, 0) > 0 && (head->nlmsg_type == RTM_NEWLINK || head->nlmsg_type == NLMSG_DONE));
	while (head->nlmsg_type != NLMSG_DONE);
}
