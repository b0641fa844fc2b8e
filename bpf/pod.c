// clang -O2 -g -target bpf -Wall -I/usr/include/$(uname -m)-linux-gnu -c bpf/pod.c -o criproxy/libexec/pod.bpf.o (any -mcpu from v1 on)
// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * The hook in a pod's network namespace: `ingress` and `egress` sit on every link of the pod (tc, clsact, direct action),
 * also on lo. Loaded once per pod, with maps of its own: no pod's program can look at another pod's packets.
 *
 * What it guarantees:
 *  - It knows when each container (a *slot*) was last used. TCP with payload and SYN count, UDP of listed ports counts;
 *    pure ACK, keep-alive probes, FIN and RST don't, nor does what isn't TCP or UDP.
 *  - While a slot is parked no packet for it is lost unseen: each is in the ring buffer `parked`, whole, or counted.
 *  - What isn't ours passes unchanged and goes on to other programs on the link (TC_ACT_UNSPEC).
 *  - Parked packets come back through lo with a private mark (`replay`) and pass even while the slot is parked, so that
 *    they can be delivered in their order before the first new one.
 *
 * In the mode ALL pure ACKs are dropped, not kept: they carry nothing that TCP doesn't repeat (the restored socket sends
 * what it takes for unacknowledged, or a window probe, and is told again), an idle peer's keep-alives would fill the
 * ring buffer within hours, and passing them on to a namespace without the socket would answer them with RST. This is
 * the place where keep-alives will be answered: see `struct flow` and `probe()`.
 *
 * Headers come from the UAPI alone and no BTF of the kernel is needed. Kernels: 6.1 to 6.18.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define LAYOUT 1      /* of the maps and of struct record; network.py refuses pins of another one */
#define SLOTS 16      /* containers per pod */
#define LO 1          /* the kernel gives every namespace's lo this ifindex */
#define EXTENSIONS 8  /* IPv6 extension headers that are walked at most; a packet with more isn't looked at */
#define FRAME 66560   /* an IPv6 packet with the longest payload there is without a jumbogram, and its link header */

char LICENSE[] SEC("license") = "GPL";

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
};

/* Written by the programs alone. Times: CLOCK_MONOTONIC in ns, 0 for never. */
struct slot {
	__u64 last_in;
	__u64 last_out;
	__u64 parked;
	__u64 parked_bytes;
	__u64 overflowed;  /* didn't fit into the ring buffer; TCP sends it again */
	__u64 dropped;     /* pure ACKs and keep-alives in the mode ALL */
	__u64 quiet;       /* packets to quiet ports that found the slot parked */
};

/* Activity that no slot's port or flow explains (an outgoing connection, or another container): counts for all. */
struct others {
	__u64 last_in;
	__u64 last_out;
};

struct port {
	__be16 number;
	__u8 proto;
	__u8 zero;
};

#define QUIET 1 /* neither counts as activity nor wakes */

struct owner {
	__u32 slot;
	__u32 flags;
};

/* Addresses are IPv6 or IPv4-mapped; local is the pod's end. */
struct four {
	__u32 local[4];
	__u32 remote[4];
	__be16 local_port;
	__be16 remote_port;
	__u8 proto;
	__u8 zero[3];
};

#define LET_PASS 1 /* this connection isn't the slot's although its port is: never park it */
#define STATED 2   /* the fields below are filled in */

struct flow {
	__u32 slot;
	__u32 flags;
	/* The sleeping socket's state, by which keep-alives are known (and will be answered). Host byte order. */
	__u32 rcv_nxt;
	__u32 snd_nxt;
	__u32 window;
	__u32 tsval;
	__u64 tsval_at;
};

struct link {
	__u32 mark;        /* for replay onto this link */
	__u32 made_clsact; /* the qdisc was ours */
	__u32 header;      /* length of the link header: 14, or 0 (tun, ipip, …) */
};

/* What the ring buffer holds: this header, then the frame as it came, from the link header on. */
struct record {
	__u32 slot;
	__u32 ifindex;
	__u32 length;   /* of the frame; what follows it is padding */
	__u32 header;   /* length of the link header in it */
	__u32 payload;  /* bytes of TCP or UDP payload */
	__u16 gso_size; /* not 0: several segments (of this much payload) in one frame */
	__u8 proto;
	__u8 flags;     /* TCP's flags byte */
	__u64 time;     /* CLOCK_MONOTONIC, ns */
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
	__type(value, __u32);
} modes SEC(".maps");

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
	__uint(max_entries, 1024);
	__type(key, struct port);
	__type(value, struct owner);
} ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct four);
	__type(value, struct flow);
} flows SEC(".maps");

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

struct packet {
	struct four four;
	__u32 payload;
	__u32 seq;
	__u8 flags;
};

#define FIN 0x01
#define SYN 0x02
#define RST 0x04
#define ACK 0x10

static __always_inline long load(struct __sk_buff *skb, __u32 offset, void *to, __u32 length)
{
	/* From the network header: link headers differ, and on some links there is none. */
	return bpf_skb_load_bytes_relative(skb, offset, to, length, BPF_HDR_START_NET);
}

/*
 * IPv6: from the fixed header's `next` to the transport header: its offset << 8 | its protocol, or 0: not for us.
 * (Not static: the verifier then looks at it once, not once for each way that leads here. It halves the loading time.)
 */
__noinline __u32 walk(struct __sk_buff *skb, __u32 next)
{
	__u32 offset = sizeof(struct ipv6hdr);

	for (int i = 0; i < EXTENSIONS; i++) {
		__u8 head[4];

		if (next == IPPROTO_TCP || next == IPPROTO_UDP)
			return offset << 8 | next;
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS && next != IPPROTO_AH &&
		    next != IPPROTO_FRAGMENT)
			return 0;
		if (load(skb, offset, head, 4))
			return 0;
		/* Only the first fragment tells ports. The others pass: they wait in the kernel's reassembly. */
		if (next == IPPROTO_FRAGMENT && (((head[2] << 8) | head[3]) & 0xfff8))
			return 0;
		if (next == IPPROTO_AH)
			offset += (head[1] + 2) * 4;
		else if (next == IPPROTO_FRAGMENT)
			offset += 8;
		else
			offset += (head[1] + 1) * 8;
		next = head[0];
	}
	return 0;
}

/* 0: a TCP or UDP packet, described in `p`. */
static __always_inline int parse(struct __sk_buff *skb, struct packet *p, int incoming)
{
	__u32 *source = incoming ? p->four.remote : p->four.local;
	__u32 *target = incoming ? p->four.local : p->four.remote;
	__u32 offset, end;
	__be16 from, to;

	if (skb->vlan_present) /* the VLAN's own link shows it again, untagged */
		return -1;
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr ip;

		if (load(skb, 0, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5)
			return -1;
		if (ip.frag_off & bpf_htons(0x1fff)) /* not the first fragment, as above */
			return -1;
		source[2] = target[2] = bpf_htonl(0xffff);
		source[3] = ip.saddr;
		target[3] = ip.daddr;
		p->four.proto = ip.protocol;
		offset = ip.ihl * 4;
		end = bpf_ntohs(ip.tot_len);
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr ip;
		__u32 found;

		if (load(skb, 0, &ip, sizeof(ip)) || ip.version != 6)
			return -1;
		__builtin_memcpy(source, &ip.saddr, 16);
		__builtin_memcpy(target, &ip.daddr, 16);
		found = walk(skb, ip.nexthdr);
		if (!found)
			return -1;
		offset = found >> 8;
		p->four.proto = found & 0xff;
		end = ip.payload_len ? sizeof(ip) + bpf_ntohs(ip.payload_len) : 0;
	} else {
		return -1;
	}
	if (!end) /* BIG TCP: the length is in the skb alone. Rounded up; it has payload for certain. */
		end = skb->len;

	if (p->four.proto == IPPROTO_TCP) {
		struct tcphdr tcp;
		__u32 headers;

		if (load(skb, offset, &tcp, sizeof(tcp)) || tcp.doff < 5)
			return -1;
		from = tcp.source;
		to = tcp.dest;
		p->seq = bpf_ntohl(tcp.seq);
		p->flags = ((__u8 *)&tcp)[13];
		headers = offset + tcp.doff * 4;
		p->payload = end > headers ? end - headers : 0;
	} else if (p->four.proto == IPPROTO_UDP) {
		struct udphdr udp;

		if (load(skb, offset, &udp, sizeof(udp)))
			return -1;
		from = udp.source;
		to = udp.dest;
		p->payload = end > offset + sizeof(udp) ? end - offset - sizeof(udp) : 0;
	} else {
		return -1;
	}
	p->four.local_port = incoming ? to : from;
	p->four.remote_port = incoming ? from : to;
	return 0;
}

/* The slot of the packet's local end; 0: nobody's. `flow` is what is known of its connection, if anything. */
static __always_inline int own(const struct four *four, struct owner *owner, struct flow **flow)
{
	struct port port = {.number = four->local_port, .proto = four->proto};
	struct owner *listed;

	*flow = bpf_map_lookup_elem(&flows, four);
	listed = bpf_map_lookup_elem(&ports, &port);
	if (*flow) {
		owner->slot = (*flow)->slot;
		owner->flags = listed && listed->slot == owner->slot ? listed->flags : 0;
		return 1;
	}
	if (listed) {
		*owner = *listed;
		return 1;
	}
	return 0;
}

/*
 * An old kind of keep-alive carries the last byte that was acknowledged. (Linux's carries none.) Only the socket knows
 * that this byte isn't new; for a sleeping one `flows` does. Unknown: a byte is a byte.
 */
static __always_inline int probe(struct __sk_buff *skb, const struct packet *p, const struct flow *flow)
{
	struct bpf_sock_tuple tuple = {};
	const struct four *four = &p->four;
	struct bpf_sock *found;
	struct bpf_tcp_sock *tcp;
	__u32 size, next = 0;
	int known = 0;

	if (four->local[0] == 0 && four->local[1] == 0 && four->local[2] == bpf_htonl(0xffff)) {
		tuple.ipv4.saddr = four->remote[3];
		tuple.ipv4.daddr = four->local[3];
		tuple.ipv4.sport = four->remote_port;
		tuple.ipv4.dport = four->local_port;
		size = sizeof(tuple.ipv4);
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, four->remote, 16);
		__builtin_memcpy(tuple.ipv6.daddr, four->local, 16);
		tuple.ipv6.sport = four->remote_port;
		tuple.ipv6.dport = four->local_port;
		size = sizeof(tuple.ipv6);
	}
	found = bpf_sk_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (found) {
		tcp = bpf_tcp_sock(found);
		if (tcp && found->state != BPF_TCP_LISTEN) {
			next = tcp->rcv_nxt;
			known = 1;
		}
		bpf_sk_release(found);
	}
	if (!known && flow && (flow->flags & STATED)) {
		next = flow->rcv_nxt;
		known = 1;
	}
	return known && p->seq + 1 == next;
}

static __always_inline int active(const struct packet *p)
{
	return p->four.proto == IPPROTO_UDP || p->payload || (p->flags & SYN);
}

static __always_inline void count(const struct packet *p, const struct owner *owner, int incoming)
{
	__u64 now = bpf_ktime_get_ns();
	__u32 key = 0;

	if (owner) {
		struct slot *slot = bpf_map_lookup_elem(&slots, &owner->slot);

		if (slot && !(owner->flags & QUIET)) {
			if (incoming)
				slot->last_in = now;
			else
				slot->last_out = now;
		}
	} else if (p->four.proto == IPPROTO_TCP) { /* a UDP port that isn't listed is nobody's: DNS answers, mostly */
		struct others *other = bpf_map_lookup_elem(&others, &key);

		if (other) {
			if (incoming)
				other->last_in = now;
			else
				other->last_out = now;
		}
	}
}

/*
 * The ring buffer's reservations have sizes that the verifier knows: the frame goes into the smallest that holds it.
 * 6.1's verifier learns nothing from `length != 0`, hence the last byte's index, bounded from above alone; 64 bits and
 * the asm keep the compiler from checking a copy of it that the verifier doesn't connect with the one that is used.
 */
#define STORE(size)                                                                                \
	static __noinline int store_##size(struct __sk_buff *skb, const struct record *r)          \
	{                                                                                          \
		__u64 last = (__u64)r->length - 1;                                                 \
		struct {                                                                           \
			struct record record;                                                      \
			__u8 frame[size];                                                          \
		} *room = bpf_ringbuf_reserve(&parked, sizeof(*room), 0);                          \
		if (!room)                                                                         \
			return -1;                                                                 \
		asm volatile("" : "+r"(last));                                                     \
		if (last >= (size) || bpf_skb_load_bytes(skb, 0, room->frame, (__u32)last + 1)) {  \
			bpf_ringbuf_discard(room, 0);                                              \
			return -1;                                                                 \
		}                                                                                  \
		room->record = *r;                                                                 \
		bpf_ringbuf_submit(room, 0);                                                       \
		return 0;                                                                          \
	}

STORE(128)
STORE(512)
STORE(1536)
STORE(4096)
STORE(16384)
STORE(32768)
STORE(66560)

static __always_inline int park(struct __sk_buff *skb, const struct packet *p, __u32 slot, struct slot *counters)
{
	struct record r = {
		.slot = slot,
		.ifindex = skb->ifindex,
		.length = skb->len,
		.header = ETH_HLEN,
		.payload = p->payload,
		.gso_size = skb->gso_size,
		.proto = p->four.proto,
		.flags = p->flags,
		.time = bpf_ktime_get_ns(),
	};
	__u32 ifindex = skb->ifindex;
	struct link *link = bpf_map_lookup_elem(&links, &ifindex);
	int failed;

	if (link)
		r.header = link->header;
	if (r.length <= 128)
		failed = store_128(skb, &r);
	else if (r.length <= 512)
		failed = store_512(skb, &r);
	else if (r.length <= 1536)
		failed = store_1536(skb, &r);
	else if (r.length <= 4096)
		failed = store_4096(skb, &r);
	else if (r.length <= 16384)
		failed = store_16384(skb, &r);
	else if (r.length <= 32768)
		failed = store_32768(skb, &r);
	else if (r.length <= FRAME)
		failed = store_66560(skb, &r);
	else
		failed = -1;
	if (failed) {
		__sync_fetch_and_add(&counters->overflowed, 1);
	} else {
		__sync_fetch_and_add(&counters->parked, 1);
		__sync_fetch_and_add(&counters->parked_bytes, r.length);
	}
	return TC_ACT_SHOT;
}

SEC("tc")
int ingress(struct __sk_buff *skb)
{
	__u32 mark = skb->mark, zero = 0, *mode;
	struct owner owner = {};
	struct packet p = {};
	struct flow *flow = NULL;
	struct slot *counters;
	struct pod *settings;
	int replayed = 0, owned, counts;

	/* Whoever sets a mark without knowing ours (CAP_NET_RAW suffices for setting) is treated as without it. */
	if (mark && bpf_map_lookup_elem(&replay, &mark)) {
		skb->mark = 0;
		replayed = 1;
	}
	settings = bpf_map_lookup_elem(&pod, &zero);
	if (!settings || skb->pkt_type == PACKET_OTHERHOST || parse(skb, &p, 1))
		return TC_ACT_UNSPEC;
	counts = active(&p);
	if (!counts && !settings->parking)
		return TC_ACT_UNSPEC;

	owned = own(&p.four, &owner, &flow);
	if (counts && p.four.proto == IPPROTO_TCP && p.payload == 1 && !(p.flags & SYN) && probe(skb, &p, flow)) {
		counts = 0;
		p.payload = 0;
	}
	if (counts && skb->ifindex == LO) {
		/* Both ends are the pod's. What one container sends another isn't activity of a third. */
		struct four back = {.local_port = p.four.remote_port, .remote_port = p.four.local_port,
				    .proto = p.four.proto};
		struct owner sender = {};
		struct flow *other;
		int sent;

		__builtin_memcpy(back.local, p.four.remote, 16);
		__builtin_memcpy(back.remote, p.four.local, 16);
		sent = own(&back, &sender, &other);
		if (sent)
			count(&p, &sender, 0);
		if (owned || !sent)
			count(&p, owned ? &owner : NULL, 1);
	} else if (counts) {
		count(&p, owned ? &owner : NULL, 1);
	}

	if (replayed || !owned || (flow && (flow->flags & LET_PASS)))
		return TC_ACT_UNSPEC;
	mode = bpf_map_lookup_elem(&modes, &owner.slot);
	counters = bpf_map_lookup_elem(&slots, &owner.slot);
	if (!mode || !counters || *mode == PASS)
		return TC_ACT_UNSPEC;
	if (*mode == NEW && (p.four.proto != IPPROTO_TCP || (p.flags & (SYN | ACK)) != SYN))
		return TC_ACT_UNSPEC;
	if (owner.flags & QUIET) {
		__sync_fetch_and_add(&counters->quiet, 1);
		return TC_ACT_SHOT;
	}
	if (p.four.proto == IPPROTO_TCP && !p.payload && !(p.flags & (SYN | FIN | RST))) {
		if (*mode == WAKE)
			return TC_ACT_UNSPEC;
		__sync_fetch_and_add(&counters->dropped, 1);
		return TC_ACT_SHOT;
	}
	return park(skb, &p, owner.slot, counters);
}

SEC("tc")
int egress(struct __sk_buff *skb)
{
	struct owner owner = {};
	struct packet p = {};
	struct flow *flow;

	if (skb->ifindex == LO) { /* counted on the way in */
		__u32 mark = skb->mark;
		__u32 *ifindex = mark ? bpf_map_lookup_elem(&replay, &mark) : NULL;

		return ifindex ? bpf_redirect(*ifindex, BPF_F_INGRESS) : TC_ACT_UNSPEC;
	}
	if (parse(skb, &p, 0) || !active(&p))
		return TC_ACT_UNSPEC;
	count(&p, own(&p.four, &owner, &flow) ? &owner : NULL, 0);
	return TC_ACT_UNSPEC;
}
