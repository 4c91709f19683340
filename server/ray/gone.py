"""What a client is told when the replica that had its request is no more."""

from server.core import GatewayError


class ReplicaGone(GatewayError):
    """The replica ended before its answer did, or none took the request."""
