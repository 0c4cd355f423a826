"""`teacher_logits`: the teacher's distribution at every position of every response in a pair."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from nbg_core.base.ids import content_version, model_id
from nbg_core.base.progress import CommitBuffer
from nbg_core.config import identity
from nbg_core.lake.queries import samples_of_pairs, scored_samples
from nbg_core.lake.records import Write
from nbg_core.lineage.run import Report, Run
from nbg_core.modeling.loading import check_same_tokenizer
from nbg_core.teacher.engine import open_engine

ASSET = "teacher_logits"


@dataclass(frozen=True, kw_only=True)
class TeacherReport(Report):
    teacher_model_id: str
    storage_id: str
    """Id of the settings that the rows are stored with."""


def materialise(run: Run, slice_name: str) -> TeacherReport:
    """Score the responses that have no row for this teacher and these settings yet. Rows are committed after each
    chunk, and within a chunk every 30 seconds.

    Raises ValueError when the teacher has another tokenizer than the student."""
    path = run.profile.resolve(run.profile.models.teacher)
    check_same_tokenizer(run.policy.path, path, trust_remote_code=run.profile.models.trust_remote_code)
    teacher, storage_id = model_id(path), identity.storage_id(run.profile)
    snapshot, inputs = run.read_upstream(ASSET, slice_name)
    wanted = samples_of_pairs(run.lake, slice_name, snapshot)
    done = scored_samples(run.lake, ASSET, teacher, storage_id, wanted["sample_id"].to_list())
    missing = wanted.join(done, on="sample_id", how="anti", maintain_order="left")
    run.log(f"{ASSET}[{slice_name}]: {wanted.height - missing.height} of {wanted.height} responses already scored")
    new_rows = _score_missing(run, slice_name, missing, inputs, path, teacher, storage_id)
    version = content_version([f"{s}:{teacher}:{storage_id}" for s in wanted["sample_id"]])
    commit = run.commit(ASSET, slice_name, inputs=inputs, data_version=version)
    return TeacherReport.of(
        commit, ASSET, slice_name, version, rows=wanted.height, new_rows=new_rows, teacher_model_id=teacher,
        storage_id=storage_id,
    )  # fmt: skip


def _score_missing(
    run: Run, slice_name: str, missing: pl.DataFrame, inputs, path, teacher: str, storage_id: str
) -> int:
    if missing.is_empty():
        return 0

    def commit(frames: list[pl.DataFrame]) -> int:
        rows = pl.concat(frames).with_columns(
            pl.lit(slice_name).alias("slice"),
            pl.lit(teacher).alias("model_id"),
            pl.lit(storage_id).alias("settings_id"),
        )
        return run.commit(ASSET, slice_name, [Write(ASSET, rows, as_file=True)], inputs=inputs).n_rows

    with open_engine(run, path) as rows_of, CommitBuffer(commit) as buffer:
        progress = run.progress(f"{ASSET}[{slice_name}]", missing.height)
        for chunk in missing.iter_slices(run.profile.teacher.chunk_samples):
            for frame in rows_of(chunk):
                buffer.add(frame)
                progress.advance(frame.height)
            buffer.flush()
    return buffer.new_rows
