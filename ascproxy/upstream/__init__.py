"""Connections to model servers: which endpoint, from which pool, made how. Knows nothing of requests."""
