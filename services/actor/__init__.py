"""Steps environments; knows neither torch nor NATS."""
