"""The Dagster side of the project: assets made from the registry in `nbg_core.assets`, jobs, a schedule, sensors, and
the `nbg` command."""
