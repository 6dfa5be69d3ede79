"""The frozen nouns of ascproxy: what a configuration says once it has been checked. No behaviour, no I/O.

Times are integers of milliseconds (``*_ms``), sizes integers of bytes. Everything is a tuple, a string, a number or
another noun, so that a snapshot can be written as JSON (:mod:`ascproxy.model.snapshot`) and mapped by every worker.
"""
