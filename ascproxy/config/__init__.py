"""From two YAML files to a snapshot: load (text and shape), check (what shape cannot say), compile, diff.

``document`` knows where every value was written, ``schema`` which keys there are, ``check`` which files, references and
addresses make sense together, ``compile`` turns checked files into :class:`ascproxy.model.snapshot.Snapshot`, ``diff``
tells what a reload can apply, ``running`` where the service of a configuration is. Nothing here is imported by workers:
they get the snapshot's bytes.
"""
