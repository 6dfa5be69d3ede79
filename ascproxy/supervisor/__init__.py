"""The first process: holds the listening sockets, and keeps the wanted children alive. No loop library, thread or TLS.

* :mod:`~ascproxy.supervisor.slots`: the machine of one slot, pure: events in, actions out;
* :mod:`~ascproxy.supervisor.loop`: carries the actions out; signals, mailboxes, deadlines, reload, drain;
* :mod:`~ascproxy.supervisor.child`: fork, harden, and hand over;
* :mod:`~ascproxy.supervisor.rundir`: the run directory: its lock and the pages;
* :mod:`~ascproxy.supervisor.notify`: what the service manager is told.
"""
