"""The lake: DuckLake tables that change only together with their lineage.

`from nbg_core.lake import Lake` is public."""

from nbg_core.lake.lake import Lake

__all__ = ["Lake"]
