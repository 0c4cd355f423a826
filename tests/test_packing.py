"""The packed forward pass against the plain one: each response after its prompt, alone, without padding, float64.

transformers computes RMSNorm in float32 whatever the dtype; the test models compute it in theirs, so that 1e-12 holds.
"""

import json
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from nbg_core.modeling import packing
from nbg_core.modeling.forward import has_plain_lm_head
from nbg_core.modeling.packing import ATTENTION, MODEL_TYPES, pack, packed_hidden, supports_packing
from nbg_core.modeling.padded import pad, padded_hidden

VOCAB, WINDOW = 50, 5
SIZE = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
    max_position_embeddings=128, initializer_range=0.3, pad_token_id=0, bos_token_id=None, eos_token_id=1,
)  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "llama": LlamaConfig(**SIZE, num_key_value_heads=2, tie_word_embeddings=False),
    "qwen2": Qwen2Config(
        **SIZE, num_key_value_heads=4, tie_word_embeddings=True, use_sliding_window=True, sliding_window=WINDOW,
        layer_types=MIXED,
    ),
    "qwen3": Qwen3Config(**SIZE | {"head_dim": 16}, num_key_value_heads=1, tie_word_embeddings=False),
    "gemma3_text": Gemma3TextConfig(
        **SIZE, num_key_value_heads=2, tie_word_embeddings=True, sliding_window=WINDOW, layer_types=MIXED,
        query_pre_attn_scalar=3,  # a scale that is not head_dim ** -0.5
    ),
}  # fmt: skip

# Prompt of one token, branches of one token (first, further, only), many branches, one longer than the window.
LENGTHS = [(9, [7, 12]), (1, [6, 3]), (6, [1, 8]), (4, [5, 1, 1, 9, 2]), (3, [1]), (20, [1, 1]), (1, [1, 2])]


class ExactNorm(nn.Module):
    """RMSNorm in the dtype of its input. `shift` is 1 for Gemma, whose weight is a difference from 1."""

    def __init__(self, norm: nn.Module, shift: float):
        super().__init__()
        self.weight, self.shift = norm.weight, shift
        self.eps = getattr(norm, "variance_epsilon", None) or norm.eps

    def forward(self, x):
        return (self.shift + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def make(architecture: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture], dtype=torch.float64)
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, ExactNorm(module, float("gemma" in architecture)))
    for p in model.parameters():  # norms and biases start at a constant
        p.data += 0.1 * torch.randn_like(p)
    return model


def trees(lengths, seed: int = 0):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, VOCAB, p) for p, _ in lengths]
    return prompts, [[rng.integers(0, VOCAB, r) for r in branches] for _, branches in lengths]


def plain_hidden(model, prompts, branches):
    """[T, H], one forward pass a response."""
    hidden = []
    for prompt, responses in zip(prompts, branches, strict=True):
        for r in responses:
            ids = torch.tensor([[*prompt, *r]])
            hidden.append(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1])
    return torch.cat(hidden)


def backward(model, hidden, branches) -> dict[str, torch.Tensor]:
    """Gradients of the log-probs of all response tokens, each with another weight."""
    tokens = torch.tensor(np.concatenate([r for b in branches for r in b]), device=hidden.device)
    logp = model.get_output_embeddings()(hidden).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    model.zero_grad()
    (logp * torch.linspace(-1, 2, len(tokens)).to(logp)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def equal(a: dict, b: dict, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        atol = tolerance * float(b[name].abs().max())
        assert atol > 0, name
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("architecture", MODEL_TYPES)
def test_hidden_states_and_every_gradient_are_those_of_each_response_alone(architecture):
    prompts, branches = trees(LENGTHS)
    model = make(architecture)
    expected = plain_hidden(model, prompts, branches)
    gradients = backward(model, expected, branches)
    got = packed_hidden(model, pack(prompts, branches))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    equal(backward(model, got, branches), gradients, 1e-12)


LAYOUTS = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=5)), min_size=1)
MODELS = {architecture: make(architecture) for architecture in ("llama", "gemma3_text")}


@given(LAYOUTS.filter(lambda lengths: len(lengths) <= 4), st.sampled_from(sorted(MODELS)))
@settings(max_examples=60, deadline=None)
def test_any_layout_is_right(lengths, architecture):
    prompts, branches = trees(lengths)
    model = MODELS[architecture]
    with torch.no_grad():
        got = packed_hidden(model, pack(prompts, branches))
        torch.testing.assert_close(got, plain_hidden(model, prompts, branches), rtol=1e-11, atol=1e-11)


@given(LAYOUTS)
@settings(max_examples=200, deadline=None)
def test_layout_is_that_of_a_loop(lengths):
    prompts, branches = trees(lengths)
    ids, positions, rows, keys, segments = [], [], [], [], []
    for prompt, responses in zip(prompts, branches, strict=True):
        prompt_at = list(range(len(ids), len(ids) + len(prompt)))
        ids += prompt.tolist()
        positions += range(len(prompt))
        for i, response in enumerate(responses):
            inputs = response.tolist()[:-1]
            at = list(range(len(ids), len(ids) + len(inputs)))
            ids += inputs
            positions += range(len(prompt), len(prompt) + len(inputs))
            rows += [prompt_at[-1], *at]
            if i == 0 or inputs:
                keys += prompt_at + at
                segments.append((len(inputs) + (len(prompt) if i == 0 else 0), len(prompt) + len(inputs)))
    p = pack([p.tolist() for p in prompts], branches)  # lists and arrays
    assert all(x.dtype == torch.int64 for x in (p.ids, p.position_ids, p.rows, p.keys))
    assert (p.ids.tolist(), p.position_ids.tolist()) == ([ids], [positions])
    assert (p.rows.tolist(), p.keys.tolist(), p.segments) == (rows, keys, tuple(segments))


def test_first_and_last_token_of_a_response_by_hand():
    p = pack([[10, 11], [20]], [[[12, 13, 14], [15]], [[21, 22]]])
    assert p.ids.tolist() == [[10, 11, 12, 13, 20, 21]]  # 14, 15 and 22 are predicted only
    assert p.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert p.rows.tolist() == [1, 2, 3, 1, 4, 5]  # 11 predicts 12 and 15; 12 predicts 13; 13 predicts 14; ...
    assert p.segments == ((4, 4), (2, 2))


@pytest.mark.parametrize("architecture", MODEL_TYPES)
def test_branches_and_trees_are_blind_to_each_other(architecture):
    lengths = [(6, [7, 8]), (4, [9, 5])]
    prompts, branches = trees(lengths)
    tree, side, n = zip(*((t, b, r) for t, (_, rs) in enumerate(lengths) for b, r in enumerate(rs)), strict=True)
    tree, side = np.repeat(tree, n), np.repeat(side, n)
    model = make(architecture)

    def changed(edit) -> np.ndarray:
        """Which of the T rows differ after an edit of the tokens."""
        other = [p.copy() for p in prompts], [[r.copy() for r in b] for b in branches]
        edit(*other)
        with torch.no_grad():
            one, two = (packed_hidden(model, pack(*x)) for x in ((prompts, branches), other))
        return (one != two).any(1).numpy()

    def edit_token(sequence, i):
        sequence[i] = (sequence[i] + 1) % VOCAB

    for t, s in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        for i in (0, 3):
            at = changed(lambda p, b, t=t, s=s, i=i: edit_token(b[t][s], i))
            own = np.flatnonzero((tree == t) & (side == s))
            assert at[own[i + 1]] and set(np.flatnonzero(at)) <= set(own[i + 1 :]), (t, s, i)
        assert not changed(lambda p, b, t=t, s=s: edit_token(b[t][s], -1)).any()
    for t in (0, 1):
        assert (changed(lambda p, b, t=t: edit_token(p[t], len(p[t]) - 1)) <= (tree == t)).all()


@pytest.mark.parametrize("architecture", MODEL_TYPES)
def test_gradient_checkpointing_changes_nothing(architecture):
    prompts, branches = trees(LENGTHS)
    model = make(architecture).train()
    expected = backward(model, packed_hidden(model, pack(prompts, branches)), branches)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    handle = model.base_model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    got = backward(model, packed_hidden(model, pack(prompts, branches)), branches)
    handle.remove()
    assert len(calls) == 2  # computed again
    equal(got, expected, 1e-15)


@pytest.mark.parametrize("architecture", MODEL_TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_is_as_near_as_the_plain_pass_in_it(architecture, dtype):
    prompts, branches = trees(LENGTHS)
    with torch.no_grad():
        exact = plain_hidden(make(architecture), prompts, branches)
        model = make(architecture).to(dtype)
        got = packed_hidden(model, pack(prompts, branches))
        plain = plain_hidden(model, prompts, branches)
    assert got.dtype == dtype
    error = float((plain - exact).square().mean().sqrt())
    assert 0 < float((got - exact).square().mean().sqrt()) < 1.5 * error < (0.2 if dtype == torch.bfloat16 else 1e-4)


def test_a_model_that_was_used_packed_still_works_padded_and_is_saved_as_it_was(tmp_path):
    prompts, branches = trees([(9, [7]), (3, [11])])
    padded = pad([p.tolist() for p in prompts], [b[0].tolist() for b in branches], 0)
    model = make("gemma3_text")
    with torch.no_grad():
        before = padded_hidden(model, padded)
        packed_hidden(model, pack(prompts, branches))
        assert (padded_hidden(model, padded) == before).all()
    model.config.save_pretrained(tmp_path)
    assert ATTENTION not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_without_trees_there_are_no_rows_but_a_gradient():
    p = pack([], [])
    assert (p.ids.shape, p.rows.shape) == ((1, 1), (0,))
    model = make("llama")
    packed_hidden(model, p).sum().backward()
    assert all((q.grad == 0).all() for q in model.base_model.parameters())


def test_what_is_not_supported_is_refused():
    assert all(supports_packing(config) for config in CONFIGS.values())
    both_ways = Gemma3TextConfig(use_bidirectional_attention=True)
    assert not any(supports_packing(config) for config in (GPT2Config(), Gemma2Config(), both_ways))
    other = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=VOCAB))
    with pytest.raises(ValueError, match="'gpt2'.*padded forward pass.*qwen3"):
        packed_hidden(other, pack([[1]], [[[2]]]))
    for prompts, branches in [([[1], []], [[[2]], [[2]]]), ([[1], [1]], [[[2]], []]), ([[1], [1]], [[[2]], [[2], []]])]:
        with pytest.raises(ValueError, match="tree 1 has . prompt tokens.*at least one token"):
            pack(prompts, branches)
    x = torch.zeros(1, 1, 1, 1)
    for bad in ({"softcap": 30.0}, {"dropout": 0.1}):
        with pytest.raises(ValueError, match="no softcap .* and no dropout"):
            AttentionInterface()[ATTENTION](nn.Module(), x, x, x, None, packed_layout=object(), **bad)


def test_plain_lm_head():
    small = dict(SIZE, num_hidden_layers=1, num_key_value_heads=4)

    def plain(config) -> bool:
        return has_plain_lm_head(AutoModelForCausalLM.from_config(config))

    assert all(plain(config) for config in CONFIGS.values())
    assert plain(Gemma2Config(**small, final_logit_softcapping=None)) and plain(GraniteConfig(**small))
    assert not plain(Gemma2Config(**small, final_logit_softcapping=30.0))
    assert not plain(CohereConfig(**small, logit_scale=0.0625))
    assert not plain(GraniteConfig(**small, logits_scaling=8.0))
    nested = make("llama")  # a model of several parts: its language part has a configuration of its own
    nested.config = LlamaConfig(**nested.config.to_dict())
    nested.config.get_text_config = lambda **_: Gemma2Config(**small, final_logit_softcapping=30.0)
    assert not has_plain_lm_head(nested)
    with_bias = make("llama")
    with_bias.set_output_embeddings(nn.Linear(32, VOCAB, bias=True))
    assert not has_plain_lm_head(with_bias)


def loop_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """`varlen_attn` as documented: causal with a window of `left` keys before the query's, ends aligned."""
    left, right = window_size
    assert right == 0 and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    group = query.shape[1] // key.shape[1]
    assert enable_gqa == (group > 1)
    out = []
    for s in range(len(cu_seq_q) - 1):
        first_q, end_q, first_k, end_k = *cu_seq_q[s : s + 2].tolist(), *cu_seq_k[s : s + 2].tolist()
        for i in range(first_q, end_q):
            last = end_k - (end_q - i)
            keys = slice(first_k if left < 0 else max(first_k, last - left), last + 1)
            k, v = (x[keys].repeat_interleave(group, 1) for x in (key, value))
            weights = (torch.einsum("hd,khd->hk", query[i], k) * scale).softmax(-1)
            out.append(torch.einsum("hk,khd->hd", weights, v))
    return torch.stack(out)


@pytest.mark.parametrize("architecture", MODEL_TYPES)
def test_arguments_of_varlen_attention(architecture, monkeypatch):
    prompts, branches = trees(LENGTHS)
    model = make(architecture)
    monkeypatch.setattr(packing, "_has_varlen", lambda query: True)
    monkeypatch.setattr(packing, "varlen_attn", create_autospec(packing.varlen_attn, side_effect=loop_varlen))
    with torch.no_grad():
        got = packed_hidden(model, pack(prompts, branches))
        assert packing.varlen_attn.call_count == SIZE["num_hidden_layers"]
        torch.testing.assert_close(got, plain_hidden(model, prompts, branches), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("architecture", MODEL_TYPES)
def test_cuda_equals_cpu(architecture, dtype):
    prompts, branches = trees(LENGTHS)
    p = pack(prompts, branches)

    def gradients(dtype, device):
        model = make(architecture).to(device, dtype)
        return backward(model, packed_hidden(model, p.to(device)), branches)

    exact, on_cpu, got = gradients(torch.float64, "cpu"), gradients(dtype, "cpu"), gradients(dtype, "cuda")
    for name, gradient in exact.items():
        error = float((on_cpu[name] - gradient).norm())
        assert float((got[name].cpu() - gradient).norm()) < 2 * error + 1e-3 * float(gradient.norm()), name
