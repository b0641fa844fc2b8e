"""kubelet's probes: whose connections are kubelet's, what they ask, and the answers in place of what sleeps."""
