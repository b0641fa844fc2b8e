"""What the kernel offers: eBPF, cgroups, namespaces, netlink, processes, sockets."""
