/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * What a packet is: its four-tuple as the pod sees it, and what TCP says in it.
 */
#ifndef PACKET_H
#define PACKET_H

#include "pod.h"

struct packet {
	struct four four;
	__u32 payload;
	__u32 data; /* where it begins, from the network header on */
	__u32 seq;
	__u8 flags;
};

#define FIN 0x01
#define SYN 0x02
#define RST 0x04
#define ACK 0x10

/* The same connection from its other end. */
static __always_inline void turned(struct four *four)
{
	struct four back = {.local_port = four->remote_port, .remote_port = four->local_port, .proto = four->proto};

	__builtin_memcpy(back.local, four->remote, 16);
	__builtin_memcpy(back.remote, four->local, 16);
	*four = back;
}

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

/* Where the network header is in the frame. (Payload isn't reached from there by `load`: it may be in other pages.) */
static __always_inline __u32 network_header(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct link *link = bpf_map_lookup_elem(&links, &ifindex);

	return link ? link->header : ETH_HLEN;
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
	if (!end) /* BIG TCP: the length is in the skb alone. On a link without link headers it is some bytes more. */
		end = skb->len - ETH_HLEN;

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
		p->data = headers;
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

#endif
