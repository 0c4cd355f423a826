"""The joint loss and its parts: pure functions of tensors, which know nothing of profiles, models or the lake."""
