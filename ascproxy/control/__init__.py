"""Control: loads configuration, serves metrics, health and the local management socket, writes the store.

* :mod:`~ascproxy.control.process`: its life and its mailbox;
* :mod:`~ascproxy.control.app`: what it answers over HTTP;
* :mod:`~ascproxy.control.node`: the state of this node, read from pages.
"""
