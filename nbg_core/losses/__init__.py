"""The joint loss and its parts: pure functions of tensors that do not depend on profiles, models or the lake."""
