"""The Dagster half: assets made from the registry of `nbg_core`, jobs, schedule, sensors, and the `nbg` command."""
