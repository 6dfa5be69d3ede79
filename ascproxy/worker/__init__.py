"""A worker: one event loop on the data path.

* :mod:`~ascproxy.worker.process`: its life, from the fork to the drain;
* :mod:`~ascproxy.worker.datapath`: what it serves with, composed for real;
* :mod:`~ascproxy.worker.accesslog`: where access lines go.
"""
