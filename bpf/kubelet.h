/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Kubelet's connections: maps that the program on kubelet's cgroup (kubelet.c) shares with the hooks in the pods (pod.c).
 * criproxy/kubelet/connections.py pins them, one of each for the whole node.
 */
#ifndef KUBELET_H
#define KUBELET_H

#include <linux/bpf.h>
#include <linux/in.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define AF_INET 2 /* linux/socket.h has them for the kernel alone */
#define AF_INET6 10

/* Addresses are IPv6 or IPv4-mapped; local is the pod's end. */
struct four {
	__u32 local[4];
	__u32 remote[4];
	__be16 local_port;
	__be16 remote_port;
	__u8 proto;
	__u8 zero[3];
};

/*
 * Those that are open, and when they were opened (CLOCK_MONOTONIC, ns). One is needed from connect() until its SYN is in
 * the pod, some µs later; what falls out while its SYN is still sent again counts as anybody's.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct four);
	__type(value, __u64);
} connections SEC(".maps");

/* Addresses (IPv6 or IPv4-mapped) whose connections are taken for kubelet's: none, unless the configuration has them. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 64);
	__type(key, __u32[4]);
	__type(value, __u32);
} addresses SEC(".maps");

#define FRESH 180000000000ull /* ns: longer than a SYN is sent again. An entry that was left behind means nothing then. */

/* Whether a connection whose SYN comes in is kubelet's. */
static __always_inline int from_kubelet(const struct four *four, __u64 now)
{
	__u64 *opened = bpf_map_lookup_elem(&connections, four);

	if (opened && now - *opened < FRESH)
		return 1;
	return bpf_map_lookup_elem(&addresses, four->remote) != NULL;
}

#endif
