/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * A keep-alive whose socket sleeps is turned around and becomes the answer that the socket would have given.
 *
 * The checksums are updated, not computed: so they are right whether the packet has one or leaves it to the sender's
 * network card (CHECKSUM_PARTIAL: a peer on the same machine). Swapping addresses and ports doesn't change the sum.
 */
#ifndef ANSWER_H
#define ANSWER_H

#include <stddef.h>

#include "packet.h"

#define TTL 64

/* A field of the TCP header (32 bits, at `offset` from `transport`) gets another value, the checksum goes with it. */
static __always_inline long exchange(struct __sk_buff *skb, __u32 transport, __u32 offset, __be32 before, __be32 after)
{
	if (bpf_l4_csum_replace(skb, transport + offsetof(struct tcphdr, check), before, after, 4))
		return -1;
	return bpf_skb_store_bytes(skb, transport + offset, &after, 4, 0);
}

/* The keep-alive's one byte goes, if it has one. `network`, `transport`: offsets in the frame. */
static __always_inline long cut(struct __sk_buff *skb, __u32 network, __u32 transport, __u32 headers)
{
	__u32 check = transport + offsetof(struct tcphdr, check), version = skb->protocol == bpf_htons(ETH_P_IP) ? 4 : 6;
	__u32 where = network + (version == 4 ? offsetof(struct iphdr, tot_len) : offsetof(struct ipv6hdr, payload_len));
	__u32 fixed = version == 4 ? transport - network : 0; /* tot_len counts the IP header, payload_len doesn't */
	__be16 before, after;
	__u8 byte;

	if (bpf_skb_load_bytes(skb, where, &before, 2))
		return -1;
	if (bpf_ntohs(before) == fixed + headers)
		return 0;
	if (bpf_ntohs(before) != fixed + headers + 1 || bpf_skb_load_bytes(skb, transport + headers, &byte, 1))
		return -1;
	after = bpf_htons(bpf_ntohs(before) - 1);
	if (bpf_l4_csum_replace(skb, check, bpf_htons(byte << 8), 0, 2) ||
	    bpf_l4_csum_replace(skb, check, bpf_htons(headers + 1), bpf_htons(headers), BPF_F_PSEUDO_HDR | 2))
		return -1;
	if (version == 4 && bpf_l3_csum_replace(skb, network + offsetof(struct iphdr, check), before, after, 2))
		return -1;
	if (bpf_skb_store_bytes(skb, where, &after, 2, version == 4 ? 0 : BPF_F_RECOMPUTE_CSUM))
		return -1;
	return bpf_skb_change_tail(skb, transport + headers, 0);
}

/* From the IP header on. Returns the transport header's offset in the frame, 0: not one that can be turned around. */
static __always_inline __u32 turn(struct __sk_buff *skb, __u32 network)
{
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr ip;
		__be32 addresses[2];
		__be16 before, after;

		if (bpf_skb_load_bytes(skb, network, &ip, sizeof(ip)) || ip.ihl != 5)
			return 0;
		addresses[0] = ip.daddr;
		addresses[1] = ip.saddr;
		before = bpf_htons(ip.ttl << 8 | ip.protocol);
		after = bpf_htons(TTL << 8 | ip.protocol);
		if (bpf_skb_store_bytes(skb, network + offsetof(struct iphdr, saddr), addresses, 8, 0) ||
		    bpf_l3_csum_replace(skb, network + offsetof(struct iphdr, check), before, after, 2) ||
		    bpf_skb_store_bytes(skb, network + offsetof(struct iphdr, ttl), &after, 2, 0))
			return 0;
		return network + sizeof(ip);
	}
	struct ipv6hdr ip;
	struct in6_addr addresses[2];
	__u8 hops = TTL;

	if (bpf_skb_load_bytes(skb, network, &ip, sizeof(ip)) || ip.nexthdr != IPPROTO_TCP)
		return 0;
	addresses[0] = ip.daddr;
	addresses[1] = ip.saddr;
	if (bpf_skb_store_bytes(skb, network + offsetof(struct ipv6hdr, saddr), addresses, 32, 0) ||
	    bpf_skb_store_bytes(skb, network + offsetof(struct ipv6hdr, hop_limit), &hops, 1, BPF_F_RECOMPUTE_CSUM))
		return 0;
	return network + sizeof(ip);
}

/* 0: the packet is the answer now, and has to go back where it came from. Else it has to be dropped. */
__noinline int answer(struct __sk_buff *skb, const struct flow *flow)
{
	__u32 ifindex = skb->ifindex, transport, network;
	struct link *link = bpf_map_lookup_elem(&links, &ifindex);
	__be32 words[8], window;
	__be16 ports[2];
	__u8 addresses[12];

	if (!link || !flow)
		return -1;
	network = link->header;
	if (network == ETH_HLEN) {
		__u8 swapped[12];

		if (bpf_skb_load_bytes(skb, 0, addresses, 12))
			return -1;
		__builtin_memcpy(swapped, addresses + 6, 6);
		__builtin_memcpy(swapped + 6, addresses, 6);
		if (bpf_skb_store_bytes(skb, 0, swapped, 12, 0))
			return -1;
	}
	transport = turn(skb, network);
	if (!transport || bpf_skb_load_bytes(skb, transport, words, 20))
		return -1;

	/* Ports, seq, ack, then: header length, flags, window. Options: none, or timestamps as everybody sends them. */
	if ((words[3] & bpf_htonl(0xf0000000)) == bpf_htonl(0x80000000)) {
		if (!(flow->flags & TIMESTAMPS) || bpf_skb_load_bytes(skb, transport + 20, &words[5], 12) ||
		    words[5] != bpf_htonl(0x0101080a))
			return -1;
		if (exchange(skb, transport, 24, words[6], bpf_htonl(flow->tsval)) ||
		    exchange(skb, transport, 28, words[7], words[6]) || cut(skb, network, transport, 32))
			return -1;
	} else if ((words[3] & bpf_htonl(0xf0000000)) == bpf_htonl(0x50000000)) {
		if (cut(skb, network, transport, 20))
			return -1;
	} else {
		return -1;
	}
	ports[0] = bpf_htons(bpf_ntohl(words[0]) & 0xffff);
	ports[1] = bpf_htons(bpf_ntohl(words[0]) >> 16);
	window = (words[3] & bpf_htonl(0xf0000000)) | bpf_htonl(ACK << 16 | (flow->window & 0xffff));
	if (bpf_skb_store_bytes(skb, transport, ports, 4, 0) ||
	    exchange(skb, transport, 4, words[1], bpf_htonl(flow->snd_nxt)) ||
	    exchange(skb, transport, 8, words[2], bpf_htonl(flow->rcv_nxt)) ||
	    exchange(skb, transport, 12, words[3], window))
		return -1;
	return 0;
}

#endif
