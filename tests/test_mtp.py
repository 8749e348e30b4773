"""Heads of multi-token prediction: against transformers' layers, in the released layout, trained, drafting; and what
drafts must not change: greedy and sampled answers, scores, caches."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_model import LLM, collate, make_sample, randomize, tiny_config
from transformers import LogitsProcessorList, NemotronHConfig, NemotronHForCausalLM
from transformers.cache_utils import DynamicCache

from modeling_omni import OmniForCausalLM, OmniForConditionalGeneration, OmniProcessor
from modeling_omni.benchmark_drafts import markdown, measure
from modeling_omni.configuration_omni import OmniConfig, OmniTextConfig
from modeling_omni.generation_rows import Row, RowSampler
from modeling_omni.modeling_language import ssd_scan
from modeling_omni.modeling_mtp import mtp_loss
from modeling_omni.reasoning_budget import ReasoningBudget
from modeling_omni.ssd import ssd_advance
from modeling_omni.training import SFTArguments, load_arguments, train_sft

ROOT = Path(__file__).parents[1]

VOCAB = 6  # so small that a random head is right now and then
TEXT = LLM | {"vocab_size": VOCAB, "hybrid_override_pattern": "MEM*E", "pad_token_id": 0}
HEAD = {"num_nextn_predict_layers": 1, "moe_latent_size": 20}


def text_model(seed=0, **changes) -> OmniForCausalLM:
    model = randomize(OmniForCausalLM(OmniTextConfig(**TEXT | HEAD | changes)), seed).eval()
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="module")
def model():
    return text_model()


def prompts(count, length=9, seed=0):
    return torch.randint(1, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


# ---- the head ----


def norm(x, weight, eps=1e-5):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def test_head_equals_transformers_layers(model):
    """transformers' class has no such head; behind `eh_proj` it is a two-layer model whose last norm is the head's."""
    native = NemotronHForCausalLM(NemotronHConfig(**TEXT | HEAD | {"hybrid_override_pattern": "*E"})).eval().model
    state = {name: value for name, value in model.mtp.state_dict().items() if "final_layernorm" not in name}
    first = {name: state.pop(f"layers.0.{name}.weight") for name in ("enorm", "hnorm", "eh_proj")}
    state["norm_f.weight"] = model.mtp.layers[1].final_layernorm.weight
    state["embeddings.weight"] = model.get_input_embeddings().weight
    native.load_state_dict(state)
    hidden, embeds = torch.randn(2, 2, 11, 32, generator=torch.Generator().manual_seed(1)).unbind()
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        joined = torch.cat([norm(embeds, first["enorm"]), norm(hidden, first["hnorm"])], -1) @ first["eh_proj"].T
        expected = native(inputs_embeds=joined, attention_mask=mask, use_cache=False).last_hidden_state
        actual = model.mtp(hidden, embeds, attention_mask=mask)
        cache = model.mtp.new_cache()
        parts = [model.mtp(hidden[:, a:b], embeds[:, a:b], 0, mask[:, :b], cache) for a, b in ((0, 7), (7, 8), (8, 11))]
    real = mask.bool()
    torch.testing.assert_close(actual[real], expected[real], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat(parts, 1)[real], expected[real], atol=1e-5, rtol=1e-4)


def test_depths_have_layers_of_their_own_and_the_last_repeats():
    model = text_model(num_nextn_predict_layers=2, mtp_hybrid_override_pattern="*-")
    assert [layer.kind for layer in model.mtp.layers] == ["*", "-", "*", "-"]
    assert [hasattr(layer, "eh_proj") for layer in model.mtp.layers] == [True, False, True, False]
    assert [hasattr(layer, "final_layernorm") for layer in model.mtp.layers] == [False, True, False, True]
    hidden, embeds = torch.randn(2, 1, 5, 32)
    outputs = [model.mtp(hidden, embeds, depth) for depth in range(3)]
    assert not torch.allclose(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[2])


def test_loss_is_that_of_the_token_after_the_next(model):
    ids = prompts(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = ids.masked_fill(mask == 0, -100).index_fill(1, torch.tensor([5]), -100)
    with torch.no_grad():
        output = model.model(ids, mask, use_cache=False)
        embeds, hidden = model.get_input_embeddings()(ids), output.last_hidden_state
        actual = mtp_loss(model.mtp, model.lm_head, hidden, embeds, labels, mask, depths=2)
        expected = []
        for depth in range(2):
            hidden = model.mtp(hidden, F.pad(embeds, (0, 0, 0, depth + 1))[:, depth + 1 :], 0, mask)
            logits, far = model.lm_head(hidden), depth + 2
            expected.append([
                F.cross_entropy(logits[row, t], labels[row, t + far])
                for row in range(2) for t in range(12 - far) if mask[row, t] and labels[row, t + far] != -100
            ])  # fmt: skip
    means = [torch.stack(losses).mean() for losses in expected]
    torch.testing.assert_close(actual, sum(means) / 2, atol=1e-5, rtol=1e-5)


def test_packed_rows_have_the_loss_of_single_rows(model):
    ids = prompts(2, 8)
    packed, seq_idx = ids.reshape(1, 16), torch.arange(16)[None] // 8
    labels = ids.clone()
    labels[:, 0] = -100

    def loss(ids, labels, seq_idx=None):
        model.zero_grad()
        loss = model(ids, labels=labels, seq_idx=seq_idx, use_cache=False, num_items_in_batch=1, skip_logits=True).loss
        loss.backward()
        return loss.detach(), model.mtp.layers[0].eh_proj.weight.grad.clone()

    one, grad = loss(packed, labels.reshape(1, 16), seq_idx)
    others = [loss(ids[i : i + 1], labels[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(one, others[0][0] + others[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad, others[0][1] + others[1][1], atol=1e-5, rtol=1e-4)


def test_what_is_trained_decides_the_loss():
    model = text_model()
    ids = prompts(2)
    whole = model(ids, labels=ids, use_cache=False).loss
    with torch.no_grad():
        plain = model(ids, labels=ids, use_cache=False).loss
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("mtp."))
    own = model(ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(whole, plain + 0.1 * own)
    own.backward()
    assert all((p.grad is not None) == n.startswith("mtp.") for n, p in model.named_parameters() if "gate" not in n)
    model.mtp.requires_grad_(False)
    assert torch.equal(model(ids, labels=ids, use_cache=False).loss, plain)


# ---- config and layout ----


def test_config_keys():
    config = OmniTextConfig(num_nextn_predict_layers=1, mtp_layers_block_type=["attention", "moe", "mlp"])
    assert config.mtp_hybrid_override_pattern == "*E-"
    assert config.to_dict()["mtp_hybrid_override_pattern"] == "*E-"
    assert not [key for key in OmniTextConfig().to_dict() if "mtp" in key or "nextn" in key]
    with pytest.raises(ValueError, match=r"mamba.*may have the layers"):
        OmniTextConfig(num_nextn_predict_layers=1, mtp_layers_block_type=["mamba"])
    native = NemotronHConfig(num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E").to_dict()
    assert OmniTextConfig(**native).mtp_hybrid_override_pattern == "*E"


SUPER = {  # nvidia/NVIDIA-Nemotron-3-Super-120B-A12B
    "hybrid_override_pattern": "MEMEMEM*EMEMEMEM*EMEMEMEM*" + 4 * "EMEMEMEMEM*" + "EMEMEMEM*EMEMEMEME",
    "hidden_size": 4096,
    "mamba_num_heads": 128,
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
    "moe_latent_size": 1024,
    "moe_intermediate_size": 2688,
    "moe_shared_expert_intermediate_size": 5376,
    "routed_scaling_factor": 5.0,
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E",
}


def test_super_is_built_at_full_size():
    with torch.device("meta"):
        model = OmniForCausalLM._from_config(OmniTextConfig(**SUPER), dtype=torch.bfloat16)
    head = sum(p.numel() for p in model.mtp.parameters())
    trunk = sum(p.numel() for p in model.parameters()) - head
    assert round(trunk / 1e9, 1) == 120.7  # "120B"
    assert model.mtp.layers[1].mixer.experts.up_proj.shape == (512, 2688, 1024)
    assert model.mtp.layers[0].eh_proj.weight.shape == (4096, 8192)


HEAD_NAMES = [
    "layers.0.eh_proj.weight",
    "layers.0.enorm.weight",
    "layers.0.hnorm.weight",
    *(f"layers.0.mixer.{part}_proj.weight" for part in "koqv"),
    "layers.0.norm.weight",
    "layers.1.final_layernorm.weight",
    *(f"layers.1.mixer.experts.{e}.{part}_proj.weight" for e in range(8) for part in ("down", "up")),
    "layers.1.mixer.fc1_latent_proj.weight",
    "layers.1.mixer.fc2_latent_proj.weight",
    "layers.1.mixer.gate.e_score_correction_bias",
    "layers.1.mixer.gate.weight",
    "layers.1.mixer.shared_experts.down_proj.weight",
    "layers.1.mixer.shared_experts.up_proj.weight",
    "layers.1.norm.weight",
]


def saved_names(folder) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sorted(file.keys())


def test_text_checkpoints_in_the_released_layout(model, tmp_path):
    """What the native class saves is read, and it reads what is saved here but for the head, which it does not have."""
    model.save_pretrained(tmp_path)
    names = saved_names(tmp_path)
    assert [name for name in names if name.startswith("mtp.")] == [f"mtp.{name}" for name in HEAD_NAMES]
    assert {name.split(".")[0] for name in names} == {"backbone", "lm_head", "mtp"}
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["NemotronHForCausalLM"]
    again, report = OmniForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    native = NemotronHForCausalLM.from_pretrained(tmp_path).eval()
    ids = prompts(2)
    with torch.no_grad():
        expected = native(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    native.save_pretrained(tmp_path / "native")
    trunk = OmniForCausalLM.from_pretrained(tmp_path / "native").eval()
    with torch.no_grad():
        torch.testing.assert_close(trunk(ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def omni():
    """The tiny omni model with a head; six tokens are far likelier than the others: drafts are right now and then."""
    llm = LLM | {"hybrid_override_pattern": "ME*M-", "num_nextn_predict_layers": 1}
    model = randomize(OmniForConditionalGeneration(tiny_config(llm_config=llm))).eval()
    model.generation_config.pad_token_id = 0
    likely = torch.zeros(LLM["vocab_size"], 1)
    likely[50:56] = 4
    with torch.no_grad():
        model.lm_head.weight.mul_(likely + 0.01)
    return model


def test_omni_checkpoints_in_the_released_layout(omni, tmp_path):
    omni.save_pretrained(tmp_path)
    names = [name for name in saved_names(tmp_path) if "mtp." in name]
    assert names == [f"language_model.mtp.{name}" for name in HEAD_NAMES if "latent" not in name]
    again = OmniForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in omni.state_dict().items())
    config = OmniConfig.from_pretrained(tmp_path)
    config.llm_config.num_nextn_predict_layers = 0
    without, report = OmniForConditionalGeneration.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert without.mtp is None and not report["unexpected_keys"] and not report["missing_keys"]


# ---- drafts ----


def test_state_advances_as_in_the_scan():
    generator = torch.Generator().manual_seed(0)
    x, dt = torch.randn(2, 5, 6, 4, generator=generator), torch.rand(2, 5, 6, generator=generator)
    B, C = torch.randn(2, 2, 5, 3, 7, generator=generator)
    A, state = -torch.rand(6, generator=generator), torch.randn(2, 6, 4, 7, generator=generator)
    for tokens in (1, 3, 5):
        _, expected = ssd_scan(x[:, :tokens], dt[:, :tokens], A, B[:, :tokens], C[:, :tokens], state)
        actual = state.clone()
        ssd_advance(x[:, :tokens], dt[:, :tokens], A, B[:, :tokens], actual)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def both(model, ids=None, drafts=3, seed=None, **options):
    """(plain, drafted, counts) of one call of `generate`."""
    results, counts = [], Counter()
    for more in ({}, {"mtp_drafts": drafts, "mtp_counts": counts}):
        if seed is not None:
            torch.manual_seed(seed)
        made = {name: make() if name == "logits_processor" else make for name, make in options.items()}
        results.append(model.generate(ids, **made, **more))
    return *results, counts


@pytest.mark.parametrize("drafts", [1, 2, 5])
def test_greedy_answers_are_those_without_drafts(model, drafts):
    counts = Counter()
    for number, ids in enumerate(prompts(6)):
        options = {"max_new_tokens": 12 + number, "do_sample": False, "prefill_chunk_size": 4 if number % 2 else None}
        plain, drafted, own = both(model, ids[None, number:], drafts, **options)
        assert torch.equal(plain, drafted)
        assert own["tokens"] == plain.shape[1] - len(ids[number:]) - 1
        assert own["tokens"] - 1 <= own["passes"] + own["accepted"] <= own["tokens"] + 1
        counts += own
    assert 0 < counts["accepted"] < counts["drafted"] <= drafts * counts["passes"]


def test_a_batch_with_padding_and_ends(model):
    counts = Counter()
    for end in range(VOCAB):
        ids = prompts(2 + end % 2, 10, seed=end)
        mask = torch.ones_like(ids)
        for row, padding in enumerate((4, 0, 6)[: len(ids)]):
            ids[row, :padding], mask[row, :padding] = 0, 0
        options = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "eos_token_id": end}
        plain, drafted, own = both(model, ids, 2, **options)
        assert torch.equal(plain, drafted)
        counts += own
    assert counts["accepted"] > 0


def test_answers_about_media_are_those_without_drafts(omni):
    rows = [[3, ("image", 4, 6), 4, ("audio", [33]), 3], [("video", 2, 4, 4), 5], [7]]
    counts = Counter()
    for batch in ([rows[0]], [rows[1]], rows):
        inputs = collate([make_sample(row, seed) for seed, row in enumerate(batch)])
        plain, drafted, own = both(omni, None, 3, max_new_tokens=16, do_sample=False, **inputs)
        assert torch.equal(plain, drafted)
        counts += own
    assert counts["accepted"] > 0


def test_sampled_answers_are_those_of_the_same_seed(model):
    counts = Counter()
    options = {"do_sample": True, "max_new_tokens": 20, "temperature": 1.3, "top_k": 4}
    for seed in range(4):
        ids = prompts(1 + seed % 2, seed=seed)
        plain, drafted, own = both(model, ids, 3, seed=seed, **options)
        assert torch.equal(plain, drafted)
        counts += own
    assert 0 < counts["accepted"] < counts["drafted"]


def test_a_perfect_head_is_always_accepted_when_sampling():
    """Noise is shared with the drafts: where the head's distribution is the trunk's, every draft is right."""
    model = text_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # an even distribution, of trunk and head
    torch.manual_seed(0)
    counts = Counter()
    ids = model.generate(
        prompts(1), do_sample=True, max_new_tokens=21, mtp_drafts=3, mtp_counts=counts, eos_token_id=None
    )
    assert len(ids[0, 9:].unique()) > 3  # chance of fewer: below one in 10^6
    assert counts == {"passes": 5, "tokens": 20, "drafted": 15, "accepted": 15}


def test_processors_with_a_state_see_every_token_once(model):
    """`RowSampler` draws from generators of its own: one draw per token, or the seeds would give other answers."""
    ids = prompts(2, seed=5)
    rows = [Row({}, 15, temperature=1.0, seed=3), Row({}, 15, temperature=0.7, top_p=0.9, seed=4)]
    plain, drafted, counts = both(
        model, ids, 2, do_sample=False, max_new_tokens=15,
        logits_processor=lambda: LogitsProcessorList([RowSampler(rows, ids.device)]),
    )  # fmt: skip
    assert torch.equal(plain, drafted) and counts["passes"] > 0


def test_scores_logits_streams_and_the_cache_are_those_without_drafts(model):
    class Tokens:
        def __init__(self):
            self.ids = []

        def put(self, ids):
            self.ids += ids.flatten().tolist()

        def end(self):
            self.ids.append("end")

    ids, streams, results = prompts(1, seed=2), [Tokens(), Tokens()], []
    for stream, more in zip(streams, ({}, {"mtp_drafts": 3})):
        options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "top_k": 3}
        torch.manual_seed(0)
        results.append(model.generate(ids, streamer=stream, max_new_tokens=14, do_sample=True, **options, **more))
    plain, drafted = results
    assert streams[0].ids == streams[1].ids and len(streams[0].ids) == 9 + 14 + 1
    assert torch.equal(plain.sequences, drafted.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(drafted[name]), torch.stack(plain[name]), atol=1e-4, rtol=1e-4)
    caches = [result.past_key_values for result in results]
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 9 + 13
    for one, other in zip(caches[0].layers, caches[1].layers):
        for name in ("keys", "values"):
            if getattr(one, name, None) is not None:
                torch.testing.assert_close(getattr(other, name), getattr(one, name), atol=1e-4, rtol=1e-4)
        for name in ("conv_states", "recurrent_states"):
            if getattr(one, name, None):
                torch.testing.assert_close(getattr(other, name)[0], getattr(one, name)[0], atol=1e-4, rtol=1e-4)


def test_a_conversation_goes_on_in_its_cache(model):
    answers = []
    for more in ({}, {"mtp_drafts": 2}):
        cache = DynamicCache(config=model.config)
        ids = prompts(1, seed=8)
        for turn in range(3):
            ids = model.generate(ids, past_key_values=cache, max_new_tokens=7, do_sample=False, **more)
            ids = torch.cat([ids, prompts(1, 4, seed=turn)], 1)
        answers.append(ids)
    assert torch.equal(*answers)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The shipped nano with a head that was trained for a moment: everything else stays to the bit."""
    folder = tmp_path_factory.mktemp("mtp")
    args = load_arguments(SFTArguments, [
        "--config", str(ROOT / "configs/nano/mtp.yaml"), "--output_dir", str(folder), "--steps", "6", "--workers", "0",
        "--global_batch_size", "2", "--micro_batch_size", "2", "--data", '[{"path": "nano:text_copy"}]',
    ])  # fmt: skip
    train_sft(args)
    return folder


def test_training_changes_the_head_alone(trained):
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    shipped, own = (load_file(path / "model.safetensors") for path in (ROOT / "modeling_omni/nano", trained / "final"))
    assert all(torch.equal(value, own[name]) for name, value in shipped.items())
    assert {name.split(".layers.")[0] for name in own.keys() - shipped.keys()} == {"language_model.mtp"}
    assert all(value.isfinite().all() for value in own.values()) and lines[-1]["step"] == 6


def test_nano_writes_the_same_with_drafts_and_a_reasoning_budget(trained):
    nano = OmniForConditionalGeneration.from_pretrained(trained / "final", dtype=torch.float32).eval()
    processor = OmniProcessor.from_pretrained(trained / "final")
    picture = {"type": "image", "path": str(ROOT / "modeling_omni/nano/examples/shapes.png")}
    sound = {"type": "audio", "path": str(ROOT / "modeling_omni/nano/examples/digits.wav")}
    asked = [
        (["What is 3 + 4 + 2? Think step by step."], True, 4),
        (["What is 3 + 4 + 2? Think step by step."], True, None),
        (["Copy: banana split"], False, None),
        ([picture, "Describe the picture."], False, None),
        ([sound, "Which digits are spoken?"], False, None),
    ]
    counts = Counter()
    for parts, thinking, budget in asked:
        content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, enable_thinking=thinking,
            tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        options = {"max_new_tokens": 24, "do_sample": False, "suppress_tokens": [18]}
        if budget is not None:
            options["logits_processor"] = lambda ids=inputs["input_ids"], budget=budget: LogitsProcessorList(
                [ReasoningBudget(processor, ids, budget, 2)]
            )
        plain, drafted, own = both(nano, None, 2, **options, **inputs)
        assert torch.equal(plain, drafted)
        if budget is not None:
            assert ReasoningBudget(processor, inputs["input_ids"], budget, 2).forced_mask(plain).any()
        counts += own
    assert counts["passes"] > 0


def test_what_drafts_cannot_be_combined_with_is_refused(model):
    ids = prompts(1)
    refused = [
        ({"num_beams": 2}, "num_beams"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
        ({"stop_strings": "a"}, "stop_strings"),
        ({"mtp_drafts": -1}, "whole number"),
    ]
    for options, match in refused:
        with pytest.raises(ValueError, match=match):
            model.generate(ids, max_new_tokens=4, **{"mtp_drafts": 2} | options)
    with pytest.raises(ValueError, match="num_nextn_predict_layers is 0"):
        text_model(num_nextn_predict_layers=0).generate(ids, max_new_tokens=4, mtp_drafts=2)
    with pytest.raises(ValueError, match="num_nextn_predict_layers is 2"):
        text_model(num_nextn_predict_layers=2).generate(ids, max_new_tokens=4, mtp_drafts=2)


def test_the_measurement_runs(trained):
    model = OmniForConditionalGeneration.from_pretrained(trained / "final", dtype=torch.float32).eval()
    rows = measure(model, OmniProcessor.from_pretrained(trained / "final"), ["text_copy"], [2], samples=2)
    assert [row["drafts"] for row in rows] == [0, 2] and all(row["same"] for row in rows)
    assert rows[0]["passes"] == rows[0]["tokens"] == rows[1]["tokens"] <= rows[1]["passes"] + rows[1]["accepted"]
    table = markdown(rows).splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| text_copy"] * 2 + ["| all"] * 2
