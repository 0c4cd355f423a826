"""Make the embedded models and queries: `data/queries/<slice>.jsonl`, `data/models/teacher`, `data/models/student_sft`.

Run it from anywhere: `python data/models/make_models.py`. Model folders that exist are kept unless `--force` is given.
The query files are written each time, with the same bytes. All random numbers are seeded, but another torch build or
CPU may round differently and give slightly different scores.

There are three slices of short tasks. During training, accuracy is measured with reasoning-gym's scorers, which give 1
for a right answer and nearly always 0 for a wrong one. (`spell_backward` and `word_sorting` give points for near
misses, so they are not used.) The scorer of `number_sorting` accepts an error of 1 per number. The numbers of a list
therefore differ by at least 3, so that it accepts no skipped, repeated or swapped number. Where only one text is right,
the query file names the verifier `exact` instead. The accuracies on the model cards use the verifiers of the query
files. Each slice mixes difficulties, because a tiny model learns a single difficulty abruptly.

Both models are byte-level Llamas. They are trained on tasks drawn at random, never on a prompt of the query files. At
intervals the greedy accuracy of each slice is measured on validation prompts, which are in neither set; the further a
slice is from its target, the larger its share of the next batches. The teacher's target is 100% in all slices. The
student starts with one slice, and the next one is added when all before it have reached 35%; those then get a small
share and still rise to about half. Training stops when the accuracies of all three slices are inside the band. So the
student is not too small but undertrained, and distillation has something to teach it. When to stop is decided on
validation prompts, not on the queries that the student is scored on.
"""

import argparse
import json
import math
import os
import random
import shutil
import time
from functools import cache
from pathlib import Path

import reasoning_gym
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nbg_core.scorers.verifiers import verify

DATA = Path(__file__).resolve().parents[1]
SCORER = {"addition": "chain_sum", "reversal": "word_sequence_reversal", "sorting": "number_sorting"}
SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
N_QUERIES, N_VALIDATION, BATCH, MAX_NEW = 1000, 256, 128, 24
MODELS = {
    "teacher": dict(
        hidden=128, mlp=384, layers=4, seed=1, lr=2e-3, steps=1500, every=100,
        target=1.0, band=(0.99, 1.0), rest=0.02, near=0.0, start=3, order=list(SCORER),
    ),
    "student_sft": dict(
        hidden=96, mlp=192, layers=2, seed=2, lr=1e-3, steps=3000, every=10,
        target=0.35, band=(0.42, 0.58), rest=0.05, near=0.4, start=1, order=["addition", "sorting", "reversal"],
    ),
}  # fmt: skip
"""How each model is made. `lr`: peak learning rate. `every`: steps between validations. `target`: accuracy at which a
slice counts as learnt. `band`: training stops when the accuracies of all slices are inside it. `rest`: weight in the
batches of a slice that has reached its target. `near`: within this distance of the target the learning rate falls in
proportion to the distance. `order`: the slices in the order in which they are added. `start`: number of slices that
training starts with."""


def draw(task: str, rng: random.Random) -> dict:
    """A random task as a row of a query file, without a verifier; `metadata` is what reasoning-gym's scorer needs."""
    if task == "addition":
        digits = rng.choice([(1, 2), (2, 1), (2, 2), (2, 2)])
        a, b = (rng.randint(10 ** (d - 1), 10**d - 1) for d in digits)
        return {"prompt": f"Add: {a} + {b}", "answer": str(a + b), "metadata": {"expression": f"{a} + {b}"}}
    if task == "reversal":
        letters = rng.sample("abcdefghijklmnopqrstuvwxyz", rng.randint(3, 7))
        prompt, answer = f"Reverse: {' '.join(letters)}", " ".join(reversed(letters))
        return {"prompt": prompt, "answer": answer, "metadata": {"num_words": len(letters)}}
    size = rng.randint(2, 4)
    numbers = [v + 2 * i for i, v in enumerate(sorted(rng.sample(range(1, 98 - 2 * size), size)))]
    answer = json.dumps(numbers)
    rng.shuffle(numbers)
    metadata = {"direction": "ascending", "numbers": size}
    return {"prompt": f"Sort: {' '.join(map(str, numbers))}", "answer": answer, "metadata": metadata}


def draw_many(task: str, n: int, seed: str, taken: set[str]) -> list[dict]:
    """`n` different tasks whose prompts are not in `taken`. Their prompts are added to `taken`."""
    rng, rows = random.Random(seed), []
    while len(rows) < n:
        row = draw(task, rng)
        if row["prompt"] not in taken:
            taken.add(row["prompt"])
            args = {"dataset": SCORER[task], "metadata": row.pop("metadata")}
            rows.append({**row, "verifier": "reasoning_gym", "verifier_args": args})
    return rows


def query(task: str, row: dict) -> dict:
    """The row of the query file. Where only one text is right the verifier is `exact`, because reasoning-gym's scorers
    accept small deviations."""
    return row if task == "reversal" else {k: row[k] for k in ("prompt", "answer")} | {"verifier": "exact"}


@cache
def scorer_of(dataset: str):
    """The scorer of a reasoning-gym dataset. Some read a whole book when they are made, so they are kept."""
    return reasoning_gym.factory.get_score_answer_fn(dataset)


def score(text: str, row: dict) -> float:
    """The score in [0, 1] that reasoning-gym gives a response to a row of `draw_many`."""
    scorer = scorer_of(row["verifier_args"]["dataset"])
    metadata = row["verifier_args"]["metadata"]
    return scorer(text, {"answer": row["answer"], "question": row["prompt"], "metadata": metadata})


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without merges: byte b has id b, the special tokens follow. It can encode every text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2's alphabet shows as themselves
    others = [b for b in range(256) if b not in printable]
    visible = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    assert set(visible.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={visible[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[3], chat_template=TEMPLATE,
        additional_special_tokens=SPECIAL[1:3], padding_side="left", model_max_length=256,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_model(spec: dict, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(spec["seed"])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=spec["hidden"], intermediate_size=spec["mlp"], head_dim=32,
        num_hidden_layers=spec["layers"], num_attention_heads=spec["hidden"] // 32, max_position_embeddings=256,
        tie_word_embeddings=True, initializer_range=0.05, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def encode(tokenizer, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


@torch.inference_mode()
def respond(model, tokenizer, rows: list[dict], *, n: int = 1, temperature: float = 0.0) -> list[list[str]]:
    """`n` responses to each row, generated in left-padded batches; greedy at temperature 0."""
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    model.eval()
    texts: list[list[str]] = []
    for start in range(0, len(rows), 1024 // n):
        prompts = [encode(tokenizer, r["prompt"]) for r in rows[start : start + 1024 // n]]
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=MAX_NEW, num_return_sequences=n, **({"do_sample": False} | how))
        decoded = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        texts += [decoded[i : i + n] for i in range(0, len(decoded), n)]
    model.train()
    return texts


def accuracy(model, tokenizer, rows: list[dict]) -> float:
    return sum(score(t[0], r) >= 1 for t, r in zip(respond(model, tokenizer, rows), rows, strict=True)) / len(rows)


def sft_loss(model, tokenizer, rows: list[dict]) -> torch.Tensor:
    """Mean negative log-likelihood per token of the answers and their end token, without the prompts."""
    prompts = [encode(tokenizer, r["prompt"]) for r in rows]
    answers = [[*tokenizer.encode(r["answer"]), tokenizer.eos_token_id] for r in rows]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), -100)
    for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        labels[i, len(p) - 1 : len(p) + len(a) - 1] = torch.tensor(a)  # position t predicts token t + 1
    hidden = model.model(
        input_ids=ids, use_cache=False
    ).last_hidden_state  # padding is on the right, so no mask is needed
    where = labels != -100
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[where]), labels[where])


def train(name: str, spec: dict, tokenizer, validation: dict[str, list[dict]], held_out: set[str]):
    """Train until the validation accuracy of every slice is in the band, for `spec["steps"]` at most.

    Returns the model and the number of steps."""
    model, rng = make_model(spec, tokenizer), random.Random(f"sft-{spec['seed']}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec["lr"], betas=(0.9, 0.95), weight_decay=0.01)
    low, high = spec["band"]
    tasks, caution, began = spec["order"][: spec["start"]], 1.0, time.time()
    weights = dict.fromkeys(tasks, 1.0)
    for step in range(1, spec["steps"] + 1):
        decay = 0.05 + 0.95 * (1 + math.cos(math.pi * step / spec["steps"])) / 2
        optimizer.param_groups[0]["lr"] = spec["lr"] * min(1, step / 50) * decay * caution
        rows = []
        while len(rows) < BATCH:
            row = draw(rng.choices(list(weights), list(weights.values()))[0], rng)
            if row["prompt"] not in held_out:
                rows.append(row)
        assert held_out.isdisjoint(r["prompt"] for r in rows)
        rows.sort(key=lambda row: len(row["prompt"] + row["answer"]))
        loss = 0.0
        for half in (rows[: BATCH // 2], rows[BATCH // 2 :]):  # two halves by length need less padding
            part = sft_loss(model, tokenizer, half) / 2
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % spec["every"] == 0:
            now = {task: accuracy(model, tokenizer, v) for task, v in validation.items()}
            if all(now[task] >= spec["target"] for task in tasks):
                tasks = spec["order"][: len(tasks) + 1]
            gaps = {task: spec["target"] - now[task] for task in tasks}
            weights = {task: max(gap + spec["rest"], 1e-6) for task, gap in gaps.items()}
            if spec["near"]:
                caution = min(1.0, max(0.1, *map(abs, gaps.values())) / spec["near"]) / len(tasks)
            accuracies = ", ".join(f"{task} {a:.1%}" for task, a in now.items())
            print(f"{name} step {step}: loss {loss:.3f}; {accuracies}; {time.time() - began:.0f} s", flush=True)
            if all(low <= a <= high for a in now.values()):
                break
    return model.eval(), step


def measure(model, tokenizer, queries: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """Per slice, with the verifiers of the query files: greedy accuracy, pass rate of 8 samples at temperature 1, and
    the share of queries whose samples are both right and wrong."""

    def n_right(task: str, rows: list[dict], responses: list[list[str]]) -> list[int]:
        asked = [query(task, row) for row in rows]
        return [
            sum(verify(t, q["answer"], q["verifier"], q.get("verifier_args", {}), q["prompt"]) >= 1 for t in texts)
            for q, texts in zip(asked, responses, strict=True)
        ]

    scores = {}
    for task, rows in queries.items():
        torch.manual_seed(0)
        right = n_right(task, rows, respond(model, tokenizer, rows, n=8, temperature=1.0))
        scores[task] = {
            "greedy": sum(n_right(task, rows, respond(model, tokenizer, rows))) / len(rows),
            "sampled": sum(right) / (8 * len(rows)),
            "mixed": sum(0 < r < 8 for r in right) / len(rows),
        }
    return scores


def card(name: str, spec: dict, model, steps: int, scores: dict) -> str:
    """The README.md of a model folder; `scores` is what `measure` returned."""
    rows = [f"| {t} | {s['greedy']:.1%} | {s['sampled']:.1%} | {s['mixed']:.1%} |" for t, s in scores.items()]
    low, high = spec["band"]
    goal = "an undertrained student, stopped" if spec["target"] < 1 else "a teacher, trained to stop"
    return f"""# {name}

A toy: {goal} when greedy accuracy on validation prompts lay between {low:.1%} and {high:.1%} in every slice
(at the latest after {spec["steps"]:,} steps).

- Made by `data/models/make_models.py`, seed {spec["seed"]}, from random weights.
- {model.num_parameters():,} parameters: Llama, hidden {spec["hidden"]}, {spec["layers"]} layers, head size 32, tied
  embeddings, context 256, float32. Bytes are tokens (256, no merges), plus {", ".join(f"`{s}`" for s in SPECIAL)}.
- Data: tasks drawn at random while training (sums of 1 to 2 digits, 3 to 7 letters to reverse, 2 to 4 numbers to
  sort), never a prompt of `data/queries`. The mix of tasks follows validation accuracy.
- Training: {steps:,} steps of {BATCH}, AdamW, peak learning rate {spec["lr"]:g}, loss on answers only.
- Greedy accuracy, pass rate of 8 samples at temperature 1, and share of queries whose 8 samples are both right and
  wrong, on the {N_QUERIES} held-out queries of each slice, by the verifiers that the query files name:

| slice | greedy | sampled | mixed |
|---|---|---|---|
{chr(10).join(rows)}

Limits: it knows these three prompt formats and nothing else; no language, no system prompt, no second turn, no
larger numbers or longer lists.
"""


def save(folder: Path, model, tokenizer, text: str) -> None:
    """Write the model, the tokenizer and the card `text` to a temporary folder, and rename it to `folder` when it is
    complete."""
    fresh, old = (folder.with_name(f".{folder.name}.{end}.tmp") for end in ("new", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    (fresh / "README.md").write_text(text)
    for file in fresh.iterdir():
        file.chmod(0o644)
    if folder.exists():
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder for models/ and queries/")
    parser.add_argument("--only", choices=MODELS, help="make only this model")
    parser.add_argument("--force", action="store_true", help="replace models that exist")
    parser.add_argument("--steps", type=int, help="most steps of training, for a quick and worse model")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; 1 is faster on a busy machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began, taken = time.time(), set()
    queries = {task: draw_many(task, N_QUERIES, f"queries-{task}", taken) for task in SCORER}
    validation = {task: draw_many(task, N_VALIDATION, f"validation-{task}", taken) for task in SCORER}
    for task, rows in queries.items():
        assert all(score(r["answer"], r) == 1 for r in rows)
        lines = "".join(json.dumps(query(task, r)) + "\n" for r in rows)
        path = args.data / "queries" / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(lines)
        os.replace(path.with_suffix(".tmp"), path)
    tokenizer = make_tokenizer()
    for name, spec in MODELS.items():
        folder = args.data / "models" / name
        if args.only not in (None, name) or (folder.exists() and not args.force):
            continue
        spec = spec | ({"steps": args.steps} if args.steps else {})
        model, steps = train(name, spec, tokenizer, validation, held_out=taken)
        scores = measure(model, tokenizer, queries)
        print(name, json.dumps(scores, indent=1), flush=True)
        save(folder, model, tokenizer, card(name, spec, model, steps, scores))
        loaded = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert encode(loaded[1], "é\n Sort: 1") == encode(tokenizer, "é\n Sort: 1")
        assert respond(*loaded, queries["sorting"][:8]) == respond(model, tokenizer, queries["sorting"][:8])
    print(f"done in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
