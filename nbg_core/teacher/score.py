"""`teacher_logits`: the teacher's distribution at every position of every response in a pair."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import polars as pl
import torch

from nbg_core.config import Profile, TeacherSettings
from nbg_core.ids import content_version, model_id
from nbg_core.lake import Write
from nbg_core.models import check_same_tokenizer
from nbg_core.run import Finished, Run
from nbg_core.teacher.forward import Scorer, response_logprobs, samples_of_pairs
from nbg_core.teacher.store import compress

ASSET = "teacher_logits"


def materialise(run: Run, slice: str) -> dict:
    """Score the responses that have no row for this teacher and these settings yet; a chunk per commit.

    Raises ValueError when the teacher has another tokenizer than the student."""
    path = run.profile.resolve(run.profile.models.teacher)
    check_same_tokenizer(run.policy.path, path, trust_remote_code=run.profile.models.trust_remote_code)
    teacher, storage = model_id(path), run.profile.storage_id()
    snapshot, inputs = run.read("filtered_pairs", slice=slice)
    wanted = samples_of_pairs(run, slice, snapshot)
    done = run.lake.sql(
        "SELECT sample_id FROM teacher_logits WHERE model_id = ? AND settings_id = ? "
        "AND sample_id IN (SELECT unnest(?::VARCHAR[]))",
        [teacher, storage, wanted["sample_id"].to_list()],
    )
    missing = wanted.join(done, on="sample_id", how="anti", maintain_order="left")
    run.log(f"{ASSET}[{slice}]: {wanted.height - missing.height} of {wanted.height} responses already scored")
    new_rows = _score_missing(run, slice, missing, inputs, path, teacher, storage)
    version = content_version([f"{s}:{teacher}:{storage}" for s in wanted["sample_id"]])
    commit = run.commit(ASSET, slice, inputs=inputs, data_version=version)
    return {
        "asset": ASSET, "slice": slice, "snapshot": commit.snapshot, "data_version": version, "rows": wanted.height,
        "new_rows": new_rows, "teacher_model_id": teacher, "storage_id": storage,
    }  # fmt: skip


def _score_missing(run: Run, slice: str, missing: pl.DataFrame, inputs, path, teacher: str, storage: str) -> int:
    if missing.is_empty():
        return 0

    def commit(frames: list[pl.DataFrame]) -> int:
        rows = pl.concat(frames).with_columns(
            pl.lit(slice).alias("slice"), pl.lit(teacher).alias("model_id"), pl.lit(storage).alias("settings_id")
        )
        return run.commit(ASSET, slice, [Write(ASSET, rows, as_file=True)], inputs=inputs).n_rows

    with open_engine(run, path) as rows_of, Finished(commit) as finished:
        progress = run.progress(f"{ASSET}[{slice}]", missing.height)
        for chunk in missing.iter_slices(run.profile.teacher.chunk_samples):
            for frame in rows_of(chunk):
                finished.add(frame)
                progress.advance(frame.height)
            finished.flush()
    return finished.new_rows


@contextmanager
def open_engine(run: Run, path: Path) -> Iterator[Callable[[pl.DataFrame], Iterator[pl.DataFrame]]]:
    """The profile's engine with the teacher at `path`: what makes frames of teacher_logits columns of `samples`."""
    if run.profile.teacher.engine == "vllm":
        from nbg_core.teacher.vllm_scoring import open_vllm

        with open_vllm(run, path) as rows_of:
            yield rows_of
        return
    if run.profile.teacher.n_processes > 1:
        with _many(run, path) as rows_of:
            yield rows_of
        return
    scorer = Scorer(run.profile, path, run.log)
    yield lambda samples: _rows(scorer, samples, run.profile.teacher)


def token_logprobs(run: Run, path: Path, samples: pl.DataFrame, what: str) -> Iterator[pl.DataFrame]:
    """Frames (sample_id, token_logprobs) of `samples` under the teacher at `path`, by the profile's engine."""
    if run.profile.teacher.engine == "transformers":
        yield from response_logprobs(run, path, samples, what)
        return
    with open_engine(run, path) as rows_of:
        progress = run.progress(what, samples.height)
        for chunk in samples.iter_slices(run.profile.teacher.chunk_samples):
            frames = []
            for frame in rows_of(chunk):
                frames.append(frame.select("sample_id", "token_logprobs"))
                progress.advance(frame.height)
            yield pl.concat(frames)


def _rows(scorer: Scorer, samples: pl.DataFrame, s: TeacherSettings) -> Iterator[pl.DataFrame]:
    for scored in scorer.score(samples):
        ids = scored.samples["sample_id"].to_list()
        yield compress(scorer.logits(scored), scored.token_ids, scored.lengths, ids, s)


PIECES = 4
"""Pieces of a chunk per process, so that none waits long for the last one."""


@contextmanager
def _many(run: Run, path: Path) -> Iterator[Callable[[pl.DataFrame], Iterator[pl.DataFrame]]]:
    """Processes with a copy of the teacher each. Raises RuntimeError when one of them dies."""
    n, context = run.profile.teacher.n_processes, multiprocessing.get_context("spawn")
    arguments = (run.profile, path, context.Value("i", 0))
    with ProcessPoolExecutor(n, mp_context=context, initializer=_start, initargs=arguments) as pool:

        def rows_of(samples: pl.DataFrame) -> Iterator[pl.DataFrame]:
            samples = samples.sort("prompt_token_ids", "sample_id")  # responses that share a prompt stay together
            pieces = samples.iter_slices(max(1, -(-samples.height // (n * PIECES))))
            work = [pool.submit(_score_piece, piece) for piece in pieces]
            try:
                for done in as_completed(work):
                    yield from done.result()
            except BrokenProcessPool as e:
                raise RuntimeError(
                    "a scoring process died, perhaps for want of memory; what was finished is kept: lower "
                    "teacher.n_processes or teacher.batch_tokens, and run again"
                ) from e

        try:
            yield rows_of
        finally:
            pool.shutdown(cancel_futures=True)


_scorer: tuple[Scorer, TeacherSettings] | Exception | None = None  # of a scoring process


def _start(profile: Profile, path: Path, turn: Synchronized) -> None:
    """In a scoring process: take a turn, with it a GPU, and load the teacher."""
    global _scorer
    with turn.get_lock():
        number, turn.value = turn.value, turn.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    try:
        _scorer = Scorer(profile, path, n_beside=profile.teacher.n_processes), profile.teacher
    except Exception as e:  # raised with the first piece: raised here, it would only be a process that died
        _scorer = e


def _score_piece(samples: pl.DataFrame) -> list[pl.DataFrame]:
    if isinstance(_scorer, Exception):
        raise _scorer
    scorer, settings = _scorer
    return list(_rows(scorer, samples, settings))
