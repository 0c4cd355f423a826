"""What made what: settings and inputs of every asset, staleness, tracing, and the current policy.

A partition is *fresh* when it has a complete materialisation made with today's settings from its upstreams' present
content. Content is compared by data version (a digest of ids), so an upstream that ran again without changing
anything makes nothing stale.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from nbg_core.config import Profile
from nbg_core.ids import digest, model_id
from nbg_core.lake import CODE_VERSION, Input, Lake
from nbg_core.schemas import TABLES

UPSTREAM: dict[str, tuple[str, ...]] = {
    "queries": (),
    "student_samples": ("queries",),
    "filtered_pairs": ("queries", "student_samples"),
    "teacher_logits": ("filtered_pairs",),
    "reference_logprobs": ("filtered_pairs",),
    "student_checkpoint": ("filtered_pairs", "teacher_logits", "reference_logprobs"),
    "student_eval": ("queries", "student_checkpoint"),
}
"""The asset graph, in an order that respects it."""

UNPARTITIONED = ("student_checkpoint", "student_eval")


@dataclass(frozen=True)
class Policy:
    """The model that samples and that training starts from."""

    model_id: str
    path: Path
    promoted: bool


SFT = "sft"
"""In the place of a path in `promotions`: the profile's student."""


def current_policy(lake: Lake, profile: Profile) -> Policy:
    """The newest promoted checkpoint; the profile's student before the first promotion, or when SFT was promoted.

    Raises FileNotFoundError when its folder is gone."""
    rows = lake.sql("SELECT model_id, path FROM promotions ORDER BY promoted_at DESC LIMIT 1")
    if rows.is_empty() or rows["path"].item() == SFT:
        path = profile.resolve(profile.models.student)
        return Policy(model_id(path), path, False)
    row = rows.row(0, named=True)
    path = profile.resolve(profile.paths.checkpoints) / row["path"]
    if model_id(path) != row["model_id"]:
        raise ValueError(
            f"the promoted model at {path} is not {row['model_id']} any more; restore it or promote another"
        )
    return Policy(row["model_id"], path, True)


def slices(profile: Profile) -> list[str]:
    """The slices: names of the query files that can be slices, sorted."""
    return find_slices(profile)[0]


def find_slices(profile: Profile) -> tuple[list[str], dict[str, str]]:
    """Names of the query files that can be slices, sorted, and the reason for each name that cannot."""
    folder = profile.resolve(profile.paths.queries)
    good, refused = [], {}
    for name in sorted({p.stem for p in folder.glob("*") if p.suffix in (".jsonl", ".parquet") and p.is_file()}):
        try:
            check_slice_name(name)
            good.append(name)
        except ValueError as e:
            refused[name] = str(e)
    return good, refused


def check_slice_name(name: str) -> None:
    """Raises ValueError, with the reason, for a name that cannot be a partition key and a file name."""
    reason = None
    if not name.strip():
        reason = "it is empty"
    elif "..." in name:
        reason = "it holds '...', which separates the ends of a partition range"
    elif name.startswith("."):
        reason = "it starts with '.', as hidden files do"
    elif "/" in name or "\\" in name:
        reason = "it holds a path separator"
    elif not name.isprintable() or name != name.strip():
        reason = "it holds control characters (such as tab or newline), or spaces at an end"
    elif len(name.encode()) > 200:
        reason = "it is longer than 200 bytes"
    if reason:
        raise ValueError(f"{name!r} cannot be a slice: {reason}; rename the query file, e.g. to 'addition.jsonl'")


def settings_of(asset: str, profile: Profile, policy: Policy, slice: str | None) -> dict:
    """The settings that decide an asset's content; a change in any makes it stale.

    Raises FileNotFoundError for a missing query file or model folder."""

    def teacher() -> str:
        return model_id(profile.resolve(profile.models.teacher))

    match asset:
        case "queries":
            file = query_file(profile, slice)
            stat = digest("file", file.name, file.read_bytes().hex() if file.stat().st_size < 1 << 24 else
                          [file.stat().st_size, file.stat().st_mtime_ns])  # fmt: skip
            longest = max(profile.sampling.max_tokens, profile.evaluation.max_tokens)  # must fit behind the prompt
            student = model_id(profile.resolve(profile.models.student))  # its tokenizer counts the prompt's tokens
            return {**profile.queries.model_dump(), "file": stat, "max_tokens": longest, "student": student}
        case "student_samples":
            s = profile.sampling
            return {"sampling_id": profile.sampling_id(), "n_student": s.n_student, "n_teacher": s.n_teacher,
                    "student": policy.model_id, "teacher": teacher() if s.n_teacher else None}  # fmt: skip
        case "filtered_pairs":
            p = profile.preference
            uses_teacher = bool(p.weights.get("teacher_loglik"))
            scores = {"teacher": teacher(), "scoring_id": profile.scoring_id()} if uses_teacher else {"teacher": None}
            return {**p.model_dump(), **scores}
        case "teacher_logits":
            return {"storage_id": profile.storage_id(), "teacher": teacher()}
        case "reference_logprobs":
            return {"reference": policy.model_id, "scoring_id": profile.scoring_id()}
        case "student_checkpoint":
            return {
                **profile.training.deciding(),
                "initial": policy.model_id,
                "teacher": teacher(),
                "storage_id": profile.storage_id(),
            }
        case "student_eval":
            return {"answering_id": profile.answering_id(), "teacher": teacher()}
    raise KeyError(asset)


def settings_id(settings: dict) -> str:
    return digest("settings", json.loads(json.dumps(settings, default=str)))


def query_file(profile: Profile, slice: str) -> Path:
    """The file of a slice. Raises FileNotFoundError naming the folder and the slices that exist."""
    folder = profile.resolve(profile.paths.queries)
    for suffix in (".jsonl", ".parquet"):
        if (path := folder / f"{slice}{suffix}").is_file():
            return path
    known = ", ".join(slices(profile)) or "none"
    raise FileNotFoundError(f"no {slice}.jsonl or {slice}.parquet in {folder}; slices there: {known}")


def latest(lake: Lake, asset: str, slice: str | None, snapshot: int | None = None) -> dict | None:
    """The newest complete materialisation of a partition (as of `snapshot`), with its snapshot id, or None."""
    rows = lake.sql(
        "SELECT * FROM lineage.commits WHERE asset = ? AND slice IS NOT DISTINCT FROM ? AND status = 'complete' "
        "AND snapshot_id <= coalesce(?, snapshot_id) ORDER BY snapshot_id DESC LIMIT 1",
        [asset, slice, snapshot],
    )
    return None if rows.is_empty() else rows.row(0, named=True)


def input_of(lake: Lake, asset: str, slice: str | None, snapshot: int) -> Input:
    """The input record for reading a partition at `snapshot`. Raises LookupError if it was not materialised by then."""
    row = latest(lake, asset, slice, snapshot)
    if row is None:
        where = asset + (f"[{slice}]" if slice else "")
        raise LookupError(f"{where} has not been materialised; materialise it first (nbg run, or the UI)")
    return Input(asset, slice, row["data_version"], snapshot)


@dataclass(frozen=True)
class Status:
    """Whether a partition is up to date; `why` is empty when fresh."""

    asset: str
    slice: str | None
    state: str  # 'fresh', 'stale' or 'missing'
    why: str


def status(lake: Lake, profile: Profile, which: Sequence[str] | None = None) -> list[Status]:
    """The state of every partition, in an order in which they can be materialised.

    `which` limits the slices that are shown. What reads all slices is held to all of them, and a partition below a
    stale one is stale too. A query file that is broken today shows as stale `queries`; the error itself comes when it
    is materialised. Raises FileNotFoundError for a slice without a file."""
    for name in which or ():
        query_file(profile, name)
    policy = current_policy(lake, profile)
    rows = lake.sql(
        "SELECT asset, slice, data_version, settings_id, inputs, code_version FROM lineage.commits "
        "WHERE status = 'complete' QUALIFY row_number() OVER (PARTITION BY asset, slice ORDER BY snapshot_id DESC) = 1"
    )
    done = {(r["asset"], r["slice"]): r for r in rows.iter_rows(named=True)}
    names = slices(profile)
    result: dict[tuple[str, str | None], Status] = {}
    for asset, upstream in UPSTREAM.items():
        for slice in [None] if asset in UNPARTITIONED else names:
            inputs = [
                (a, s)
                for a in upstream
                for s in ([None] if a in UNPARTITIONED else names if slice is None else [slice])
            ]
            wanted = settings_id(settings_of(asset, profile, policy, slice))
            state, why = _state(done.get((asset, slice)), inputs, done, result, wanted)
            result[asset, slice] = Status(asset, slice, state, why)
    return [s for s in result.values() if which is None or s.slice is None or s.slice in which]


def _state(row: dict | None, inputs: list, done: dict, result: dict, wanted: str) -> tuple[str, str]:
    if row is None:
        return "missing", "never materialised"
    if row["code_version"] != CODE_VERSION:
        return "stale", "made by another version of the code"
    if row["settings_id"] != wanted:
        return "stale", "settings, policy or file changed"
    read = {(i["asset"], i["slice"]): i["data_version"] for i in json.loads(row["inputs"])}
    for key in inputs:
        name = key[0] + (f"[{key[1]}]" if key[1] else "")
        if key not in read:
            return "stale", f"{name} is new"
        if key in result and result[key].state != "fresh":
            return "stale", f"{name} is {result[key].state}"
        if key in done and done[key]["data_version"] != read[key]:
            return "stale", f"{name} changed"
    gone = [k for k in read if k not in inputs]
    if gone:
        return "stale", f"{gone[0][0]}[{gone[0][1]}] is gone"
    return "fresh", ""


def trace(lake: Lake, id: str) -> dict[str, pl.DataFrame]:
    """Everything connected to an id, up and down: a checkpoint, training, pair, sample or query id, or its beginning.

    Returns frames by name: queries, samples, pairs, checkpoints. Pairs and queries that were replaced since are found
    too, as they last were; those of a checkpoint as they were when it was trained. Raises LookupError for an unknown
    id, and for a beginning that several ids share."""
    id = whole_id(lake, id)
    checkpoints = lake.sql("SELECT * FROM checkpoints WHERE checkpoint_id = $1 OR training_id = $1", [id])
    if checkpoints.height:
        pairs = _ever(
            lake, "pairs", "pair_id IN (SELECT pair_id FROM checkpoint_pairs WHERE training_id = ?)",
            checkpoints["training_id"][-1], snapshot=checkpoints["input_snapshot"][-1],
        )  # fmt: skip
    else:
        pairs = _ever(lake, "pairs", "? IN (pair_id, chosen_id, rejected_id, query_id)", id)
        checkpoints = lake.sql(
            "SELECT * FROM checkpoints WHERE training_id IN (SELECT training_id FROM checkpoint_pairs "
            "WHERE pair_id IN (SELECT unnest(?::VARCHAR[]))) ORDER BY created_at",
            [pairs["pair_id"].to_list()],
        )
    members = pairs["chosen_id"].to_list() + pairs["rejected_id"].to_list()
    samples = lake.sql(
        "SELECT * FROM samples WHERE sample_id IN (SELECT unnest(?::VARCHAR[])) OR ? IN (sample_id, query_id) "
        "ORDER BY sample_id",
        [members, id],
    )
    queries = _ever(
        lake, "queries", "query_id IN (SELECT unnest(?::VARCHAR[]))", [id, *samples["query_id"], *pairs["query_id"]]
    )
    return {"queries": queries, "samples": samples, "pairs": pairs, "checkpoints": checkpoints}


def whole_id(lake: Lake, start: str) -> str:
    """The only id that starts with `start`. Raises LookupError when there is none, or more than one."""
    columns = ("checkpoints.checkpoint_id", "checkpoints.training_id", "checkpoint_pairs.pair_id", "pairs.pair_id",
               "samples.sample_id", "samples.query_id", "queries.query_id")  # fmt: skip
    ids = " UNION ".join(f"SELECT {c} AS id FROM {c.partition('.')[0]}" for c in columns)
    found = lake.sql(f"SELECT id FROM ({ids}) WHERE starts_with(id, ?) ORDER BY id", [start])["id"].to_list()
    return only_one(start, found, "checkpoint, pair, sample or query")


def only_one(start: str, found: Sequence[str], what: str) -> str:
    """`start` if it is in `found`, else the only one in it. Raises LookupError naming `what` was looked for."""
    if not start or not found:
        raise LookupError(f"no {what} has an id that starts with {start!r}" if start else f"give the id of a {what}")
    if start not in found and len(found) > 1:
        raise LookupError(
            f"{start!r} is the beginning of {len(found)} ids, {found[0]} and {found[1]} among them; give more of it"
        )
    return start if start in found else found[0]


def _ever(lake: Lake, table: str, condition: str, param: object, snapshot: int | None = None) -> pl.DataFrame:
    """The newest version of each row that a table had until `snapshot`, rows deleted since included, by primary key."""
    key, newest = TABLES[table].primary_key()[0], lake.snapshot() if snapshot is None else snapshot
    return lake.sql(
        f"SELECT * FROM ducklake_table_insertions('lake', 'main', '{table}', 0, {newest}) WHERE {condition} "
        f"QUALIFY row_number() OVER (PARTITION BY {key} ORDER BY snapshot_id DESC) = 1 ORDER BY {key}",
        [param],
    )
