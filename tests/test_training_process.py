"""Training as it really runs: the deepspeed launcher, two ranks, ZeRO, kills, and the commit.

Run as a module by the launcher (`python -m test_training_process REQUEST...`), it trains one request after another in
one set of ranks, because starting a set takes seconds.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from rank_gradients import STEP
from safetensors.torch import load_file
from training_lake import make_profile, naive_gradients, request_of

from nbg_core.assets import get
from nbg_core.base import ids
from nbg_core.lake.lake import Lake
from nbg_core.lake.queries import latest_materialisation
from nbg_core.lineage.run import Run
from nbg_core.modeling.loading import load_model
from nbg_core.training.data import TrainingSet
from nbg_core.training.launcher import _command
from nbg_core.training.plan import Plan
from nbg_core.training.request import TrainingError, TrainingRequest
from nbg_core.training.stage import materialise

pytestmark = pytest.mark.slow

SETTINGS = dict(global_batch_pairs=8, epochs=2, learning_rate=3e-3)


def steps_of(request: TrainingRequest) -> list[dict]:
    return [json.loads(line) for line in request.steps_file.read_text().splitlines()]


def start_ranks(n: int, requests: list[TrainingRequest], module: str = "test_training_process") -> str:
    """Run `module`, which takes the requests one after another: on `n` ranks of one launcher, or in one plain process.
    Returns the output."""
    files = []
    for request in requests:
        files.append(str(request.work / "request.json"))
        Path(files[-1]).write_text(request.model_dump_json())
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = _command(requests[0], Path(files[0]))
    port = command[command.index("--master_port") + 1]
    if n == 1:
        command = [sys.executable, "-m", module, *files]
        env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    else:
        command[command.index("--num_accelerators") + 1] = str(n)
        command[command.index("nbg_core.training.train") :] = [module, *files]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


def continued(profile, name: str, state_of: TrainingRequest, **training) -> TrainingRequest:
    """A training that goes on from the state of another."""
    request = request_of(profile, name, **state_of.training.model_dump() | training)
    shutil.copytree(state_of.states, request.states)
    shutil.copy(state_of.steps_file, request.steps_file)
    return request


def result(request: TrainingRequest) -> tuple[list[float], str]:
    return [s["loss"] for s in steps_of(request)], ids.model_id(request.final)


def check_follows(request: TrainingRequest, expected: TrainingRequest) -> None:
    """Up to rounding: every metric of every step, and the weights; in bf16 loss and gradient norm, within 1%."""
    bf16 = request.training.precision == "bf16"
    for one, two in zip(steps_of(request), steps_of(expected), strict=True):
        for name in ["loss", "grad_norm"] if bf16 else one.keys() - {"tokens_per_second", "data_wait", "accuracy"}:
            near = pytest.approx(two[name], rel=0.01) if bf16 else pytest.approx(two[name], rel=1e-4, abs=1e-5)
            assert one[name] == near, (request.training_id, one["step"], name)
    if not bf16:
        weights = dict(load_model(expected.final, dtype="float32").named_parameters())
        for name, got in load_model(request.final, dtype="float32").named_parameters():
            difference = (got - weights[name]).abs().max().item()
            assert difference < 5e-5, (request.training_id, name, difference)


def test_ranks_stages_offload_and_states_all_follow_one_rank(tmp_path):
    # A matrix of more than 100,000 entries is one that ZeRO-3 really partitions, and 3 ranks have it in uneven slices.
    # 11 pairs of 5 to 26 tokens in micro-batches of 40: some ranks have fewer of them than others, one has none.
    profile = make_profile(tmp_path, n_pairs=11, model=dict(hidden=64, rows=1700), **SETTINGS, save_every=2)
    alone = {
        "fp32": request_of(profile, "fp32"),  # 4 steps: a state after 2
        "bf16": request_of(profile, "bf16", precision="bf16"),
        "lora": request_of(profile, "lora", lora={"rank": 4, "alpha": 8.0}),
    }
    untied = dict(architecture="qwen3", hidden=64, rows=1700, tied=False)
    other = make_profile(tmp_path / "untied", n_pairs=11, model=untied, **SETTINGS)
    alone["untied"] = request_of(other, "untied")
    start_ranks(1, list(alone.values()))

    def fresh(kind: str, stage: int, offload: bool = False) -> TrainingRequest:
        changed = dict(zero_stage=stage, offload_optimizer=offload, micro_batch_tokens=40)
        of = other if kind == "untied" else profile
        return request_of(of, f"{kind} {stage} {offload}", **alone[kind].training.model_dump() | changed)

    two = {
        "fp32": [fresh("fp32", stage) for stage in range(4)] + [fresh("fp32", stage, True) for stage in (1, 3)],
        "bf16": [fresh("bf16", 0), fresh("bf16", 3), fresh("bf16", 2, True)],
        "lora": [fresh("lora", 0), fresh("lora", 3)],
        "untied": [fresh("untied", 2), fresh("untied", 3)],
    }
    start_ranks(2, sum(two.values(), []))
    resumed = [two["fp32"][1], two["fp32"][3], two["fp32"][4], two["bf16"][0], two["bf16"][2]]
    again = [continued(profile, f"{request.training_id} again", request) for request in resumed]
    log = start_ranks(2, again)
    assert log.count("continuing after step 2 of 4") == len(again)
    for first, second in zip(resumed, again, strict=True):
        assert result(first) == result(second), first.training_id  # bit for bit

    def shared(kind: str, n: int, **changed) -> TrainingRequest:
        changed = dict(sequence_parallel=n, n_processes=4, micro_batch_tokens=30) | changed
        return request_of(profile, f"{kind} shared by {n}", **alone[kind].training.model_dump() | changed)

    # 2 groups of 2 ranks that share sequences, and one of 4, which have only 2 key heads to share.
    four = {
        "fp32": [
            shared("fp32", 2, zero_stage=3, gradient_checkpointing=True),
            shared("fp32", 4),
            continued(profile, "1 to 4", alone["fp32"], n_processes=4, sequence_parallel=2, zero_stage=2),
        ],
        "bf16": [shared("bf16", 2)],
        "lora": [shared("lora", 4, zero_stage=3)],
    }
    start_ranks(4, sum(four.values(), []))
    stage_3 = dict(zero_stage=3, offload_optimizer=False)
    three = {
        "fp32": [
            continued(profile, "1 to 3", alone["fp32"], micro_batch_tokens=40, **stage_3),
            continued(profile, "2 to 3", two["fp32"][3], zero_stage=2, gradient_checkpointing=True),
        ],
        "lora": [continued(profile, "lora 2 to 3", two["lora"][0], **stage_3)],
    }
    start_ranks(3, sum(three.values(), []))
    one = {
        "fp32": [continued(profile, "2 to 1", two["fp32"][5], zero_stage=0, offload_optimizer=False)],
        "bf16": [continued(profile, "bf16 2 to 1", two["bf16"][0], zero_stage=3)],
    }
    start_ranks(1, sum(one.values(), []))
    for ranks in (two, four, three, one):
        for kind, requests in ranks.items():
            for request in requests:
                check_follows(request, alone[kind])
    losses = {kind: [s["loss"] for s in steps_of(request)] for kind, request in alone.items()}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["lora"][0] == losses["fp32"][0] and losses["lora"][-1] != pytest.approx(losses["fp32"][-1], rel=1e-3)


def test_every_gradient_at_zero_0_to_3_on_2_to_4_ranks_is_that_of_a_naive_loop_in_float64(tmp_path):
    loss = {"w_dpo": 1.3, "w_pos": 0.7, "w_neg": 0.4, "nll_coef": 0.2, "beta": 0.3}
    changed = dict(loss=loss, micro_batch_tokens=40, max_grad_norm=1e9)
    shape = dict(hidden=64, rows=1700)
    llama = make_profile(tmp_path / "llama", n_pairs=11, model=shape, **SETTINGS)
    qwen3 = make_profile(
        tmp_path / "qwen3", n_pairs=11, model=dict(architecture="qwen3", tied=False, **shape), **SETTINGS
    )

    for profile in (llama, qwen3):  # margins that are not 0, so that the gradient depends on both sides of a pair
        with Lake.of(profile).connect(read_only=False) as con:
            con.execute(
                "UPDATE reference_logprobs SET token_logprobs = "
                "list_transform(token_logprobs, x -> (x + hash(sample_id) % 100 / 200)::FLOAT)"
            )

    def ask(profile, n: int, **more) -> TrainingRequest:
        name = f"{n} ranks {' '.join(map(str, more.values()))}"
        return request_of(profile, name, **changed | dict(n_processes=n) | more)

    runs = {
        2: [
            *(ask(llama, 2, zero_stage=stage) for stage in range(4)), *(ask(qwen3, 2, zero_stage=s) for s in (0, 2, 3)),
            ask(llama, 2, zero_stage=3, offload_optimizer=True, gradient_checkpointing=True),
        ],
        3: [*(ask(llama, 3, zero_stage=stage) for stage in (0, 1, 3)), ask(llama, 3, zero_stage=0, precision="bf16")],
        4: [ask(llama, 4, zero_stage=3), ask(llama, 4, zero_stage=2, sequence_parallel=2)],
    }  # fmt: skip
    expected = {}  # by policy: a step of all trainings has the same pairs
    for n, requests in runs.items():
        start_ranks(n, requests, "rank_gradients")
        for request in requests:
            if request.policy_path not in expected:
                pairs = Plan(len(TrainingSet(request.rows_path)), request.training)[STEP].pairs
                expected[request.policy_path] = naive_gradients(request, pairs)
            found = load_file(request.work / "gradients.safetensors")
            assert found.keys() == expected[request.policy_path].keys()
            bound = 0.05 if request.training.precision == "bf16" else 2e-5
            for parameter, true in expected[request.policy_path].items():
                error = float((found[parameter] - true).norm() / true.norm())
                assert error < bound, (request.policy_path, request.training_id, parameter, error)


def save(profile, folder: Path) -> Path:
    path = folder / "profile.yaml"
    path.write_text(yaml.safe_dump(json.loads(profile.model_dump_json())))
    return path


def family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def wait_for(what, seconds: float):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """A training of 180 steps: long enough to be killed in the middle."""
    changed = dict(global_batch_pairs=2, epochs=30, save_every=20)
    return make_profile(tmp_path_factory.mktemp("process"), n_pairs=12, **{**SETTINGS, **changed})


def test_a_killed_run_leaves_no_process_and_continues_to_the_undisturbed_checkpoint(profile, tmp_path):
    undisturbed = request_of(profile, "undisturbed")
    start_ranks(1, [undisturbed])
    env = {**os.environ, "NBG_PROFILE": str(save(profile, tmp_path))}
    command = [sys.executable, "-m", "nbg_core.runtime.worker", "student_checkpoint"]
    work = profile.root / "work" / "training"
    before = set(work.glob("*")) if work.exists() else set()
    worker = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def lines() -> int:
        files = [f for folder in set(work.glob("*")) - before for f in folder.glob("steps.jsonl")]
        return len(files[0].read_text().splitlines()) if files else 0

    wait_for(lambda: lines() >= 50, 120)
    ranks = family(worker.pid)
    assert len(ranks) >= 3  # runner, launcher, rank
    worker.send_signal(signal.SIGKILL)  # the worker alone, not its group: the harder case
    worker.wait()
    wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks), 20)
    (folder,) = set(work.glob("*")) - before
    assert 50 <= lines() < 180 and not (folder / "final").exists() and list((folder / "states").glob("*.json"))
    lake = Lake.of(profile)
    assert lake.sql("SELECT * FROM checkpoints").is_empty()

    lines_logged: list[str] = []
    run = Run(profile, lake, "run-2", log=lines_logged.append)
    report = materialise(run, None)
    assert any("continuing after step" in line for line in lines_logged)
    assert all(line.startswith("student_checkpoint") for line in lines_logged)
    assert report.checkpoint_id == ids.model_id(undisturbed.final) == ids.model_id(report.path)
    assert (report.n_pairs, report.n_steps, report.new_rows) == (12, 180, 1)
    assert not folder.exists()
    check_commit(lake, profile, report, undisturbed)
    again = materialise(Run(profile, lake, "run-3", log=lines_logged.append), None)
    assert (again.new_rows, again.checkpoint_id) == (0, report.checkpoint_id)
    assert lake.sql("SELECT count(*) FROM checkpoints").item() == 1


def check_commit(lake: Lake, profile, report: dict, undisturbed: TrainingRequest) -> None:
    """Checkpoint, pairs and steps are there, made by one commit that names all its inputs."""
    checkpoint = lake.sql("SELECT * FROM checkpoints").row(0, named=True)
    assert checkpoint["checkpoint_id"] == checkpoint["path"] == report.checkpoint_id
    used = lake.sql("SELECT * FROM checkpoint_pairs ORDER BY step, pair_id")
    assert used.height == 360 and used.group_by("pair_id").len()["len"].to_list() == [30] * 12
    pairs = lake.sql("SELECT pair_id, slice FROM pairs", snapshot=checkpoint["input_snapshot"])
    assert used.join(pairs, on=["pair_id", "slice"], how="anti").is_empty()
    steps = lake.sql("SELECT * FROM training_steps ORDER BY step")
    assert steps["loss"].to_list() == [s["loss"] for s in steps_of(undisturbed)]
    commits = lake.sql("SELECT * FROM lineage.commits WHERE asset = 'student_checkpoint'")
    assert {*used["materialisation_id"], *steps["materialisation_id"], checkpoint["materialisation_id"]} == {
        commits["materialisation_id"].item()
    }
    assert commits["run_id"].item() == "run-2" and commits["data_version"].item() == report.checkpoint_id
    read = {(i["asset"], i["slice"]) for i in json.loads(commits["inputs"].item())}
    assert read == {(a, s) for a in get("student_checkpoint").upstream for s in ("alpha", "beta")}
    assert latest_materialisation(lake, "student_checkpoint", None)["data_version"] == report.checkpoint_id


def test_an_error_in_a_rank_is_the_error_of_the_stage(profile):
    training = profile.training.model_copy(update={"learning_rate": 1e30})
    exploding = profile.model_copy(update={"training": training})
    with pytest.raises(TrainingError, match="gradient of step 1 is not finite, pairs [0-9a-f]{32}"):
        materialise(Run(exploding, Lake.of(profile), log=lambda line: None), None)


if __name__ == "__main__":
    from nbg_core.training.train import train

    for file in sys.argv[1:]:
        train(TrainingRequest.model_validate_json(Path(file).read_text()))
