/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * The maps of the hook in a pod, and what lies in them. criproxy/hook/pod_maps.py has the same layouts in Python.
 */
#ifndef POD_H
#define POD_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#include "ports.h"

#define LAYOUT 4      /* of the maps and the records; network.py refuses pins of another one */
#define FLOWS 16384   /* connections that are kept while their slots are parked; room for one is 16 bytes in every pod */
#define LO 1          /* the kernel gives every namespace's lo this ifindex */
#define EXTENSIONS 8  /* IPv6 extension headers that are walked at most; a packet with more isn't looked at */
#define FRAME 66560   /* an IPv6 packet with the longest payload there is without a jumbogram, and its link header */

/*
 * NEW: SYNs are parked. ALL: everything is. WAKE: as ALL, but TCP packets without news pass, because the sockets are
 * there again: the ACK that completes the handshake of a SYN which was just sent again must arrive, or a client that
 * waits for the server's first word waits a second for nothing.
 */
enum mode { PASS = 0, NEW = 1, ALL = 2, WAKE = 3 };

/* Written by criproxy alone. */
struct pod {
	__u32 layout;
	__u32 parking;  /* how many slots aren't in PASS: a shortcut for the packets of a running pod */
	__u32 sysctls;  /* which settings of the namespace were changed (bits), for the way back */
	__u32 commands; /* the slots (bits) in whose container an exec probe is under way */
};

/* Written by the programs alone. Times: CLOCK_MONOTONIC in ns, 0 for never. */
struct slot {
	__u64 last_in;
	__u64 last_out;
	__u64 parked;
	__u64 parked_bytes;
	__u64 overflowed;  /* didn't fit into the ring buffer; TCP sends it again */
	__u64 dropped;     /* TCP without news in the mode ALL that wasn't answered */
	__u64 quiet;       /* packets to quiet ports that found the slot parked */
	__u64 answered;    /* keep-alives of connections whose sockets sleep */
};

/* TCP that no slot's port or flow explains: an outgoing connection, or another container's. `talks` has which. */
struct others {
	__u64 last_in;
	__u64 last_out;
};

#define STATED 1     /* the fields below are filled in: the socket sleeps, and its keep-alives are answered */
#define TIMESTAMPS 2 /* the connection has them */

/* A connection of the slot. Once it sleeps: what its socket would put into a segment without data, host byte order. */
struct flow {
	__u32 slot;
	__u32 flags;
	__u32 rcv_nxt;
	__u32 snd_nxt;
	__u32 window; /* as it is in the header, scaled */
	__u32 tsval;  /* stands still while it sleeps, for the restored socket goes on from here */
};

/* When a TCP connection of the pod, whoever's, had SYN or new payload last. CLOCK_MONOTONIC in ns, 0 for not seen. */
struct talk {
	__u64 in;
	__u64 out;
	__u32 in_end; /* sequence number of what comes next in this direction */
	__u32 out_end;
	__u32 http2;  /* the connection has housekeeping of its own, which is in the numbers, but not in the times */
	__u32 zero;
};

enum state {
	UNDECIDED = 0, /* LOOPBACK: the client has said nothing so far */
	WATCHED = 1,   /* copied for user space (but for COMMAND), doesn't count as activity */
	OURS = 2,      /* the listener has it: neither counts nor is copied */
};

/* A connection of such a visitor, from its SYN until user space says that it is no probe, or another takes its place. */
struct visit {
	struct owner owner;
	__u32 commands; /* COMMAND: the slots (bits) whose exec probe it may belong to */
	__u32 first;    /* the client's initial sequence number, */
	__u32 answer;   /* and the server's */
	__u8 visitor;
	__u8 state;
	__u8 in;        /* packets that were copied in each direction */
	__u8 out;
};

struct link {
	__u32 mark;        /* for replay onto this link */
	__u32 made_clsact; /* the qdisc was ours */
	__u32 header;      /* length of the link header: 14, or 0 (tun, ipip, …) */
};

/* What the ring buffer holds: this header, then the frame as it came, from the link header on. */
struct record {
	__u16 slot;
	__u8 probe;     /* a SYN for the listener, which wasn't there */
	__u8 zero;
	__u32 ifindex;
	__u32 length;   /* of the frame; what follows it is padding */
	__u32 header;   /* length of the link header in it */
	__u32 payload;  /* bytes of TCP or UDP payload */
	__u16 gso_size; /* not 0: several segments (of this much payload) in one frame */
	__u8 proto;
	__u8 flags;     /* TCP's flags byte */
	__u64 time;     /* CLOCK_MONOTONIC, ns */
};

/* What the ring buffer of watched connections holds: this, then the beginning of the payload. */
struct copy {
	struct four four; /* local is the server's end, whichever way the packet went */
	__u32 slot;
	__u32 seq;
	__u32 length;     /* bytes of payload in all */
	__u32 copied;     /* of them follow; what is behind is padding */
	__u64 time;       /* CLOCK_MONOTONIC, ns */
	__u8 visitor;
	__u8 incoming;
	__u8 flags;       /* TCP's flags byte */
	__u8 zero[5];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pod);
} pod SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SLOTS);
	__type(key, __u32);
	__type(value, struct slot);
} slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct others);
} others SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, FLOWS);
	__type(key, struct four);
	__type(value, struct flow);
} flows SEC(".maps");

/* 200 KB. What falls out is what was silent for longest, and sock_diag's clocks stand in for it. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 2048);
	__type(key, struct four);
	__type(value, struct talk);
} talks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 256);
	__type(key, __u32);
	__type(value, __u32);
} replay SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 256);
	__type(key, __u32);
	__type(value, struct link);
} links SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 19);
} parked SEC(".maps");

/*
 * 60 KB. A probe is in here for as long as it takes. What falls out counts as activity, should it go on.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 512);
	__type(key, struct four);
	__type(value, struct visit);
} visits SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 16);
} watched SEC(".maps");

/* The socket in this pod that answers probes; empty while no daemon is there, as a closed socket leaves by itself. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} listener SEC(".maps");

#endif
