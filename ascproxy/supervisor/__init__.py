"""The first process: holds the listening sockets, and keeps the wanted children alive. No loop library, thread or TLS.

* :mod:`~ascproxy.supervisor.slots`: the machine of one slot, pure: events in, actions out;
* :mod:`~ascproxy.supervisor.loop`: carries the actions out; signals, mailboxes, deadlines, drain;
* :mod:`~ascproxy.supervisor.reload`: one revision, from the signal to the last worker's answer;
* :mod:`~ascproxy.supervisor.memory`: what all processes use, and the steps that workers take when it runs short;
* :mod:`~ascproxy.supervisor.commands`: what was asked of a child and is not answered yet;
* :mod:`~ascproxy.supervisor.child`: fork, harden, and hand over;
* :mod:`~ascproxy.supervisor.departure`, :mod:`~ascproxy.supervisor.arrival`: the two halves of an upgrade, in the
  program that leaves and in the one that comes; :mod:`~ascproxy.supervisor.rehearsal` is what is tried before;
* :mod:`~ascproxy.supervisor.handover`: what passes from one to the other, and its layout;
* :mod:`~ascproxy.supervisor.predecessors`: workers of a slot that has another process by now;
* :mod:`~ascproxy.supervisor.holdings`: everything that outlives a worker, in one object;
* :mod:`~ascproxy.supervisor.rundir`: the run directory: its lock and the pages.
"""
