"""What runs the teacher's forward passes: transformers in this process or in several, or vLLM servers."""

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

from nbg_core.base.names import unknown
from nbg_core.config.profile import ENGINES, Profile, TeacherSettings
from nbg_core.lineage.run import Run
from nbg_core.modeling.scoring import LogprobModel, response_logprobs
from nbg_core.teacher.store import compress


@contextmanager
def open_engine(run: Run, path: Path) -> Iterator[Callable[[pl.DataFrame], Iterator[pl.DataFrame]]]:
    """Open the profile's engine for the teacher at `path`: a function from `samples` to frames of teacher_logits
    columns.

    Raises ValueError for an unknown engine."""
    s = run.profile.teacher
    match s.engine:
        case "transformers" if s.n_processes > 1:
            with _process_pool(run, path) as rows_of:
                yield rows_of
        case "transformers":
            model = LogprobModel(run.profile, path, run.log)
            yield lambda samples: _compressed_frames(model, samples, s)
        case "vllm":
            from nbg_core.teacher.vllm_scoring import open_vllm

            with open_vllm(run, path) as rows_of:
                yield rows_of
        case _:
            raise unknown("teacher.engine", s.engine, ENGINES)


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


def _compressed_frames(model: LogprobModel, samples: pl.DataFrame, s: TeacherSettings) -> Iterator[pl.DataFrame]:
    for scored in model.score(samples):
        ids = scored.samples["sample_id"].to_list()
        yield compress(model.logits(scored), scored.token_ids, scored.lengths, ids, s)


PIECES = 4
"""Pieces per process that a chunk is cut into, so that no process waits long for the last piece."""


@contextmanager
def _process_pool(run: Run, path: Path) -> Iterator[Callable[[pl.DataFrame], Iterator[pl.DataFrame]]]:
    """`open_engine` with `teacher.n_processes` processes, each with its own copy of the teacher. The function raises
    RuntimeError when one of them dies."""
    n, context = run.profile.teacher.n_processes, multiprocessing.get_context("spawn")
    arguments = (run.profile, path, context.Value("i", 0))
    with ProcessPoolExecutor(n, mp_context=context, initializer=_init_process, initargs=arguments) as pool:

        def rows_of(samples: pl.DataFrame) -> Iterator[pl.DataFrame]:
            samples = samples.sort("prompt_token_ids", "sample_id")  # responses that share a prompt stay together
            pieces = samples.iter_slices(max(1, -(-samples.height // (n * PIECES))))
            work = [pool.submit(_score_piece, piece) for piece in pieces]
            try:
                for done in as_completed(work):
                    yield from done.result()
            except BrokenProcessPool as e:
                raise RuntimeError(
                    "a scoring process died, perhaps for lack of memory; what was finished is kept: lower "
                    "teacher.n_processes or teacher.batch_tokens, and run again"
                ) from e

        try:
            yield rows_of
        finally:
            pool.shutdown(cancel_futures=True)


_model: tuple[LogprobModel, TeacherSettings] | Exception | None = None  # set in a scoring process


def _init_process(profile: Profile, path: Path, turn: Synchronized) -> None:
    """Initialise a scoring process: choose its GPU, in turn, and load the teacher."""
    global _model
    with turn.get_lock():
        number, turn.value = turn.value, turn.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    try:
        _model = LogprobModel(profile, path, n_beside=profile.teacher.n_processes), profile.teacher
    except Exception as e:  # `_score_piece` raises it; raised here, it would only break the pool
        _model = e


def _score_piece(samples: pl.DataFrame) -> list[pl.DataFrame]:
    if isinstance(_model, Exception):
        raise _model
    assert _model is not None  # `_init_process` has run
    model, settings = _model
    return list(_compressed_frames(model, samples, settings))
