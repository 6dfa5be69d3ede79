"""The vocabulary of the protocols that callers and model servers speak: operations, error bodies, lists of models.

Pure data and functions of it: no I/O, no clock, no configuration. Scanning of answers is native only.
"""
