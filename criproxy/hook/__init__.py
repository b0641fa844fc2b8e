"""The hook in a pod's network: parked packets, and a container's share of it."""
