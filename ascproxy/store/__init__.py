"""What a node keeps for good: one LMDB environment below the state directory, written by control alone."""
