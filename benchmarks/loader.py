"""Memory and speed of the training-set loader as the number of pairs grows: `.venv/bin/python benchmarks/loader.py`.

For each size it makes a lake with that many synthetic pairs: prompts of 16 tokens, responses of 12, and 8 teacher
entries per position. One process then writes the files of the training set, as the worker of the stage does. Another
reads batches of it in training order, as a rank does. Peak memory is the most resident memory that the process had
(VmHWM). Results go to results/loader.json and a section of README.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import report

from nbg_core.lake.teacher_columns import GAP_ZERO

PROMPT, RESPONSE, ENTRIES = 16, 12, 8


def make_lake(folder: Path, n_pairs: int) -> None:
    """Make a lake in `folder` with `n_pairs` synthetic pairs in one slice."""
    lake = lake_at(folder)
    lake.create()
    n = RESPONSE * ENTRIES
    with lake.connect(read_only=False) as con:
        con.execute(f"""
            INSERT INTO samples BY NAME
            SELECT 'bench' AS slice, 'm' AS materialisation_id, lpad(i::VARCHAR, 32, '0') AS sample_id, 'q' AS query_id,
                   'student' AS source, 'reference' AS model_id, 's' AS sampling_id, 0 AS sample_index, 0 AS seed,
                   list_transform(range({PROMPT}), lambda x: ((x + i // 2) % 900)::INTEGER) AS prompt_token_ids,
                   list_transform(range({RESPONSE}), lambda x: ((x * 7 + i) % 900)::INTEGER) AS token_ids,
                   list_transform(range({RESPONSE}), lambda x: -1.0::FLOAT) AS logprobs, 'stop' AS finish_reason,
                   '' AS text
            FROM range({2 * n_pairs}) t(i)""")
        con.execute("""
            INSERT INTO pairs BY NAME
            SELECT 'bench' AS slice, 'm' AS materialisation_id, md5(i::VARCHAR) AS pair_id, 'q' AS query_id,
                   lpad((2 * i)::VARCHAR, 32, '0') AS chosen_id, lpad((2 * i + 1)::VARCHAR, 32, '0') AS rejected_id,
                   1.0 AS chosen_score, 0.0 AS rejected_score, 1.0 AS margin
            FROM range(?) t(i)""", [n_pairs])  # fmt: skip
        con.execute(f"""
            INSERT INTO teacher_logits BY NAME
            SELECT 'bench' AS slice, 'm' AS materialisation_id, lpad(i::VARCHAR, 32, '0') AS sample_id,
                   'teacher' AS model_id, 'storage' AS settings_id,
                   list_transform(range({RESPONSE}), lambda x: -1.0::FLOAT) AS token_logprobs,
                   list_transform(range({RESPONSE}), lambda x: -9.0::FLOAT) AS tail_logmass,
                   list_transform(range({RESPONSE}), lambda x: {ENTRIES}::INTEGER) AS head_counts,
                   list_transform(range({RESPONSE}), lambda x: 0::INTEGER) AS tail_counts,
                   list_transform(range({n}), lambda x: {GAP_ZERO} + 9.0::FLOAT * least(x % {ENTRIES}, 1))
                     AS entry_gaps,
                   list_transform(range({n}), lambda x: -2.0::FLOAT) AS entry_logprobs
            FROM range({2 * n_pairs}) t(i)""")
        con.execute(f"""
            INSERT INTO reference_logprobs BY NAME
            SELECT 'bench' AS slice, 'm' AS materialisation_id, lpad(i::VARCHAR, 32, '0') AS sample_id,
                   'reference' AS model_id, 'scoring' AS settings_id,
                   list_transform(range({RESPONSE}), lambda x: -1.0::FLOAT) AS token_logprobs
            FROM range({2 * n_pairs}) t(i)""")


def lake_at(folder: Path):
    from nbg_core.lake.lake import Lake

    return Lake(f"sqlite:{folder}/catalog.sqlite", str(folder / "files"))


def write(folder: Path) -> dict:
    """Write the training set of the lake in `folder`; the time it takes, in seconds."""
    from nbg_core.config.training import TrainingSettings
    from nbg_core.training.pair_files import write_pair_files
    from nbg_core.training.pairs import count_and_hash_pairs
    from nbg_core.training.request import TrainingRequest

    lake = lake_at(folder)
    request = TrainingRequest(
        training_id="bench", catalog=lake.catalog, data_path=lake.data_path, snapshot=lake.snapshot(), slices=["bench"],
        policy_id="reference", policy_path=folder, teacher_id="teacher", storage_id="storage", scoring_id="scoring",
        temperature=1.0, training=TrainingSettings(), work=folder,
    )  # fmt: skip
    began = time.monotonic()
    count_and_hash_pairs(lake, request.snapshot, request.slices, folder / "spill")
    write_pair_files(lake, request, log=lambda line: None)
    return {"write_s": time.monotonic() - began}


def read(folder: Path, n_batches: int) -> dict:
    """Read `n_batches` batches of 64 pairs; the tokens per second."""
    from nbg_core.config.training import TrainingSettings
    from nbg_core.training.data import TrainingSet, prefetch
    from nbg_core.training.plan import Plan

    data = TrainingSet(folder / "rows")
    steps = Plan(len(data), TrainingSettings(global_batch_pairs=64))
    began, tokens = time.monotonic(), 0
    for batch in prefetch([lambda s=s: data.batch(s.pairs) for s in islice(steps, n_batches)]):
        tokens += batch.inputs.ids.numel()
    return {"read_tokens_per_s": tokens / (time.monotonic() - began)}


def measured(stage: str, folder: Path, *args: str) -> dict:
    """The result of a stage that is run in a process of its own, and that process's peak memory in MB."""
    done = subprocess.run(
        [sys.executable, __file__, "--stage", stage, "--folder", str(folder), *args],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000, 4_000_000])
    parser.add_argument("--dry", action="store_true", help="print the results, write no files")
    parser.add_argument("--stage", choices=["make", "write", "read"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--n", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        stages = {"make": lambda: make_lake(args.folder, args.n) or {}, "write": lambda: write(args.folder),
                  "read": lambda: read(args.folder, args.n)}  # fmt: skip
        result = stages[args.stage]()
        peak = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        print(json.dumps(result | {f"{args.stage}_peak_mb": int(peak.split()[1]) // 1024}))
        return
    found = []
    for n in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            measured("make", folder, "--n", str(n))
            row = {"pairs": n} | measured("write", folder) | measured("read", folder, "--n", "1000")
        found.append(row)
        print(row, flush=True)
    if args.dry:
        return
    section = report.table(
        ["pairs", "write, s", "write, peak MB", "read, peak MB", "read, tokens/s"],
        [[f"{r['pairs']:,}", f"{r['write_s']:.1f}", r["write_peak_mb"], r["read_peak_mb"],
          f"{r['read_tokens_per_s']:,.0f}"] for r in found],
    )  # fmt: skip
    report.write("loader", found, section, report.machine("duckdb", "numpy"))


if __name__ == "__main__":
    main()
