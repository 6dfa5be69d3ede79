"""Sockets and TLS: what listens, what processes say to each other, and how peers prove who they are."""
