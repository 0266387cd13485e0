"""The NATS server of a local run: an embedded one that is started again when it dies, or the user's own."""
