"""A query file is what its name and content say, whatever its size and age."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest
from fake_worker import Fake, write_profile

from nbg_core.base import ids
from nbg_core.base.ids import digest, query_file_id
from nbg_core.config.load import load_profile
from nbg_core.lake.lake import Lake
from nbg_core.lineage.staleness import status

MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(ids, "_hashes", {})


def large(path: Path) -> Path:
    """17 MiB and a few bytes: more than a piece that is read at once, and no multiple of it."""
    path.write_bytes(b'{"prompt": "x"}\n' * (17 * MIB // 16) + b"\n\n\n")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "größe.parquet", 'it"s.jsonl'])
@pytest.mark.parametrize("content", [b"", b"{}\n", bytes(range(256)) * 9000])
def test_it_is_the_digest_that_earlier_lakes_hold(tmp_path, name, content):
    (path := tmp_path / name).write_bytes(content)
    assert query_file_id(path) == digest("file", name, content.hex())


def test_neither_age_nor_place_matters_and_every_byte_does(tmp_path):
    path = large(tmp_path / "a.jsonl")
    first = query_file_id(path)
    os.utime(path, (1, 1))
    assert query_file_id(path) == first
    (tmp_path / "elsewhere").mkdir()
    assert query_file_id(large(tmp_path / "elsewhere" / "a.jsonl")) == first
    assert query_file_id(large(tmp_path / "b.jsonl")) != first
    with open(path, "r+b") as file:
        file.seek(17 * MIB - 1)
        file.write(b" ")
    assert query_file_id(path) != first


def test_a_file_that_is_hashed_as_a_query_file_and_as_a_part_of_a_model_has_two_hashes(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    model = ids.model_id(tmp_path)
    ids._hashes.clear()
    assert query_file_id(tmp_path / "config.json") == digest("file", "config.json", b"{}".hex())
    assert ids.model_id(tmp_path) == model
    assert query_file_id(tmp_path / "config.json") == digest("file", "config.json", b"{}".hex())


def test_a_large_file_is_not_held_in_memory(tmp_path):
    path = large(tmp_path / "a.jsonl")
    tracemalloc.start()
    query_file_id(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * MIB


def test_a_touch_of_a_large_file_makes_nothing_stale_and_a_changed_byte_does(tmp_path):
    profile_path = write_profile(tmp_path / "p", ("a",))
    file = large(tmp_path / "p" / "queries" / "a.jsonl")
    fake = Fake()
    fake("queries", "a", "run", profile=str(profile_path), on_line=lambda _: None)
    profile = load_profile(profile_path)

    def state() -> str:
        return next(s.state for s in status(Lake.of(profile), profile) if s.asset == "queries")

    assert state() == "fresh"
    os.utime(file, (1, 1))
    assert state() == "fresh"
    with open(file, "r+b") as f:
        f.seek(16 * MIB + 100)
        f.write(b"y")
    assert state() == "stale"
