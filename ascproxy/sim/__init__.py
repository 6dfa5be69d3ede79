"""The bundled model-server simulator, ``ascproxy sim``: vLLM's and TGI's wire without a model.

A request walks down these modules: ``server`` (connections, bytes) reads a ``request``, asks the dialect (``vllm`` or
``tgi``) for an ``answer``, lets ``failure`` spoil it on purpose, and writes it at the wanted token rate. ``recording``
answers with recorded bytes instead.

It runs on the package's runtime dependencies alone and reads requests itself, because tests want exact bytes and
deliberate damage, which a real HTTP server refuses to produce. It is no part of the gateway and shares no code with
it: a bug in the gateway's parsers must not be repeated here.
"""
