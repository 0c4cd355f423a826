"""The `nbg` command. `runs.py` has the commands that run the pipeline, `show.py` those that show what exists, `sql.py`
the query command, `maintenance.py` those that change the lake."""
