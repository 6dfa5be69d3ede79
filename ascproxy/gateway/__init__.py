"""The walk of one request: who asks, where it goes, how it is sent, what is answered. Start at ``exchange``."""
