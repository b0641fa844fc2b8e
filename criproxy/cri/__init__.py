"""kubelet's calls: carried on to containerd, and those that are looked into or rewritten."""
