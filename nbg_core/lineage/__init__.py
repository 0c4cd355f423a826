"""Lineage: the current policy, stale partitions, and the trace from a checkpoint to the rows that trained it."""
