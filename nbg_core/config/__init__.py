"""The profile: what can be set, how it is read from a file, and what of it enters which id.

`from nbg_core.config import load_profile` is public."""

from nbg_core.config.load import load_profile

__all__ = ["load_profile"]
