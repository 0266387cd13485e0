"""NATS: connection, work queue, key-value, weights."""
