/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Connections that may be kubelet's probes: who opened them, what they say, and the listener that has them while the
 * application sleeps.
 *
 * What it guarantees:
 *  - A visit begins with a SYN, and only with one that came in. A pod's containers can't make themselves kubelet: its
 *    connections are in a map that they can't reach, with both addresses and ports, for as long as they are open.
 *  - What can't be copied counts as activity, and so does all that follows on that connection.
 *
 * What isn't static the verifier looks at once, not once for each way that leads there: loading takes a tenth of the time.
 * Its pointers may be NULL then, and 6.1 doesn't take what they point to for a map's key.
 */
#ifndef VISITOR_H
#define VISITOR_H

#include "packet.h"

#define COPIES 16             /* packets that are copied in each direction, */
#define COPIED 2048           /* and bytes of each one's payload */
#define HEAD 512              /* bytes of a first payload in which a user agent is looked for */

/* Where `forwarded` looks; too large for the stack. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u8[HEAD]);
} head SEC(".maps");

/* What is known of a packet that came in. */
struct sight {
	struct four server; /* its connection, seen from its server's end: `visited` fills it in, */
	__u32 incoming;     /* and this: it came from the client */
	struct owner owner; /* of its local end, */
	__u32 owned;        /* if that is anybody's; */
	__u32 sent;         /* over lo its sender may be a slot, too */
	__u32 over_lo;
	__u32 active;
	__u32 commands;     /* as in struct pod */
};

/* A SYN came in: is it the beginning of a visit? Then `visits` has it. */
static __always_inline struct visit *begun(const struct packet *p, const struct sight *sight, const struct four *four)
{
	struct visit fresh = {.owner = sight->owner, .first = p->seq}, *known = bpf_map_lookup_elem(&visits, four);
	int begins = 0;

	if (known && known->first == p->seq) /* the same SYN once more */
		return known;
	if (!sight->over_lo) {
		fresh.visitor = KUBELET;
		fresh.state = WATCHED;
		begins = sight->owned && from_kubelet(four, bpf_ktime_get_ns());
	} else if (!p->payload) {
		fresh.commands = sight->commands;
		if (sight->owned)
			fresh.commands &= 1 << (sight->owner.slot & (SLOTS - 1));
		fresh.visitor = fresh.commands ? COMMAND : LOOPBACK;
		fresh.state = fresh.commands ? WATCHED : UNDECIDED;
		begins = sight->owned || sight->commands;
	}
	if (begins && !bpf_map_update_elem(&visits, four, &fresh, BPF_ANY))
		return bpf_map_lookup_elem(&visits, four);
	if (known)
		bpf_map_delete_elem(&visits, four);
	return NULL;
}

struct search {
	__u8 *bytes;
	__u64 before; /* the bytes seen last, */
	__u64 last;   /* the latest of them */
	int found;
};

static long step(__u32 i, struct search *search)
{
	if (i >= HEAD)
		return 1;
	search->before = search->before << 8 | search->last >> 56;
	search->last = search->last << 8 | search->bytes[i];
	search->found = search->last == 0x652d70726f62652full /* e-probe/ */ &&
			(search->before & 0xffffff) == 0x6b7562 /* kub */;
	return search->found;
}

/* Whether the payload begins as a request of kubelet's does: with `kube-probe/` somewhere in its first bytes. */
static __always_inline int forwarded(struct __sk_buff *skb, __u32 offset, __u32 length)
{
	struct search search = {};
	__u64 last = (__u64)length - 1;
	__u32 zero = 0;

	search.bytes = bpf_map_lookup_elem(&head, &zero);
	asm volatile("" : "+r"(last));
	if (!search.bytes || !length)
		return 0;
	if (last >= HEAD)
		last = HEAD - 1;
	if (bpf_skb_load_bytes(skb, network_header(skb) + offset, search.bytes, (__u32)last + 1))
		return 0;
	bpf_loop((__u32)last + 1, step, &search, 0);
	return search.found;
}

/* As STORE in pod.c: the payload's beginning goes into the smallest reservation that holds it. */
#define COPY(size)                                                                                  \
	static __noinline int copy_##size(struct __sk_buff *skb, const struct copy *header, __u32 offset) \
	{                                                                                           \
		__u64 last = (__u64)header->copied - 1;                                             \
		struct {                                                                            \
			struct copy header;                                                         \
			__u8 payload[size];                                                         \
		} *room = bpf_ringbuf_reserve(&watched, sizeof(*room), 0);                          \
		if (!room)                                                                          \
			return -1;                                                                  \
		asm volatile("" : "+r"(last));                                                      \
		if (last >= (size) || bpf_skb_load_bytes(skb, offset, room->payload, (__u32)last + 1)) { \
			bpf_ringbuf_discard(room, 0);                                               \
			return -1;                                                                  \
		}                                                                                   \
		room->header = *header;                                                             \
		bpf_ringbuf_submit(room, 0);                                                        \
		return 0;                                                                           \
	}

COPY(512)
COPY(2048)

/* What a packet without payload says: `flags`, at `seq`. */
static __always_inline int copy_bare(const struct four *server, const struct visit *visit, __u32 incoming, __u32 flags,
				     __u32 seq)
{
	struct copy *room = bpf_ringbuf_reserve(&watched, sizeof(*room), 0);

	if (!room)
		return -1;
	__builtin_memset(room, 0, sizeof(*room));
	room->four = *server;
	room->slot = visit->owner.slot;
	room->seq = seq;
	room->time = bpf_ktime_get_ns();
	room->visitor = visit->visitor;
	room->incoming = incoming;
	room->flags = flags;
	bpf_ringbuf_submit(room, 0);
	return 0;
}

static __always_inline int copy(struct __sk_buff *skb, const struct packet *p, const struct four *server,
				struct visit *visit, __u32 incoming)
{
	struct copy header = {
		.four = *server,
		.slot = visit->owner.slot,
		.seq = p->seq,
		.length = p->payload,
		.copied = p->payload < COPIED ? p->payload : COPIED,
		.time = bpf_ktime_get_ns(),
		.visitor = visit->visitor,
		.incoming = incoming,
		.flags = p->flags,
	};
	__u8 copies = incoming ? visit->in : visit->out;
	__u32 offset;

	if (copies >= COPIES) {
		if (!(p->flags & (FIN | RST)))
			return 0;
		header.copied = 0;
	} else if (incoming) {
		visit->in++;
	} else {
		visit->out++;
	}
	if (!header.copied)
		return bpf_ringbuf_output(&watched, &header, sizeof(header), 0);
	offset = network_header(skb) + p->data;
	return header.copied <= 512 ? copy_512(skb, &header, offset) : copy_2048(skb, &header, offset);
}

/*
 * A connection over lo about which nothing is known so far. Its SYN has been let through uncounted, as it may be all
 * that a mesh's agent sends; the client's first payload tells, or that it leaves without any. 0: it's no probe.
 */
static __always_inline int decide(struct __sk_buff *skb, const struct packet *p, const struct sight *sight,
				  struct visit *visit)
{
	if (p->flags & SYN) {
		if (!sight->incoming)
			visit->answer = p->seq;
		return 1;
	}
	if (!sight->incoming) /* the server greets, once; when it leaves, nobody asks for more */
		return p->payload && !visit->out++;
	if (p->payload && !forwarded(skb, p->data, p->payload))
		return 0;
	visit->state = WATCHED;
	visit->out = 0;
	/* As if it had been watched from the beginning. */
	return !copy_bare(&sight->server, visit, 1, SYN, visit->first) &&
	       !copy_bare(&sight->server, visit, 0, SYN | ACK, visit->answer);
}

/* Whether a packet with SYN, payload, FIN or RST belongs to a visit, which then `visits` has by `sight->server`. */
__noinline int visited(struct __sk_buff *skb, const struct packet *p, struct sight *sight)
{
	struct visit *visit = NULL;
	struct four server;
	int any;

	if (!p || !sight)
		return 0;
	any = !sight->active || (sight->over_lo && sight->commands);
	server = p->four;
	sight->incoming = 1;
	if ((p->flags & (SYN | ACK)) == SYN) {
		visit = begun(p, sight, &server);
	} else {
		if (sight->owned || any)
			visit = bpf_map_lookup_elem(&visits, &server);
		if (!visit && sight->over_lo && (sight->sent || any)) {
			turned(&server);
			sight->incoming = 0;
			visit = bpf_map_lookup_elem(&visits, &server);
		}
	}
	if (!visit)
		return 0;
	sight->server = server;
	if (visit->state != UNDECIDED || decide(skb, p, sight, visit))
		return 1;
	bpf_map_delete_elem(&visits, &server);
	return 0;
}

static __always_inline __u32 tuple_of(const struct four *four, struct bpf_sock_tuple *tuple)
{
	if (four->local[0] == 0 && four->local[1] == 0 && four->local[2] == bpf_htonl(0xffff)) {
		tuple->ipv4.saddr = four->remote[3];
		tuple->ipv4.daddr = four->local[3];
		tuple->ipv4.sport = four->remote_port;
		tuple->ipv4.dport = four->local_port;
		return sizeof(tuple->ipv4);
	}
	__builtin_memcpy(tuple->ipv6.saddr, four->remote, 16);
	__builtin_memcpy(tuple->ipv6.daddr, four->local, 16);
	tuple->ipv6.sport = four->remote_port;
	tuple->ipv6.dport = four->local_port;
	return sizeof(tuple->ipv6);
}

#define GIVEN 0  /* the SYN is on its way */
#define NOBODY 1 /* there is no listener now */
#define REFUSED 2

/*
 * The SYN of a visit becomes the listener's; what follows on its connection the stack finds by itself. It also finds a
 * socket that is there already: of the same SYN, sent once more; or in TIME_WAIT, beside which the kernel makes no other,
 * and which the SYN's answer ends before it comes again.
 */
__noinline int hand_over(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *found;
	struct visit *visit;
	struct four four;
	__u32 zero = 0, size, listens;
	long failed = -1;

	if (!p)
		return REFUSED;
	four = p->four;
	size = tuple_of(&p->four, &tuple);
	found = bpf_skc_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (found) {
		listens = found->state == BPF_TCP_LISTEN;
		bpf_sk_release(found);
		if (!listens)
			return GIVEN;
	}
	found = bpf_map_lookup_elem(&listener, &zero);
	if (!found)
		return NOBODY;
	if (found->family == AF_INET6 || size == sizeof(tuple.ipv4))
		failed = bpf_sk_assign(skb, found, 0);
	bpf_sk_release(found);
	if (failed)
		return REFUSED;
	visit = bpf_map_lookup_elem(&visits, &four);
	if (visit)
		visit->state = OURS;
	return GIVEN;
}

#endif
