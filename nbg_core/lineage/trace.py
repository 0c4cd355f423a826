"""Trace an id to the queries, samples, pairs and checkpoints connected to it."""

from __future__ import annotations

import polars as pl

from nbg_core.lake.lake import Lake
from nbg_core.lake.queries import only_one
from nbg_core.lake.tables import TABLES


def trace(lake: Lake, start: str) -> dict[str, pl.DataFrame]:
    """The rows connected to an id: what it was made from, and what was made from it.

    `start` is a checkpoint, training, pair, sample or query id, or the beginning of one. Returns frames by table name:
    queries, samples, pairs, checkpoints. Pairs and queries that have been replaced are included, in their last version;
    for a checkpoint, in the version at the time of its training. Raises LookupError for an unknown id, and for a
    beginning that several ids share."""
    whole = whole_id(lake, start)
    checkpoints = lake.sql(
        "SELECT * FROM checkpoints WHERE checkpoint_id = $1 OR training_id = $1 ORDER BY snapshot_id", [whole]
    )
    if checkpoints.height:
        pairs = _ever(
            lake, "pairs", "pair_id IN (SELECT pair_id FROM checkpoint_pairs WHERE training_id = ?)",
            checkpoints["training_id"][-1], snapshot=checkpoints["input_snapshot"][-1],
        )  # fmt: skip
    else:
        pairs = _ever(lake, "pairs", "? IN (pair_id, chosen_id, rejected_id, query_id)", whole)
        checkpoints = lake.sql(
            "SELECT * FROM checkpoints WHERE training_id IN (SELECT training_id FROM checkpoint_pairs "
            "WHERE pair_id IN (SELECT unnest(?::VARCHAR[]))) ORDER BY snapshot_id",
            [pairs["pair_id"].to_list()],
        )
    members = pairs["chosen_id"].to_list() + pairs["rejected_id"].to_list()
    samples = lake.sql(
        "SELECT * FROM samples WHERE sample_id IN (SELECT unnest(?::VARCHAR[])) OR ? IN (sample_id, query_id) "
        "ORDER BY sample_id",
        [members, whole],
    )
    queries = _ever(
        lake, "queries", "query_id IN (SELECT unnest(?::VARCHAR[]))", [whole, *samples["query_id"], *pairs["query_id"]]
    )
    return {"queries": queries, "samples": samples, "pairs": pairs, "checkpoints": checkpoints}


def whole_id(lake: Lake, start: str) -> str:
    """The only id that starts with `start`. Raises LookupError when there is none, or more than one."""
    columns = ("checkpoints.checkpoint_id", "checkpoints.training_id", "checkpoint_pairs.pair_id", "pairs.pair_id",
               "samples.sample_id", "samples.query_id", "queries.query_id")  # fmt: skip
    ids = " UNION ".join(f"SELECT {c} AS id FROM {c.partition('.')[0]}" for c in columns)
    found = lake.sql(f"SELECT id FROM ({ids}) WHERE starts_with(id, ?) ORDER BY id", [start])["id"].to_list()
    return only_one(start, found, "checkpoint, pair, sample or query")


def _ever(lake: Lake, table: str, condition: str, param: object, snapshot: int | None = None) -> pl.DataFrame:
    """Rows that meet `condition` among all that a table ever had, deleted ones included: each in its last version up to
    `snapshot` (default: the newest), ordered by primary key. `param` is the condition's parameter."""
    key, last = TABLES[table].primary_key()[0], lake.snapshot() if snapshot is None else snapshot
    return lake.sql(
        f"SELECT * FROM ducklake_table_insertions('lake', 'main', '{table}', 0, {last}) WHERE {condition} "
        f"QUALIFY row_number() OVER (PARTITION BY {key} ORDER BY snapshot_id DESC) = 1 ORDER BY {key}",
        [param],
    )
