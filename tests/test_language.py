"""The language model against transformers' NemotronH, a float64 recurrence and itself (cache, padding, packing)."""

import pytest
import torch
from tiny_model import LLM
from transformers import NemotronHConfig, NemotronHForCausalLM

from modeling_omni.configuration_omni import OmniTextConfig
from modeling_omni.modeling_language import (
    MoE,
    OmniLanguageModel,
    causal_conv1d,
    init_language_weights,
    ssd_scan,
    ssd_step,
)

SIZES = LLM | {"vocab_size": 97, "chunk_size": 16}


def make_pair(pattern="MEM*EM-*E", **changes):
    """Our model and the native one with the same random weights."""
    torch.manual_seed(0)
    sizes = SIZES | changes
    native_config = NemotronHConfig(hybrid_override_pattern=pattern, **sizes)
    native_config._attn_implementation = "eager"
    native = NemotronHForCausalLM(native_config).eval()
    for parameter in native.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    for name, buffer in native.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn_like(buffer))
    for module in native.modules():
        if hasattr(module, "dt_bias"):
            module.dt_bias.data.fill_(0.5)  # dt far above the native class's clamp at time_step_min
    config = OmniTextConfig(hybrid_override_pattern=pattern, **sizes)
    config._attn_implementation = "eager"
    model = OmniLanguageModel(config).eval()
    model.load_state_dict(native.model.state_dict())
    return model, native


@pytest.mark.parametrize("changes", [{}, {"n_group": 4, "topk_group": 2}, {"moe_latent_size": 20}], ids=str)
def test_prefill_equals_native(changes):
    model, native = make_pair(**changes)
    ids = torch.randint(0, 97, (2, 75))
    with torch.no_grad():
        expected = native.model(ids).last_hidden_state
        actual = model(model.embeddings(ids)).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_decode_equals_native():
    model, native = make_pair()
    ids = torch.randint(0, 97, (2, 24))
    ours = theirs = None
    with torch.no_grad():
        for part in ids.split([17, 1, 1, 1, 1, 1, 1, 1], 1):
            expected = native.model(part, past_key_values=theirs, use_cache=True)
            actual = model(model.embeddings(part), past_key_values=ours, use_cache=True)
            ours, theirs = actual.past_key_values, expected.past_key_values
            torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, atol=1e-4, rtol=1e-4)


def test_dt_clamp_follows_the_config_where_native_does_not():
    """The native class clamps dt at time_step_min while it prefills; ours follows time_step_limit (here: no clamp)."""
    model, native = make_pair("MM")
    for layer in (*model.layers, *native.model.layers):
        layer.mixer.dt_bias.data.fill_(-12.0)  # softplus(-12) = 6e-6, far below 0.001
    ids = torch.randint(0, 97, (1, 40))
    with torch.no_grad():
        ours = model(model.embeddings(ids)).last_hidden_state
        one_by_one, cache = [], None
        for token in ids.split(1, 1):
            output = model(model.embeddings(token), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            one_by_one.append(output.last_hidden_state)
        prefill = native.model(ids, use_cache=False).last_hidden_state
        for layer in model.layers:
            layer.mixer.time_step_limit = (0.001, float("inf"))
        clamped = model(model.embeddings(ids)).last_hidden_state
    torch.testing.assert_close(torch.cat(one_by_one, 1), ours, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(clamped, prefill, atol=1e-4, rtol=1e-4)
    assert (ours - prefill).abs().max() > 1e-4  # ten times what the two tests above allow


def recurrence(x, dt, A, B, C, state, documents):
    """The definition, token by token in float64."""
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    per_group = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(per_group, 2), C.repeat_interleave(per_group, 2)
    state = state.double().clone()
    outputs = []
    for t in range(x.shape[1]):
        if t and documents is not None:
            state[documents[:, t] != documents[:, t - 1]] = 0
        state = state * (dt[:, t] * A).exp()[..., None, None]
        state = state + (x[:, t] * dt[:, t, :, None])[..., None] * B[:, t, :, None]
        outputs.append((state * C[:, t, :, None]).sum(-1))
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("length", [1, 5, 16, 37, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_scan_equals_the_recurrence(length, packed):
    torch.manual_seed(length)
    x = torch.randn(2, length, 6, 5)
    dt = torch.rand(2, length, 6) * 2
    A = -torch.rand(6) * 3
    B, C = torch.randn(2, length, 3, 7), torch.randn(2, length, 3, 7)
    state = torch.randn(2, 6, 5, 7)
    documents = (torch.rand(2, length) < 0.15).cumsum(1) if packed else None
    if packed:
        state = torch.zeros_like(state)
    y, last = ssd_scan(x, dt, A, B, C, None if packed else state, documents, chunk=16)
    expected, expected_last = recurrence(x, dt, A, B, C, state, documents)
    torch.testing.assert_close(y.double(), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(last.double(), expected_last, atol=2e-5, rtol=1e-4)


def test_step_equals_the_scan():
    torch.manual_seed(0)
    x, dt, A = torch.randn(2, 1, 6, 5), torch.rand(2, 1, 6), -torch.rand(6)
    B, C, state = torch.randn(2, 1, 3, 7), torch.randn(2, 1, 3, 7), torch.randn(2, 6, 5, 7)
    expected, expected_state = ssd_scan(x, dt, A, B, C, state)
    y = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state)
    torch.testing.assert_close(y, expected[:, 0])
    torch.testing.assert_close(state, expected_state)


def test_convolution_equals_conv1d():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 9, 6), torch.randn(6, 4), torch.randn(6)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    expected = torch.nn.functional.silu(torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=6))
    torch.testing.assert_close(causal_conv1d(x, weight, bias).transpose(1, 2), expected)
    short = causal_conv1d(x[:, :2], weight, bias, torch.tensor([[0, 1], [4, 4]]))
    torch.testing.assert_close(short[0, 1:], causal_conv1d(x[:1, 1:2], weight, bias)[0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_does_not_change_a_row(attention):
    model, _ = make_pair()
    model.config._attn_implementation = attention
    ids = torch.randint(0, 97, (2, 30))
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :11] = 0
    with torch.no_grad():
        batch = model(model.embeddings(ids), mask, use_cache=True)
        single = model(model.embeddings(ids[:1, 11:]), use_cache=True)
        torch.testing.assert_close(batch.last_hidden_state[:1, 11:], single.last_hidden_state, atol=1e-5, rtol=1e-4)
        step = torch.randint(0, 97, (2, 1))
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        batch = model(model.embeddings(step), mask, batch.past_key_values, use_cache=True)
        single = model(model.embeddings(step[:1]), None, single.past_key_values, use_cache=True)
        torch.testing.assert_close(batch.last_hidden_state[:1], single.last_hidden_state, atol=1e-5, rtol=1e-4)
        right = model(model.embeddings(ids), mask[:, :30].flip(1))
        alone = model(model.embeddings(ids[:1, :19]))
        torch.testing.assert_close(right.last_hidden_state[:1, :19], alone.last_hidden_state, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_see_only_themselves(attention):
    model, _ = make_pair()
    model.config._attn_implementation = attention
    lengths = [13, 1, 40, 2, 21]
    documents = [torch.randint(0, 97, (1, n)) for n in lengths]
    seq_idx = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], 1)
    packed = model(model.embeddings(torch.cat(documents, 1)), seq_idx=seq_idx).last_hidden_state
    single = torch.cat([model(model.embeddings(document)).last_hidden_state for document in documents], 1)
    torch.testing.assert_close(packed, single, atol=1e-5, rtol=1e-4)
    parameters = list(model.parameters())
    weights = torch.randn_like(packed)
    packed_grads = torch.autograd.grad((packed * weights).sum(), parameters, allow_unused=True)
    single_grads = torch.autograd.grad((single * weights).sum(), parameters, allow_unused=True)
    for ours, expected in zip(packed_grads, single_grads):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_prefill_in_pieces_equals_one_pass():
    model, _ = make_pair()
    ids = torch.randint(0, 97, (2, 60))
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :25] = 0  # the first pieces of row 0 are nothing but padding
    with torch.no_grad():
        expected = model(model.embeddings(ids), mask, use_cache=True).last_hidden_state
        cache, parts = None, []
        for start in range(0, 60, 7):
            stop = min(start + 7, 60)
            embeds = model.embeddings(ids[:, start:stop])
            output = model(embeds, mask[:, :stop], cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.last_hidden_state)
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)


def test_experts_equal_a_loop_over_tokens():
    config = OmniTextConfig(hybrid_override_pattern="E", **SIZES)
    moe = MoE(config)
    for module in moe.modules():
        init_language_weights(module, config)
    moe.gate.e_score_correction_bias.copy_(torch.randn(8))
    hidden = torch.randn(3, 4, 32)
    with torch.no_grad():
        actual = moe(hidden)
        for row in range(3):
            for place in range(4):
                token = hidden[row, place]
                scores = (moe.gate.weight @ token).sigmoid()
                chosen = (scores + moe.gate.e_score_correction_bias).topk(3).indices
                weights = scores[chosen] / scores[chosen].sum() * 2.5
                expected = moe.shared_experts(token)
                for expert, weight in zip(chosen, weights):
                    inner = (moe.experts.up_proj[expert] @ token).relu().square()
                    expected = expected + weight * (moe.experts.down_proj[expert] @ inner)
                torch.testing.assert_close(actual[row, place], expected, atol=1e-5, rtol=1e-4)


def test_start_values_are_finite_and_of_the_right_size():
    config = OmniTextConfig(hybrid_override_pattern="MEM*E-", **SIZES)
    torch.manual_seed(0)
    model = OmniLanguageModel(config)
    for module in model.modules():
        init_language_weights(module, config)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    dt = torch.nn.functional.softplus(model.layers[0].mixer.dt_bias)
    assert 1e-4 <= dt.min() and dt.max() <= 0.1 + 1e-6
