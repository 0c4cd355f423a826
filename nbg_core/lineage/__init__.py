"""What made what: the current policy, what is stale, and the way from a checkpoint to the rows that trained it."""
