"""Every fast form of the language model against the plain one: values, gradients, memory, and `generate` compiled."""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_model import LLM, tiny_model
from torch.autograd import gradcheck
from transformers import CompileConfig, StaticCache

import modeling_omni.kernels as kernels
import modeling_omni.ssd as ssd
from modeling_omni.configuration_omni import OmniTextConfig
from modeling_omni.kernels import (
    GATHER_TOKENS,
    causal_attention,
    experts_gathered,
    experts_grouped,
    gated_group_rms_norm,
    linear,
    relu2,
    rms_norm,
    routed_experts,
    sort_by_expert,
)
from modeling_omni.modeling_language import (
    OmniLanguageModel,
    TopKRouter,
    attention_inputs,
    chunked_cross_entropy,
    init_language_weights,
)
from modeling_omni.ssd import causal_conv1d, causal_conv1d_step, cuda_kernels, ssd_scan, ssd_step

# ---- the scan ----


def plain_scan(x, dt, A, B, C, state, D, seq_idx):
    """The definition, token by token, for autograd."""
    per_group = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(per_group, 2), C.repeat_interleave(per_group, 2)
    outputs = []
    for t in range(x.shape[1]):
        if t and seq_idx is not None:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        state = (
            state * (dt[:, t] * A).exp()[..., None, None] + (x[:, t] * dt[:, t, :, None])[..., None] * B[:, t, :, None]
        )
        outputs.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1), state


def scan_inputs(length, packed, dtype=torch.float64, batch=2, heads=6, size=5, groups=3, states=7):
    torch.manual_seed(length)
    inputs = [
        torch.randn(batch, length, heads, size),
        torch.rand(batch, length, heads) * 2,
        -torch.rand(heads) * 3,
        torch.randn(batch, length, groups, states),
        torch.randn(batch, length, groups, states),
        torch.randn(batch, heads, size, states),
        torch.randn(heads),
    ]
    documents = (torch.rand(batch, length) < 0.15).cumsum(1) if packed else None
    return [t.to(dtype).requires_grad_() for t in inputs], documents


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("length", [1, 5, 16, 75])
@pytest.mark.parametrize("packed", [False, True])
def test_scan_and_its_gradients_equal_the_recurrence(length, packed, at_once, monkeypatch):
    monkeypatch.setattr(ssd, "SCAN_ELEMENTS", at_once * 2 * 6 * 64)
    monkeypatch.setattr(ssd, "TRAINING_FACTOR", 1)
    inputs, documents = scan_inputs(length, packed)
    x, dt, A, B, C, state, D = inputs
    y, last = ssd_scan(x, dt, A, B, C, state, documents, D, chunk=8)
    expected, expected_last = plain_scan(*inputs, documents)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(last, expected_last)
    with torch.no_grad():
        quick, quick_last = ssd_scan(x, dt, A, B, C, state, documents, D, chunk=8)
    assert torch.equal(quick, y) and torch.equal(quick_last, last)
    weights = torch.randn_like(y), torch.randn_like(last)
    actual = torch.autograd.grad([y, last], inputs, weights)
    wanted = torch.autograd.grad([expected, expected_last], inputs, weights)
    for name, ours, theirs in zip("x dt A B C state D".split(), actual, wanted):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_scan_gradients_by_differences():
    inputs, documents = scan_inputs(7, True, batch=1, heads=2, size=2, groups=1, states=3)

    def scan(x, dt, A, B, C, state, D):
        return ssd_scan(x, dt, A, B, C, state, documents, D, chunk=3)

    assert gradcheck(scan, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scan_keeps_float32_inside(dtype):
    """bfloat16 inputs are exact in float32: errors are those of float32, under autocast as well."""
    (x, dt, A, B, C, state, D), documents = scan_inputs(130, True, torch.float32)
    x, B, C = (t.detach().to(dtype).requires_grad_() for t in (x, B, C))
    inputs = [x, dt, A, B, C, state, D]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y, last = ssd_scan(x, dt, A, B, C, state, documents, D)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected, expected_last = plain_scan(*exact, documents)
    torch.testing.assert_close(y.double(), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(last.double(), expected_last, atol=2e-5, rtol=1e-4)
    weights = torch.randn_like(y)
    actual = torch.autograd.grad(y, inputs[:5], weights)
    wanted = torch.autograd.grad(expected, exact[:5], weights.double())
    for ours, theirs in zip(actual, wanted):
        tolerance = 1e-4 if ours.dtype == torch.float32 else 2**-7
        assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


def test_scan_memory_does_not_grow_with_the_row():
    def most(length):
        (x, dt, A, B, C, _, D), _ = scan_inputs(length, False, torch.float32, 1, 4, 16, 2, 16)
        inputs = [t.detach() for t in (x, dt, A, B, C)]
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            y, state = ssd_scan(*inputs)
        total = highest = 0
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            total += event.nbytes()
            highest = max(highest, total)
        return highest - y.nbytes - state.nbytes

    ssd_elements, ssd.SCAN_ELEMENTS = ssd.SCAN_ELEMENTS, 2**15
    try:
        assert most(4096) < 1.05 * most(1024)
    finally:
        ssd.SCAN_ELEMENTS = ssd_elements


def test_step_continues_the_scan_in_place():
    (x, dt, A, B, C, state, D), _ = scan_inputs(4, False, torch.float32)
    with torch.no_grad():
        expected, expected_state = ssd_scan(x, dt, A, B, C, state, None, D)
        own, address = state.clone(), None
        for t in range(4):
            address = own.data_ptr()
            y = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], own, D)
            torch.testing.assert_close(y, expected[:, t], atol=1e-5, rtol=1e-4)
        assert own.data_ptr() == address
        torch.testing.assert_close(own, expected_state, atol=1e-5, rtol=1e-4)


# ---- the convolution ----


@pytest.mark.parametrize("lengths", [[1], [3], [2, 9, 1, 1, 5]], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_convolution_and_its_gradients_equal_conv1d(lengths, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(2, sum(lengths), 6).double(), torch.randn(6, 4).double()
    inputs = [t.requires_grad_() for t in (x, weight, *([torch.randn(6).double()] if bias else []))]
    seq_idx = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    y = causal_conv1d(x, weight, inputs[2] if bias else None, seq_idx if len(lengths) > 1 else None)
    parts = [F.pad(part.transpose(1, 2), (3, 0)) for part in x.split(lengths, 1)]
    parts = [F.conv1d(part, weight[:, None], inputs[2] if bias else None, groups=6) for part in parts]
    expected = F.silu(torch.cat(parts, 2)).transpose(1, 2)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
        torch.testing.assert_close(ours, theirs)
    step = causal_conv1d_step(F.pad(x, (0, 0, 3, 0))[:, -4:].transpose(1, 2), weight, inputs[2] if bias else None)
    if len(lengths) == 1:
        torch.testing.assert_close(step, expected[:, -1])


# ---- norms and experts ----


def test_norms_and_relu2_equal_their_formulas():
    torch.manual_seed(0)
    x, gate, weight = (torch.randn(shape, requires_grad=True) for shape in ((3, 5, 12), (3, 5, 12), (12,)))

    def plain(y, weight, size):
        groups = y.unflatten(-1, (-1, size))
        return (groups / (groups.square().mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(-2) * weight

    pairs = [
        (rms_norm(x, weight, 1e-3), plain(x, weight, 12), [x, weight]),
        (gated_group_rms_norm(x, gate, weight, 4, 1e-3), plain(x * F.silu(gate), weight, 4), [x, gate, weight]),
        (relu2(x), x.clamp(min=0) ** 2, [x]),
    ]
    for ours, expected, inputs in pairs:
        torch.testing.assert_close(ours, expected)
        grad = torch.randn_like(ours)
        for actual, wanted in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
            torch.testing.assert_close(actual, wanted)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, 1e-3), pairs[0][0]) and torch.equal(relu2(x), pairs[2][0])
    frozen = rms_norm(x, weight.detach(), 1e-3)
    wanted = torch.autograd.grad(plain(x, weight, 12).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(frozen.sum(), x), wanted)


def expert_inputs(tokens, dtype=torch.float64):
    torch.manual_seed(tokens)
    choices = torch.stack([torch.randperm(7)[:3] for _ in range(tokens)])  # experts 7 to 9 are never chosen
    floats = [torch.randn(tokens, 8), torch.rand(tokens, 3), torch.randn(10, 16, 8), torch.randn(10, 8, 16)]
    hidden, weights, up, down = (t.to(dtype).requires_grad_() for t in floats)
    return hidden, choices, weights, up, down


def plain_experts(hidden, experts, weights, up, down):
    inner = torch.einsum("td,tkid->tki", hidden, up[experts]).clamp(min=0) ** 2
    return torch.einsum("tki,tkdi,tk->td", inner, down[experts], weights)


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_experts_and_their_gradients_equal_a_sum_over_choices(tokens):
    hidden, experts, weights, up, down = expert_inputs(tokens)
    expected = plain_experts(hidden, experts, weights, up, down)
    output = routed_experts(hidden, experts, weights, up, down)
    torch.testing.assert_close(output, expected)
    with torch.no_grad():
        torch.testing.assert_close(routed_experts(hidden, experts, weights, up, down), expected)
        torch.testing.assert_close(experts_gathered(hidden, experts, weights, up, down), expected)
    grad = torch.randn_like(output)
    inputs = [hidden, weights, up, down]
    wanted = torch.autograd.grad(expected, inputs, grad)
    for ours, theirs in zip(torch.autograd.grad(output, inputs, grad), wanted):
        torch.testing.assert_close(ours, theirs)
    for needed in ([0], [1], [2], [3]):  # whatever is frozen
        given = [t if i in needed else t.detach() for i, t in enumerate(inputs)]
        output = routed_experts(given[0], experts, *given[1:])
        torch.testing.assert_close(torch.autograd.grad(output, [inputs[i] for i in needed], grad)[0], wanted[needed[0]])


def test_sorted_rows_are_filled_up():
    experts = torch.cat([torch.tensor([[0, 2]]).expand(9, 2), torch.tensor([[2, 3]])])  # 9, 0, 10 and 1 rows
    tokens, places, spans = sort_by_expert(experts, 4, 2)
    assert spans == [(0, 0, 10), (2, 10, 20), (3, 20, 21)]
    assert tokens.tolist() == [*range(9), 0, *range(10), 9]
    assert torch.equal(tokens[places], torch.arange(10)[:, None].expand(10, 2))
    expert_of_row = torch.tensor([e for e, start, stop in spans for _ in range(start, stop)])
    assert torch.equal(expert_of_row[places], experts)


def test_grouped_experts_equal_the_sorted_ones():
    hidden, experts, weights, up, down = expert_inputs(40, torch.float32)
    expected = plain_experts(hidden, experts, weights, up, down)
    output = experts_grouped(hidden, experts, weights, up, down)
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
    grad, inputs = torch.randn_like(output), [hidden, weights, up, down]
    for ours, theirs in zip(torch.autograd.grad(output, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("tokens", [40, 200])  # 200: experts have rows enough to be filled up
def test_experts_in_bfloat16_and_under_autocast(tokens):
    exact = [t.detach() for t in expert_inputs(tokens)]
    expected = plain_experts(*exact)
    halves = [t if t.dtype == torch.long else t.bfloat16() for t in exact]
    floats = [t if t.dtype == torch.long else t.float() for t in exact]
    with torch.autocast("cpu", torch.bfloat16):
        cast = routed_experts(*floats)
    reference = sum(  # what one product per choice gives in bfloat16
        (relu2((halves[3][halves[1][:, k]] @ halves[0][..., None])) * halves[2][:, k, None, None]).transpose(1, 2)
        @ halves[4][halves[1][:, k]].transpose(1, 2)
        for k in range(3)
    )[:, 0]
    allowed = 1.5 * (reference - expected).abs().mean()
    for output in (routed_experts(*halves), cast):
        assert output.dtype == torch.bfloat16
        assert (output - expected).abs().mean() < allowed


def test_router_is_float32_under_autocast():
    router = TopKRouter(OmniTextConfig(**LLM))
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(50, router.config.hidden_size)
    expected = router(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(hidden)
    assert torch.equal(cast[0], expected[0]) and torch.equal(cast[1], expected[1])


def test_compiled_experts_never_form_the_gathered_weights():
    """The compiler reads the chosen experts' weights inside its sums: no buffer holds [T, K, I, D] of them."""
    inductor = pytest.importorskip("torch._inductor.utils")
    inputs = [t.detach() for t in expert_inputs(2, torch.float32)]
    with torch.no_grad():
        compiled = torch.compile(routed_experts, fullgraph=True)
        output, (code,) = inductor.run_and_get_code(compiled, *inputs)
        torch.testing.assert_close(output, plain_experts(*inputs), atol=1e-4, rtol=1e-4)
    assert "2, 3, 16, 8" not in code and "2, 3, 8, 16" not in code


@pytest.mark.parametrize("tokens", [1, 3, 5])  # 5: the library's product again
@pytest.mark.parametrize("bias", [False, True])
def test_compiled_products_of_few_tokens(tokens, bias):
    torch._dynamo.reset()
    torch.manual_seed(tokens)
    layer, weight = torch.nn.Linear(48, 40, bias).requires_grad_(False), torch.rand(48)
    x = torch.randn(1, tokens, 48)
    compiled = torch.compile(lambda x: linear(layer, rms_norm(x, weight, 1e-5)), dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(rms_norm(x, weight, 1e-5)), atol=1e-5, rtol=1e-5)


# ---- attention ----


def attention_reference(query, key, value, mask):
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double().repeat_interleave(groups, 1), value.double()
    scores = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value.repeat_interleave(groups, 1)).transpose(1, 2)


def attention_tensors(length, keys, dtype, batch=2):
    torch.manual_seed(keys)
    return [torch.randn(batch, heads, n, 8).to(dtype) for heads, n in ((6, length), (2, keys), (2, keys))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (1, 70), (70, 70), (33, 70)])
def test_causal_attention(length, keys, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK_ROWS", 16)
    monkeypatch.setattr(kernels, "BLOCK_SCORES", 2 * 6 * 50 * 7)  # the last blocks are smaller
    query, key, value = attention_tensors(length, keys, dtype)
    mask = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
    expected = attention_reference(query, key, value, mask)
    output = causal_attention(query, key, value)
    if dtype == torch.float32:
        torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
        return
    fused = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True).transpose(1, 2)
    assert (output - expected).abs().mean() < 2 * (fused - expected).abs().mean() + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_query_leaves_masked_keys_out(dtype):
    query, key, value = attention_tensors(1, 40, dtype)
    mask = torch.rand(2, 1, 1, 40) < 0.5
    mask[..., 3] = True
    expected = attention_reference(query, key, value, mask)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    added = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    for given in (mask, added):
        output = causal_attention(query, key, value, given)
        torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_see_only_themselves(dtype):
    query, key, value = (t.requires_grad_() for t in attention_tensors(40, 40, dtype))
    documents = [[13, 1, 26], [40]]
    numbers = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in documents])
    mask = (numbers[:, :, None] == numbers[:, None]).tril()[:, None]
    expected = attention_reference(query, key, value, mask)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    trained = causal_attention(query, key, value, documents=documents)
    torch.testing.assert_close(trained.double(), expected, atol=tolerance, rtol=tolerance)
    with torch.no_grad():
        output = causal_attention(query, key, value, documents=documents)
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)
    if dtype == torch.float32:
        grad, inputs = torch.randn_like(trained), [query, key, value]
        for ours, theirs in zip(
            torch.autograd.grad(trained, inputs, grad), torch.autograd.grad(expected, inputs, grad.double())
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_masks_exist_only_where_they_must():
    config = OmniTextConfig(**LLM, hybrid_override_pattern="M*")
    config._attn_implementation = "sdpa"
    embeds = torch.zeros(2, 5, 32)

    def inputs(mask=None, cache=None, seq_idx=None, length=5):
        mask = None if mask is None else torch.tensor(mask)
        return attention_inputs(config, embeds[:, :length], mask, cache, None, seq_idx)

    padded = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert inputs() == inputs([[1] * 5] * 2) == {"documents": None, "keys": None}
    assert inputs(padded) == {"documents": [[2, 3], [5]], "keys": None}
    packed = torch.tensor([[0, 0, 1, 1, 1], [4, 5, 5, 5, 5]])
    assert inputs(seq_idx=packed)["documents"] == [[2, 3], [1, 4]]
    assert inputs([[1] * 4 + [0]] * 2, seq_idx=packed)["documents"] == [[2, 2, 1], [1, 3, 1]]
    assert inputs(cache=StaticCache(config, 64)) == {"documents": None, "keys": 5}
    # a hole in the middle, and padding in front of cached keys, cannot be cut into pieces
    assert inputs([[1, 0, 1, 1, 1]] * 2)["attention_mask"].shape == (2, 1, 5, 5)
    assert inputs([[0]] * 2, length=1)["attention_mask"].shape == (2, 1, 1, 1)


# ---- the whole model ----


def small_model(dtype=torch.float32, pattern="ME*M-*E"):
    config = OmniTextConfig(**LLM, hybrid_override_pattern=pattern)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = OmniLanguageModel(config)
    for module in model.modules():
        init_language_weights(module, config)
    return model.to(dtype).eval()


def test_bfloat16_prefill_and_decode_are_as_exact_as_transformers_attention():
    """Through a cache, in blocks and token by token; no router, whose choices flip on rounding."""
    model = small_model(torch.bfloat16, "M*M-*")
    exact = small_model(torch.float32, "M*M-*")
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(0, 160, (2, 90))

    def run(model):
        with torch.no_grad():
            cache, parts = None, []
            for part in ids.split([60, 26, 1, 1, 1, 1], 1):
                output = model(model.embeddings(part), past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                parts.append(output.last_hidden_state.float())
        return torch.cat(parts, 1)

    expected = run(exact)
    ours = (run(model) - expected).abs().mean()
    model.config._attn_implementation = "eager"
    assert ours < 1.2 * (run(model) - expected).abs().mean()


def test_training_keeps_few_bytes_of_a_mamba_layer():
    """Inputs of the norm, of in_proj's parts and of out_proj, y in float32, one state: nothing per pair of tokens."""
    model = small_model(pattern="M")
    x = torch.randn(1, 1024, 32, requires_grad=True)
    own = {t.untyped_storage().data_ptr() for t in model.parameters()}
    storages = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.layers[0](x)
    values = sum(storage.nbytes() for storage in storages.values()) / 4 / 1024
    inner, conv, heads = 64, 64 + 2 * 2 * 16, 8
    assert values < 2 * 32 + (inner + conv + heads) + conv + 3 * heads + 2 * inner + inner * 16 / 1024 + 4


def test_compiled_experts_of_many_tokens_are_not_compiled_anew():
    """More tokens than are gathered: how they fall on the experts must not be part of what is compiled."""
    torch._dynamo.reset()
    graphs, made = [], []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda hidden, *rest: routed_experts(hidden * 2, *rest) + 1, backend=count, dynamic=False)
    up, down = torch.randn(16, 6, 8), torch.randn(16, 8, 6)
    with torch.no_grad():
        for step in range(3):
            hidden, weights = torch.randn(GATHER_TOKENS + 1, 8), torch.rand(GATHER_TOKENS + 1, 2)
            experts = torch.randint(5 + step, (GATHER_TOKENS + 1, 2))
            output = compiled(hidden, experts, weights, up, down)
            torch.testing.assert_close(output, routed_experts(hidden * 2, experts, weights, up, down) + 1)
            made.append(len(graphs))
    assert made == [made[0]] * 3 and made[0] > 0


def test_loss_in_float16_survives_large_sums():
    hidden, head = torch.full((1, 64, 32), 60, dtype=torch.float16), torch.nn.Linear(32, 8, dtype=torch.float16)
    assert chunked_cross_entropy(hidden, head, torch.ones(1, 64, dtype=torch.long)).isfinite()


@pytest.mark.parametrize("padded", [False, True])
def test_compiled_decoding_gives_the_same_tokens(padded):
    """The real `generate`; the graph must be whole and fit every step. The compiler's back end is left out."""
    torch._dynamo.reset()
    model = tiny_model(pattern="ME*M-")
    ids = torch.randint(30, 160, (2, 9))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 7, "do_sample": False}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options, cache_implementation="static"), expected)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_config = CompileConfig(fullgraph=True, backend=count, mode="default")
    compile_config._compile_all_devices = True
    options |= {"cache_implementation": "static", "compile_config": compile_config}
    assert torch.equal(model.generate(ids, **options), expected)
    assert len(graphs) == 1
    operators = {str(node.target) for node in graphs[0].graph.nodes}
    assert not any("sort" in name or "nonzero" in name or "repeat_interleave" in name for name in operators)


def test_static_cache_works_with_beams():
    model = tiny_model(pattern="ME*M-")
    ids = torch.randint(30, 160, (2, 9))
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options, cache_implementation="static"), expected)


def test_the_switch_of_kernels(caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(ssd, "_reported", set())
    x = torch.zeros(1)
    with caplog.at_level(logging.INFO, "modeling_omni.ssd"):
        assert not any(cuda_kernels(name, x) for name in ("auto", "auto", "torch", "cuda"))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "language model kernels: plain PyTorch (kernels='auto', tensors on cpu)" and len(lines) == 3
    on_gpu = SimpleNamespace(device=torch.device("cuda"))  # all that the switch looks at
    monkeypatch.setattr(ssd, "_MISSING", ["mamba_ssm"])
    assert cuda_kernels("auto", on_gpu) and cuda_kernels("auto", on_gpu, "causal_conv1d")
    assert not cuda_kernels("auto", on_gpu, "mamba_ssm") and not cuda_kernels("torch", on_gpu)
    with pytest.raises(ImportError, match="mamba_ssm"):
        cuda_kernels("cuda", on_gpu)
    with pytest.raises(ValueError, match="'auto', 'torch' or 'cuda'"):
        cuda_kernels("triton", x)
    config = OmniTextConfig(**LLM, kernels="torch", hybrid_override_pattern="M")
    config.save_pretrained(tmp_path)
    assert config.kernels == "torch" and OmniTextConfig.from_pretrained(tmp_path).kernels == "auto"


@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="mamba_ssm is not installed")
def test_mamba_ssm_kernels_in_the_interpreter():
    """Needs mamba_ssm's Python files; `triton_worker.py` says how to get them without a GPU."""
    worker = Path(__file__).with_name("triton_worker.py")
    command, environment = [sys.executable, str(worker)], os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == ["scan", "scan", "step"]
    assert all(float(forward) < 1e-5 and float(backward) < 1e-4 for _, forward, backward in lines)
