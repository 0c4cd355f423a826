"""The profile: its settings, how it is read from a file, and which settings each id is made of.

`from nbg_core.config import load_profile` is public."""

from nbg_core.config.load import load_profile

__all__ = ["load_profile"]
