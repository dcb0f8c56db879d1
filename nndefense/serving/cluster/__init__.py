"""The service on Ray: a door that takes requests, replicas that answer them, and how both are deployed."""

from nndefense.serving.cluster.deployment import serve

__all__ = ["serve"]
