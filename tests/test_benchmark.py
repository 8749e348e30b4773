"""Costs by arithmetic, against shapes on the meta device, PyTorch's counter and real caches; the benchmark runs."""

import json
import re

import pytest
import torch
from tiny_model import LLM, tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from modeling_omni import benchmark, benchmark_length
from modeling_omni.benchmark_peers import omni_config
from modeling_omni.benchmark_phases import PHASES, Case, Options
from modeling_omni.configuration_omni import OmniTextConfig
from modeling_omni.flops import (
    PAPER_CASES,
    cache_bytes,
    decode_bytes,
    layer_flops,
    prefill_flops,
    score_flops,
    train_flops,
    video_tokens,
    vision_flops,
)
from modeling_omni.modeling_language import OmniBlock
from modeling_omni.modeling_omni import OmniForConditionalGeneration
from modeling_omni.token_reduction import keep_schedule

# --- arithmetic


def products_by_shape(config: OmniTextConfig, kind: str) -> float:
    """Operations per token that the weights of a block say: two per weight, of the experts the chosen ones."""
    with torch.device("meta"):
        block = OmniBlock(config, config.hybrid_override_pattern.index(kind))
    total = 0
    for name, weight in block.named_parameters():
        if ".experts." in name:
            total += 2 * weight[0].numel() * config.num_experts_per_tok
        elif weight.dim() >= 2:  # the convolution counts its kernel per channel
            total += 2 * weight.numel()
    return total


@pytest.mark.parametrize("config", [OmniTextConfig(), OmniTextConfig(**LLM, moe_latent_size=20)], ids=["30b", "latent"])
def test_operations_per_token_are_those_of_the_shapes(config):
    for kind in "ME*":
        recurrence = 4 * config.mamba_intermediate_size * config.ssm_state_size if kind == "M" else 0
        assert layer_flops(config)[kind] == products_by_shape(config, kind) + recurrence, kind


def test_sums_of_the_30b():
    config = OmniTextConfig()
    per_token = layer_flops(config)
    total = sum(per_token[kind] for kind in config.hybrid_override_pattern)
    assert round(total / 1e9, 2) == 5.80 and round(per_token["head"] / 1e9, 2) == 0.70
    # every weight that a token meets once is two operations: 3.58 B active with embeddings and head, less the look-up
    recurrence = config.hybrid_override_pattern.count("M") * 4 * 4096 * 128
    assert (total - recurrence + per_token["head"]) / 2 == pytest.approx(3.58e9 - 131072 * 2688, rel=0.01)
    assert round(prefill_flops(config, 75_000)["scores"] / 1e12) == 276
    assert cache_bytes(config) == (6 * 2 * 2 * 128 * 2, 23 * (64 * 64 * 128 * 4 + 6144 * 4 * 2))
    # all experts are read where many tokens are decoded at once, six where one is
    few, many = (decode_bytes(config, batch, 0) for batch in (1, 1000))
    assert few == pytest.approx(2 * 3.58e9 - 2 * 131072 * 2688 + 2 * cache_bytes(config)[1], rel=0.01)
    assert many - 2000 * cache_bytes(config)[1] == pytest.approx(2 * (31.58e9 - 131072 * 2688), rel=0.01)


@pytest.mark.parametrize("kind", "*E-")
@torch.no_grad()
def test_operations_are_those_that_pytorch_counts(kind):
    config = tiny_config(pattern=kind).llm_config
    config._attn_implementation = "eager"
    block = OmniBlock(config, 0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(1, 24, config.hidden_size)
    with FlopCounterMode(display=False) as counter:
        block(hidden)
    scores = 2 * score_flops(config, 24) if kind == "*" else 0  # eager attention computes the upper half too
    assert counter.get_total_flops() == 24 * layer_flops(config)[kind] + scores


def test_operations_of_the_vision_tower():
    model = tiny_model()
    model.config.vision_config._attn_implementation = "eager"
    grid = torch.tensor([[1, 4, 6], [1, 2, 8]])
    with FlopCounterMode(display=False) as counter:
        model.get_image_features(torch.randn(40, 768), grid)
    table = counter.get_total_flops() / vision_flops(model.config, [24, 16])
    assert 1 <= table < 1.02  # what is above are the positions, interpolated


@torch.no_grad()
def test_cache_bytes_are_those_of_a_cache():
    model = tiny_model(pattern="ME*M-*")
    held = []
    for length in (10, 25):
        cache = DynamicCache(config=model.config.llm_config)
        model(input_ids=torch.randint(40, 160, (2, length)), past_key_values=cache)
        tensors = []
        for layer in cache.layers:
            values = [value for value in vars(layer).values() if isinstance(value, (torch.Tensor, dict))]
            tensors += [v for value in values for v in (value.values() if isinstance(value, dict) else [value])]
        held.append(sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor)) / 2)
    per_token, fixed = cache_bytes(model.config.llm_config, itemsize=4)
    assert held[1] - held[0] == 15 * per_token and held[0] == 10 * per_token + fixed


@pytest.mark.parametrize("name", PAPER_CASES)
def test_tokens_of_the_papers_video(name):
    """141k, 75k and 42k in the paper, "about"; visual tokens are exact, labels follow `counting_tokenizer`."""
    tubelets, rate, paper = PAPER_CASES[name]
    count = video_tokens(tubelets, rate)
    assert count["video"] == {141_000: 512 * 256, 75_000: 256 * 256, 42_000: 128 * 256}[paper]
    assert count["total"] == count["video"] + count["text"] == pytest.approx(paper, rel=0.025)
    assert count["text"] / (256 if tubelets else 512) == pytest.approx(32.5 if tubelets else 18.2, abs=0.3)


def test_reduction_reaches_the_factor_of_the_abstract():
    config = OmniTextConfig()
    count = video_tokens()
    full = prefill_flops(config, count["total"], count["video"])["total"]
    assert full == prefill_flops(config, count["total"])["total"]
    shares = keep_schedule(config.hybrid_override_pattern, 0.25)
    assert 3.7 < full / prefill_flops(config, count["total"], count["video"], shares)["total"] < 4.2
    assert train_flops(config, 8, 8) > 3 * (prefill_flops(config, 8)["total"] + 7 * layer_flops(config)["head"] - 1)


# --- benchmark


def test_every_phase_runs(tmp_path, capsys):
    """Quick sizes, every peer that can be here; that figures are right is for eyes, that none is missing for this."""
    out = tmp_path / "table.json"
    assert benchmark.main(["--quick", "--threads", "1,2", "--dtypes", "fp32", "--out", str(out)]) == 0
    table = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert {row["phase"] for row in written["rows"]} == set(PHASES)
    for row in written["rows"]:
        notes = {name: call["note"] for name, call in row["calls"].items() if call["note"]}
        assert not notes, (row["phase"], row["size"], notes)
        assert all(call["min"] > 0 and call["median"] >= call["min"] for call in row["calls"].values())
        assert f"| {row['phase']} | {row['size']} |" in table
    assert [(row["phase"], row["threads"]) for row in written["rows"] if row["threads"] == 1] == [("scan", 1)]
    for row in written["rows"]:  # memory is asked for in a copy of a process of its own, once
        asked = row["phase"] in ("scan", "train") and row["threads"] == 2
        held = [call["memory"] for call in row["calls"].values() if "memory" in call]
        assert len(held) == (2 if asked else 0) and all(0 <= peak < 100e6 for peak in held)
    for name in ("machine", "torch", "allocator", "load", "peaks", "load after", "seconds"):
        assert f"{name}: " in table


def test_profile_names_operators(capsys):
    assert (
        benchmark.main(["--quick", "--threads", "1", "--profile", "--phases", "prefill,train", "--dtypes", "fp32"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(re.search(r", fp32: .*mm \d+%", line) for line in lines)


def test_peers_that_fail_are_named():
    def fails():
        raise ValueError("no such\nkernel")

    case = Case("x", "fp32", {"ours": lambda: 0.5, "native": fails}, 1e9, missing={"llama.cpp": "not here"})
    options = Options("cpu", ["fp32"], True, 0.1)
    row = benchmark.run_case("prefill", case, 1, {"fp32": 4e9}, options)
    assert row["calls"]["native"] == {"note": "ValueError: no such kernel"} and row["calls"]["ours"]["share"] == 0.5
    lines = benchmark.markdown([row]).splitlines()
    assert "| 500 (500) ms | native | ValueError: no such kernel |  | 50 % of GEMM |" in lines[2]
    assert "| llama.cpp | not here |" in lines[3]
    skipped = {"phase": "prefill", "size": "x", "dtype": "fp32", "threads": 1, "skipped": "left out"}
    assert "left out" in benchmark.markdown([skipped])


def test_peers_are_held_against_our_fastest():
    times = {"ours": [3.0], "native": [4.0], "ours, compiled": [1.0], "native, compiled": [2.0], "llama.cpp": [1.5]}
    against = {name: benchmark.opponent(name, times) for name in times}
    for peer in ("native", "native, compiled", "llama.cpp"):
        assert against[peer] == "ours, compiled"
    assert against["ours, compiled"] == "ours" and against["ours"] is None


def test_peak_memory_is_what_a_call_adds():
    def call():
        torch.ones(50_000_000).add_(1)  # 200 MB, freed again

    call()
    assert 180e6 < benchmark.peak_memory(call, "cpu") < 260e6


def test_growth_with_the_length(capfd):
    assert benchmark_length.main(["--tokens", "64,192", "--chunk", "32"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("| tokens |") and lines[2].startswith("| 64 |") and "| 1.00 |" in lines[2]
    assert lines[3].startswith("| 192 |") and len(lines) == 4


def test_mid_is_the_hybrid_that_it_says():
    with torch.device("meta"):
        model = OmniForConditionalGeneration(omni_config("mid"))
    count = sum(p.numel() for p in model.model.language_model.parameters()) + model.lm_head.weight.numel()
    assert count // 10**6 == 228
    assert set(omni_config("mid").llm_config.hybrid_override_pattern) == set(OmniTextConfig().hybrid_override_pattern)
