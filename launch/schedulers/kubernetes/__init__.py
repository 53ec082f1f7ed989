"""Kubernetes: pure rendering and validation of jobs, and the API calls of the launcher."""
