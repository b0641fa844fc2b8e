/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Whose port is whose, and whether it is parked, for the hook in a pod (pod.c) and the one of a pod in the host's network (host.c).
 * criproxy/hook/pod_maps.py has the same layouts in Python.
 */
#ifndef PORTS_H
#define PORTS_H

#include "kubelet.h"

#define SLOTS 16 /* containers per pod */

/* Whose connections are looked at before they count as activity. */
enum visitor {
	KUBELET = 0,  /* opened by a process in kubelet's cgroup (kubelet.c), or from an address that stands for it */
	LOOPBACK = 1, /* over lo: a mesh's agent may forward kubelet's probe */
	COMMAND = 2,  /* over lo while an exec probe is under way */
};

struct port {
	__be16 number;
	__u8 proto;
	__u8 zero;
};

#define QUIET 1       /* neither counts as activity nor wakes */
#define ANSWERED(who) (0x100 << (who)) /* while parked, new connections of this kind of visitor are the listener's */

struct owner {
	__u32 slot;
	__u32 flags;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1024);
	__type(key, struct port);
	__type(value, struct owner);
} ports SEC(".maps");

/* What becomes of a slot's packets: an `enum mode`. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SLOTS);
	__type(key, __u32);
	__type(value, __u32);
} modes SEC(".maps");

#endif
