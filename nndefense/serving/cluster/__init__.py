"""The service on Ray: a door that takes requests, replicas that answer them, and how both are deployed."""

from nndefense.serving.cluster.deployment import serve
from nndefense.serving.cluster.door import Door
from nndefense.serving.cluster.replica import Replica, ReplicaBoard, ReplicaSpec

__all__ = ["Door", "Replica", "ReplicaBoard", "ReplicaSpec", "serve"]
