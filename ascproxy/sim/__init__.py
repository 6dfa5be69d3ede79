"""The bundled model-server simulator, ``ascproxy sim``: vLLM's and TGI's wire without a model.

A request walks down these modules: ``connection`` reads a ``request``; ``server`` asks the dialect (``vllm``, ``tgi``)
for an ``answer`` and lets ``failure`` spoil it on purpose, or takes recorded bytes from ``recording``; ``connection``
writes them at the wanted token rate.

It runs on the package's runtime dependencies alone and reads requests itself, because tests want exact bytes and
deliberate damage, which a real HTTP server refuses to produce. It is no part of the gateway and shares no code with
it: a bug in the gateway's parsers must not be repeated here.
"""
