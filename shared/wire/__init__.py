"""Formats on the wire: the gRPC protocol and the chunk codec."""
