"""ascproxy: a self-hosted AI control plane; an HTTPS proxy between applications and model servers.

The rooms and their floors are listed in ``docs/architecture.md``; start reading at ``ascproxy/gateway/exchange.py``,
the walk of one request.
"""

__version__ = "0.1.0"
