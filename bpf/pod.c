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
 *  - A slot's established connections are those in `flows` when it is parked. TCP of others passes (but for SYNs to its
 *    ports): it is a neighbour's (a mesh's sidecar, with the application's port behind REDIRECT or TPROXY), or the kernel
 *    finishes a connection that its owner has closed.
 *
 * In the mode ALL pure ACKs are dropped, not kept: they carry nothing that TCP doesn't repeat (the restored socket sends
 * what it takes for unacknowledged, or a window probe, and is told again), an idle peer's keep-alives would fill the
 * ring buffer within hours, and passing them on to a namespace without the socket would answer them with RST. Keep-alives
 * are answered here as soon as the flow is STATED: see answer.h.
 *
 * Headers come from the UAPI alone and no BTF of the kernel is needed. Kernels: 6.1 to 6.18.
 */
#include "answer.h"
#include "packet.h"
#include "visitor.h"

char LICENSE[] SEC("license") = "GPL";

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
 * that this byte isn't new; for a sleeping one `flows` does, and `next` is it. Unknown: a byte is a byte.
 */
__noinline int keepalive(struct __sk_buff *skb, const struct packet *p, __u32 known, __u32 next)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *found;
	struct bpf_tcp_sock *tcp;
	__u32 size;

	if (!p)
		return 0;
	size = tuple_of(&p->four, &tuple);
	found = bpf_sk_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (found) {
		tcp = bpf_tcp_sock(found);
		if (tcp && found->state != BPF_TCP_LISTEN) {
			next = tcp->rcv_nxt;
			known = 1;
		}
		bpf_sk_release(found);
	}
	return known && p->seq + 1 == next;
}

static __always_inline int active(const struct packet *p)
{
	return p->four.proto == IPPROTO_UDP || p->payload || (p->flags & SYN);
}

#define HOUSEKEEPING 256 /* bytes of a payload that may be nothing else */
#define FRAMES 8

/*
 * Whether a payload is nothing but HTTP/2's own housekeeping (RFC 9113): its preface, SETTINGS, PING, WINDOW_UPDATE. That
 * is neither a request nor an answer: after an answer a gRPC client sends some, and then waits for nothing; and a server
 * that sends some has not answered yet.
 */
__noinline int housekeeping(struct __sk_buff *skb, const struct packet *p)
{
	__u32 offset, end;
	__u8 frame[9];

	if (!p || p->payload < sizeof(frame) || p->payload > HOUSEKEEPING)
		return 0;
	offset = network_header(skb) + p->data;
	end = offset + p->payload;
	if (bpf_skb_load_bytes(skb, offset, frame, sizeof(frame)))
		return 0;
	if (frame[0] == 'P' && frame[1] == 'R' && frame[2] == 'I' && frame[3] == ' ' && frame[4] == '*')
		offset += 24;
	for (int i = 0; i < FRAMES && offset < end; i++) {
		__u32 length;

		if (bpf_skb_load_bytes(skb, offset, frame, sizeof(frame)) || frame[0] || frame[1])
			return 0;
		length = frame[2];
		if (!(frame[3] == 4 && length % 6 == 0) && !(frame[3] == 6 && length == 8) &&
		    !(frame[3] == 8 && length == 4))
			return 0;
		offset += sizeof(frame) + length;
	}
	return offset == end;
}

/*
 * What is sent once more isn't news: it may cross with its answer, and would look like another request then.
 * Returns whether it was any, so that what counts for nobody's slot is in `talks` with the very same time.
 */
static __noinline int note(struct __sk_buff *skb, const struct four *four, const struct packet *p, int incoming,
			   __u64 now)
{
	struct talk *known = bpf_map_lookup_elem(&talks, four), fresh = {};
	struct talk *talk = known ? known : &fresh;
	__u64 *last = incoming ? &talk->in : &talk->out;
	__u32 *end = incoming ? &talk->in_end : &talk->out_end;
	__u32 ends = p->seq + p->payload;
	int news;

	if (*last && !(p->flags & SYN) && (__s32)(ends - *end) <= 0)
		return 0;
	*end = ends;
	news = !*last || !housekeeping(skb, p);
	if (news)
		*last = now;
	else
		talk->http2 = 1;
	if (!known)
		bpf_map_update_elem(&talks, four, &fresh, BPF_ANY);
	return news;
}

/* `owner` NULL: nobody's. A UDP port that isn't listed is nobody's and counts for none: DNS answers, mostly. */
static __always_inline void count(const struct packet *p, const struct owner *owner, int incoming, __u64 now)
{
	__u32 key = 0;

	if (owner) {
		struct slot *slot = bpf_map_lookup_elem(&slots, &owner->slot);

		if (slot && !(owner->flags & QUIET)) {
			if (incoming)
				slot->last_in = now;
			else
				slot->last_out = now;
		}
	} else if (p->four.proto == IPPROTO_TCP) {
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

/* (Not static: see visitor.h.) */
__noinline int park(struct __sk_buff *skb, const struct packet *p, __u32 slot, struct slot *counters, __u32 probing)
{
	struct record r = {};
	int failed;

	if (!p || !counters)
		return TC_ACT_SHOT;
	r.slot = slot;
	r.probe = probing;
	r.ifindex = skb->ifindex;
	r.length = skb->len;
	r.header = network_header(skb);
	r.payload = p->payload;
	r.gso_size = skb->gso_size;
	r.proto = p->four.proto;
	r.flags = p->flags;
	r.time = bpf_ktime_get_ns();
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

/* A packet of a visit goes its way: user space gets a copy, or it counts. */
__noinline int show(struct __sk_buff *skb, const struct packet *p, const struct four *server, __u32 incoming)
{
	struct visit *visit;
	struct four four;

	if (!p || !server)
		return TC_ACT_UNSPEC;
	four = *server;
	visit = bpf_map_lookup_elem(&visits, &four);
	if (visit && visit->state == WATCHED && visit->visitor != COMMAND && copy(skb, p, &four, visit, incoming)) {
		count(p, &visit->owner, incoming, bpf_ktime_get_ns());
		bpf_map_delete_elem(&visits, &four);
	}
	return TC_ACT_UNSPEC;
}

SEC("tc")
int ingress(struct __sk_buff *skb)
{
	__u32 mark = skb->mark, ifindex = skb->ifindex, zero = 0, *mode;
	struct sight sight = {};
	struct packet p = {};
	struct flow *flow = NULL, *other;
	struct slot *counters;
	struct pod *settings;
	int replayed = 0, visit = 0, probing = 0, news = 0, tcp, counts, ends, opens;
	__u64 now;

	/* Whoever sets a mark without knowing ours (CAP_NET_RAW suffices for setting) is treated as without it. */
	if (mark && bpf_map_lookup_elem(&replay, &mark)) {
		skb->mark = 0;
		replayed = 1;
	}
	settings = bpf_map_lookup_elem(&pod, &zero);
	if (!settings || skb->pkt_type == PACKET_OTHERHOST || parse(skb, &p, 1))
		return TC_ACT_UNSPEC;
	tcp = p.four.proto == IPPROTO_TCP;
	counts = active(&p);
	ends = tcp && (p.flags & (FIN | RST));
	if (!counts && !ends && !settings->parking)
		return TC_ACT_UNSPEC;

	if (counts || settings->parking)
		sight.owned = own(&p.four, &sight.owner, &flow);
	if (counts && tcp && p.payload == 1 && !(p.flags & SYN) &&
	    keepalive(skb, &p, flow && (flow->flags & STATED), flow ? flow->rcv_nxt : 0)) {
		counts = 0;
		p.payload = 0;
	}
	sight.over_lo = ifindex == LO;
	sight.active = counts;
	sight.commands = settings->commands;
	now = bpf_ktime_get_ns();
	if (counts && sight.over_lo) {
		/* Both ends are the pod's. What one container sends another isn't activity of a third. */
		struct four back = p.four;
		struct owner sender = {};

		turned(&back);
		sight.sent = own(&back, &sender, &other);
		if (tcp)
			note(skb, &back, &p, 0, now);
		visit = tcp && visited(skb, &p, &sight);
		if (sight.sent && !visit)
			count(&p, &sender, 0, now);
	} else if (tcp && (counts || ends)) {
		visit = visited(skb, &p, &sight);
	}
	if (counts) {
		if (tcp)
			news = note(skb, &p.four, &p, 1, now);
		if (!visit && (sight.owned || (news && !sight.sent)))
			count(&p, sight.owned ? &sight.owner : NULL, 1, now);
	}

	mode = sight.owned ? bpf_map_lookup_elem(&modes, &sight.owner.slot) : NULL;
	counters = bpf_map_lookup_elem(&slots, &sight.owner.slot);
	if (!mode || !counters || *mode == PASS)
		goto pass;
	opens = tcp && (p.flags & (SYN | ACK)) == SYN;
	/* With the ports of a connection that sleeps: what follows would be taken for that one's, so it wakes. */
	if (opens && visit && !flow &&
	    (sight.owner.flags & (sight.over_lo ? ANSWERED(LOOPBACK) : ANSWERED(KUBELET)))) {
		int result = hand_over(skb, &p);

		if (result == GIVEN)
			return TC_ACT_UNSPEC;
		probing = result == NOBODY;
		/* Sent again too early. The kernel would refuse it. */
		if (probing && replayed && *mode == ALL) {
			__sync_fetch_and_add(&counters->dropped, 1);
			return TC_ACT_SHOT;
		}
	}
	if (replayed || (*mode == NEW && !opens))
		goto pass;
	if (tcp && !opens) {
		if (!flow)
			goto pass;
		if (!p.payload && !(p.flags & (SYN | FIN | RST))) {
			if (*mode == WAKE)
				return TC_ACT_UNSPEC;
			if ((flow->flags & STATED) && p.seq + 1 == flow->rcv_nxt && !answer(skb, flow)) {
				__sync_fetch_and_add(&counters->answered, 1);
				return bpf_redirect(ifindex, ifindex == LO ? BPF_F_INGRESS : 0);
			}
			__sync_fetch_and_add(&counters->dropped, 1);
			return TC_ACT_SHOT;
		}
	}
	/* The end of a quiet connection has to reach its socket, or the application keeps it for ever. */
	if ((sight.owner.flags & QUIET) && !probing && (!tcp || opens || p.payload)) {
		__sync_fetch_and_add(&counters->quiet, 1);
		return TC_ACT_SHOT;
	}
	return park(skb, &p, sight.owner.slot, counters, probing);
pass:
	return visit ? show(skb, &p, &sight.server, sight.incoming) : TC_ACT_UNSPEC;
}

SEC("tc")
int egress(struct __sk_buff *skb)
{
	struct owner owner = {};
	struct packet p = {};
	struct flow *flow;
	int owned = 0, visit = 0, news = 0, counts, ends;
	__u64 now;

	if (skb->ifindex == LO) { /* counted on the way in */
		__u32 mark = skb->mark;
		__u32 *ifindex = mark ? bpf_map_lookup_elem(&replay, &mark) : NULL;

		return ifindex ? bpf_redirect(*ifindex, BPF_F_INGRESS) : TC_ACT_UNSPEC;
	}
	if (parse(skb, &p, 0))
		return TC_ACT_UNSPEC;
	counts = active(&p);
	ends = p.four.proto == IPPROTO_TCP && (p.flags & (FIN | RST));
	if (!counts && !ends)
		return TC_ACT_UNSPEC;
	if (counts)
		owned = own(&p.four, &owner, &flow);
	if (p.four.proto == IPPROTO_TCP && (owned || !counts))
		visit = bpf_map_lookup_elem(&visits, &p.four) != NULL;
	if (counts) {
		now = bpf_ktime_get_ns();
		if (p.four.proto == IPPROTO_TCP)
			news = note(skb, &p.four, &p, 0, now);
		if (!visit && (owned || news))
			count(&p, owned ? &owner : NULL, 0, now);
	}
	return visit ? show(skb, &p, &p.four, 0) : TC_ACT_UNSPEC;
}
