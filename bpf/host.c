// clang -O2 -g -target bpf -Wall -I/usr/include/$(uname -m)-linux-gnu -c bpf/host.c -o criproxy/libexec/host.bpf.o
// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * The hook of a pod that uses the host's network (hostNetwork): `incoming` is asked whenever the kernel looks for the
 * socket of a new TCP connection to the host (sk_lookup). One program per pod, with maps of its own, as in pod.c.
 *
 * What it guarantees:
 *  - Established connections, forwarded packets, and other ports and addresses than those that the pod's applications
 *    listen on are none of its business. It is asked after all NAT, so they are what the application knows.
 *  - While a slot is parked no connection to its ports is refused: a listener gets it that outlives the daemon, so that
 *    it waits for the next one, if need be. (All that this kind of program can do else is to refuse it.)
 *  - Connections that criproxy itself makes (`relays`) reach the application, whatever the mode is, and count as nothing.
 *
 * It can't look into the packet: a stray segment of a connection that is gone looks as a SYN does, and counts as one.
 */
#include "ports.h"

char LICENSE[] SEC("license") = "GPL";

enum mode { PASS = 0 }; /* criproxy/hook/pod_maps.py has the others, which are all the same here */

/* Written by criproxy alone. */
struct host {
	__u32 layout;   /* of the maps; host_network.py refuses pins of another one */
	__u32 commands; /* the slots (bits) in whose container an exec probe is under way */
};

/* The process that keeps listeners open; the next daemon looks for it here. */
struct keeper {
	__u32 pid;
	__u32 sockets[2]; /* its descriptors; 0: there is none */
	__u32 zero;
	__u64 since;      /* when it was started, in ticks since the machine's boot */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct host);
} host SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct keeper);
} keeper SEC(".maps");

/* When a connection to a slot's ports came last (CLOCK_MONOTONIC, ns); 0: none did. Written by the program alone. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SLOTS);
	__type(key, __u32);
	__type(value, __u64);
} slots SEC(".maps");

/* Where a slot's application listens: at an address (IPv6 or IPv4-mapped), at any IPv4 address, or at any (zeros). */
struct place {
	__u32 address[4];
	__be16 port;
	__be16 zero;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, struct place);
	__type(value, __u32);
} places SEC(".maps");

/* Connections that criproxy is making to an application. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, struct four);
	__type(value, __u32);
} relays SEC(".maps");

/* Kubelet's connections that the listener has got; whoever accepts one takes its entry out. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct four);
	__type(value, __u32);
} visits SEC(".maps");

/*
 * The sockets that listen in place of the application, for IPv4 and IPv6: PARKED is kept open without a daemon, too.
 * PROBED is the daemon's own; without one it isn't there, as a closed socket leaves by itself.
 */
#define PARKED 0
#define PROBED 2

struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 4);
	__type(key, __u32);
	__type(value, __u64);
} listeners SEC(".maps");

static __always_inline int listens(const struct four *four)
{
	struct place place = {.port = four->local_port};

	if (bpf_map_lookup_elem(&places, &place))
		return 1;
	for (int i = 0; i < 4; i++)
		place.address[i] = four->local[i];
	if (bpf_map_lookup_elem(&places, &place))
		return 1;
	place.address[3] = 0;
	return place.address[0] == 0 && place.address[1] == 0 && place.address[2] == bpf_htonl(0xffff) &&
	       bpf_map_lookup_elem(&places, &place);
}

static __always_inline int over_lo(const struct four *four)
{
	__u32 differ = 0;

	for (int i = 0; i < 4; i++)
		differ |= four->local[i] ^ four->remote[i];
	return !differ;
}

SEC("sk_lookup")
int incoming(struct bpf_sk_lookup *sought)
{
	struct port port = {.number = bpf_htons(sought->local_port), .proto = IPPROTO_TCP};
	struct four four = {.local_port = port.number, .remote_port = sought->remote_port, .proto = IPPROTO_TCP};
	__u32 zero = 0, slot, flags, parked, kubelet, listener, *mode;
	struct bpf_sock *socket;
	struct owner *owner;
	struct host *settings;
	__u64 *last;

	if (sought->protocol != IPPROTO_TCP || sought->sk) /* another program has found it */
		return SK_PASS;
	owner = bpf_map_lookup_elem(&ports, &port);
	settings = bpf_map_lookup_elem(&host, &zero);
	if (!owner || !settings)
		return SK_PASS;
	slot = owner->slot;
	flags = owner->flags;
	mode = bpf_map_lookup_elem(&modes, &slot);
	last = bpf_map_lookup_elem(&slots, &slot);
	if (!mode || !last)
		return SK_PASS;
	parked = *mode != PASS;
	if (sought->family == AF_INET) {
		four.local[2] = four.remote[2] = bpf_htonl(0xffff);
		four.local[3] = sought->local_ip4;
		four.remote[3] = sought->remote_ip4;
	} else {
		for (int i = 0; i < 4; i++) {
			four.local[i] = sought->local_ip6[i];
			four.remote[i] = sought->remote_ip6[i];
		}
	}
	if (!listens(&four) || bpf_map_lookup_elem(&relays, &four))
		return SK_PASS;

	kubelet = from_kubelet(&four, bpf_ktime_get_ns());
	/* Kubelet's are the listener's also while the application runs, once that listens: probes are known by what they say. */
	if (!parked && !(kubelet && (flags & ANSWERED(KUBELET)))) {
		if (!kubelet && !(flags & QUIET) && !((settings->commands >> (slot & 31) & 1) && over_lo(&four)))
			*last = bpf_ktime_get_ns();
		return SK_PASS;
	}
	if (parked && !kubelet && (flags & QUIET))
		return SK_DROP;
	listener = (parked ? PARKED : PROBED) + (sought->family != AF_INET);
	socket = bpf_map_lookup_elem(&listeners, &listener);
	if (!socket)
		return SK_PASS;
	if (kubelet)
		bpf_map_update_elem(&visits, &four, &slot, BPF_ANY);
	else
		bpf_map_delete_elem(&visits, &four);
	bpf_sk_assign(sought, socket, 0);
	bpf_sk_release(socket);
	return SK_PASS;
}
