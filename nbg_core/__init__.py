"""The pipeline, from queries to a better student. It knows nothing of Dagster; `assets.py` is the place to start."""
