"""A simulated Kubernetes, agents that run pods as processes, and jobs on either this or a real cluster."""
