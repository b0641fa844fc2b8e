// clang -O2 -g -target bpf -Wall -I/usr/include/$(uname -m)-linux-gnu -c bpf/kubelet.c -o criproxy/libexec/kubelet.bpf.o
// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * `opening` sits on kubelet's cgroup (sock_ops) and knows each TCP connection that a process in there opens: from before
 * its SYN leaves until it is closed. Its entry is what the hook in a pod knows kubelet by.
 *
 * What it guarantees:
 *  - An entry is a connection that was opened from inside the cgroup. Nobody else can make one, and when it is closed,
 *    the entry is gone: the same addresses and ports in somebody else's hands mean nothing.
 *  - It changes nothing of a connection, and no answer of another program on the cgroup.
 *
 * The addresses are those of the socket: where the way to the pod rewrites them, kubelet isn't known, and its probes
 * count as anybody's connection.
 */
#include "kubelet.h"

char LICENSE[] SEC("license") = "GPL";

SEC("sockops")
int opening(struct bpf_sock_ops *socket)
{
	struct four four = {.proto = IPPROTO_TCP};
	__u64 now;

	if (socket->op != BPF_SOCK_OPS_TCP_CONNECT_CB &&
	    !(socket->op == BPF_SOCK_OPS_STATE_CB && socket->args[1] == BPF_TCP_CLOSE))
		return 1;
	if (socket->family == AF_INET) {
		four.local[2] = four.remote[2] = bpf_htonl(0xffff);
		four.local[3] = socket->remote_ip4;
		four.remote[3] = socket->local_ip4;
	} else if (socket->family == AF_INET6) { /* an IPv4 address in an IPv6 socket is mapped already */
		for (int i = 0; i < 4; i++) {
			four.local[i] = socket->remote_ip6[i];
			four.remote[i] = socket->local_ip6[i];
		}
	} else {
		return 1;
	}
	four.local_port = bpf_htons(bpf_ntohl(socket->remote_port));
	four.remote_port = bpf_htons(socket->local_port);
	if (socket->op == BPF_SOCK_OPS_STATE_CB) {
		bpf_map_delete_elem(&connections, &four);
		return 1;
	}
	now = bpf_ktime_get_ns();
	bpf_map_update_elem(&connections, &four, &now, BPF_ANY);
	bpf_sock_ops_cb_flags_set(socket, socket->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	return 1;
}
