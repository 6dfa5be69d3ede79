"""The first process: holds the listening sockets, and keeps the wanted children alive. No loop library, thread or TLS.

* :mod:`~ascproxy.supervisor.slots`: the machine of one slot, pure: events in, actions out;
* :mod:`~ascproxy.supervisor.loop`: carries the actions out; signals, mailboxes, deadlines, drain;
* :mod:`~ascproxy.supervisor.reload`: one revision, from the signal to the last worker's answer;
* :mod:`~ascproxy.supervisor.memory`: what all processes use, and the steps that workers take when it runs short;
* :mod:`~ascproxy.supervisor.commands`: what was asked of a child and is not answered yet;
* :mod:`~ascproxy.supervisor.child`: fork, harden, and hand over;
* :mod:`~ascproxy.supervisor.holdings`: everything that outlives a worker, in one object;
* :mod:`~ascproxy.supervisor.rundir`: the run directory: its lock and the pages;
* :mod:`~ascproxy.supervisor.notify`: what the service manager is told.
"""
