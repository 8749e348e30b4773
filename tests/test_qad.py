"""Quantisation-aware distillation: the student computes as its packed form, the loss is the divergence, it recovers."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_quantization import SIZES, text_batch
from tiny_model import LLM, prompt_of, tiny_checkpoint, tiny_model

from modeling_omni import OmniForConditionalGeneration, OmniInputError
from modeling_omni.evaluation_quantization import cache_bytes, quantization_markdown, quantization_table
from modeling_omni.qad import QADArguments, TeacherLoss, chunked_kl, fake_quantize_model, train_qad
from modeling_omni.quantization import set_input_quantization
from modeling_omni.quantized_export import calibrate, export_checkpoint


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4", "nvfp4_coarse"])
def test_the_student_computes_what_its_packed_form_computes(recipe, tmp_path):
    wide = {"moe_shared_expert_intermediate_size": 48} if recipe == "nvfp4_coarse" else {}  # shared experts in 4 bits
    model = tiny_model(llm_config=SIZES["llm_config"] | wide)
    model.save_pretrained(tmp_path / "plain")
    amax = calibrate(model, [text_batch()])
    export_checkpoint(tmp_path / "plain", tmp_path / "packed", recipe, amax)
    packed = OmniForConditionalGeneration.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    set_input_quantization(packed, True)
    names = [name for name, _ in model.named_parameters()]
    assert fake_quantize_model(model, recipe, amax) > 3
    assert [name for name, _ in model.named_parameters()] == names
    batch = prompt_of(text_batch())
    with torch.no_grad():
        expected, logits = packed(**batch, use_cache=False).logits, model(**batch, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    loss = model(**text_batch(), use_cache=False).loss
    loss.backward()
    mixer = model.model.language_model.layers[1].mixer
    assert mixer.experts.up_proj.grad.abs().sum() > 0 and mixer.shared_experts.up_proj.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path / "saved")  # the student's own weights, plain
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "saved"))
    assert sorted(first) == sorted(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_the_loss_is_the_divergence_per_trained_token():
    teacher, student = tiny_model(0, **SIZES), tiny_model(1, **SIZES)
    loss_of = student.label_loss = TeacherLoss(teacher)
    batch = text_batch()
    with pytest.raises(RuntimeError, match="has not seen"):
        student(**batch, use_cache=False)
    loss_of.see(batch)
    loss = student(**batch, use_cache=False, skip_logits=True).loss
    trained = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        p, q = (m(**prompt_of(batch), use_cache=False).logits[:, :-1][trained] for m in (teacher, student))
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(loss, kl.mean(), rtol=1e-4, atol=1e-5)
    loss_of.see(batch)
    half = student(**batch, use_cache=False, skip_logits=True, num_items_in_batch=2 * len(kl)).loss
    torch.testing.assert_close(half, kl.mean() / 2, rtol=1e-4, atol=1e-5)
    states = torch.randn(11, 32, requires_grad=True)
    whole = chunked_kl(states, student.lm_head, states.detach() + 1, teacher.lm_head)
    parts = chunked_kl(states, student.lm_head, states.detach() + 1, teacher.lm_head, chunk=4)
    torch.testing.assert_close(whole, parts)
    (gradient,) = torch.autograd.grad(parts, states)
    logs = student.lm_head(states).log_softmax(-1), teacher.lm_head(states.detach() + 1).log_softmax(-1).detach()
    (expected,) = torch.autograd.grad((logs[1].exp() * (logs[1] - logs[0])).sum(), states)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(F.softmax(q, -1).sum(-1), torch.ones(len(q)))


def arguments(folder, start, **changes):
    return QADArguments(**{
        "output_dir": str(folder), "model": start, "processor": "nano", "data": [{"path": "nano:text_copy"}],
        "weight_of": "rows", "row_tokens": 96, "global_batch_size": 2, "micro_batch_size": 2, "steps": 4,
        "save_every": 2, "format": "nvfp4_all", "calibration_rows": 2, "learning_rate": 3e-3, "workers": 0,
        "warmup_fraction": 0.0, "eval_samples": 0, "report_to": [], "log_every": 1, "train": ["language"],
    } | changes)  # fmt: skip


def test_a_stage_recovers_resumes_and_leaves_a_packed_checkpoint(tmp_path):
    changes = {"llm_config": LLM | {"hybrid_override_pattern": "ME*", "moe_intermediate_size": 32, "vocab_size": 512,
                              "moe_shared_expert_intermediate_size": 48}}  # fmt: skip
    start = tiny_checkpoint(tmp_path / "start", **changes)
    train_qad(arguments(tmp_path / "whole", start, steps=8))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    # killed after step 2 and started again: the same bits
    train_qad(arguments(tmp_path / "halves", start, steps=2))
    (tmp_path / "halves" / "final").rename(tmp_path / "old")
    train_qad(arguments(tmp_path / "halves", start, steps=8))
    whole, halves = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "halves"))
    assert whole.keys() == halves.keys() and all(torch.equal(whole[name], halves[name]) for name in whole)
    packed = OmniForConditionalGeneration.from_pretrained(tmp_path / "whole" / "packed", dtype=torch.float32).eval()
    assert packed.model.language_model.layers[2].mixer.q_proj.weight.dtype == torch.uint8
    assert "qad" in (tmp_path / "whole" / "final" / "README.md").read_text()
    # against labels (QAT): the same stage, the loss is the cross-entropy
    (tmp_path / "labels").mkdir()  # scales of a start with other data, that was stopped before its first checkpoint
    save_file({"old": torch.ones(())}, tmp_path / "labels" / "scales.safetensors")
    train_qad(arguments(tmp_path / "labels", start, steps=1, loss="labels"))
    found = [load_file(tmp_path / name / "scales.safetensors") for name in ("labels", "whole")]
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    line = json.loads((tmp_path / "labels" / "log.jsonl").read_text().splitlines()[0])
    assert line["loss"] > 3  # of a random model; the divergence begins far below
    assert losses[0] < 1
    with pytest.raises(OmniInputError, match="packed weights do not train"):
        train_qad(arguments(tmp_path / "packed", str(tmp_path / "whole" / "packed")))


def test_stages_that_cannot_be(tmp_path):
    for changes, match in (
        ({"format": "int4"}, "format"),
        ({"format": "nvfp4_all", "model": tiny_checkpoint(tmp_path / "odd"), "output_dir": str(tmp_path / "a")}, "16"),
        ({"loss": "mse"}, "loss"),
        ({"lora": {"r": 4}}, "lora"),
        ({"context_parallel": 2}, "context_parallel"),
    ):
        with pytest.raises(OmniInputError, match=match):
            train_qad(arguments(tmp_path, "nano", **changes))


def test_the_table_measures_what_it_is_asked_for(tmp_path):
    """With other rows for calibration, or other weights, in the same folder: not what was exported before."""
    options = {"skills": ["text_copy"], "samples": 1, "sources": ["nano:text_copy"], "row_tokens": 128}
    (tmp_path / "out").mkdir()
    first = quantization_table("nano", tmp_path / "out", ["fp8"], rows=1, **options)
    scales = tmp_path / "out" / "scales.safetensors"
    before = scales.read_bytes()
    assert quantization_table("nano", tmp_path / "out", ["fp8"], rows=1, **options)[0]["table"] == first[0]["table"]
    assert scales.read_bytes() == before
    quantization_table("nano", tmp_path / "out", ["fp8"], rows=2, **options)
    exported = load_file(tmp_path / "out" / "fp8" / "model.safetensors")
    now, name = load_file(scales), "language_model.backbone.layers.0.mixer.in_proj.input_scale"
    assert scales.read_bytes() != before and exported[name] == now[name] / 448
    (tmp_path / "mine" / "fp8").mkdir(parents=True)
    with pytest.raises(OmniInputError, match="already there"):
        quantization_table("nano", tmp_path / "mine", ["fp8"], rows=1, **options)


def test_the_table_of_formats():
    config = tiny_model(**SIZES).config.llm_config
    assert cache_bytes(config, True)[0] == 2 * 2 * 8 * 1 and cache_bytes(config, False)[0] == 2 * 2 * 8 * 2
    assert cache_bytes(config, True)[1] == 2 * (4 * 64 * 16 + 2 * (64 + 2 * 2 * 16) * 4)
    rows = [
        {"name": name, "bytes": size, "cache": [cache, 0], "settings": {"samples": 4}, "table": [
            {"skill": "text_copy", "outcomes": outcomes},
            {"skill": "image_where", "outcomes": [True, True, False, False]},
            {"skill": "speech_words", "skipped": "no words"},
        ]} for name, size, cache, outcomes in (
            ("bf16", 2_000_000, 64, [True] * 4), ("nvfp4", 1_000_000, 32, [True, True, True, False]),
        )
    ]  # fmt: skip
    text = quantization_markdown(rows)
    assert "| bf16 | 2.00 | 64 | 100.0 | 50.0 |  |  | 75.0 |  |  |  |" in text
    assert "| nvfp4 | 1.00 | 32 | 75.0 | 50.0 |  |  | 62.5 | -12.5 |" in text and "speech_words" in text
