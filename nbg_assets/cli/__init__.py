"""The `nbg` command: run what is stale, see what is there, ask the lake. Commands are grouped by what they are for."""
