"""The first SFT stage for real, small: arguments, packing, freezing, resuming, tower pre-training."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from modeling_omni.configuration_omni import OmniConfig
from modeling_omni.data import Blend, collate_packed, encode_row, pack_greedily
from modeling_omni.media import OmniInputError
from modeling_omni.modeling_omni import OmniForConditionalGeneration
from modeling_omni.pretraining import TowerArguments, pretrain_tower
from modeling_omni.processing_omni import OmniProcessor
from modeling_omni.training import GROUPS, SFTArguments, cosine_factor, group_of, load_arguments, train_sft

ROOT = Path(__file__).parents[1]
SKILLS = ["text_copy", "image_colour", "video_direction"]


@pytest.fixture(scope="module")
def tiny_yaml(tmp_path_factory):
    """Nano's configuration with every size cut down."""
    values = yaml.safe_load((ROOT / "configs/nano/model.yaml").read_text())
    values["llm_config"] |= {
        "hidden_size": 32,
        "hybrid_override_pattern": "M*E",
        "num_attention_heads": 2,
        "head_dim": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    }
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    values["vision_config"] |= small
    values["sound_config"] |= small | {"subsampling_conv_channels": 8, "projection_hidden_size": 16}
    values["projector_hidden_size"] = 32
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def stage(tiny_yaml, folder, **changes) -> SFTArguments:
    values = {
        "model_config": str(tiny_yaml),
        "processor": "nano",
        "output_dir": str(folder),
        "data": [{"path": f"nano:{skill}"} for skill in SKILLS],
        "steps": 6,
        "rows_per_step": 4,
        "save_every": 3,
        "eval_samples": 2,
        "log_every": 1,
        "workers": 0,
    }
    return SFTArguments(**values | changes)


def test_every_config_loads():
    files = sorted((ROOT / "configs").glob("*/*.yaml"))
    assert len(files) >= 5
    for file in files:
        text = file.read_text()
        for number, line in enumerate(text.splitlines(), 1):
            key = line.split("#")[0].strip()
            is_mapping = key.endswith(":") or key.startswith("- {")
            previous = text.splitlines()[number - 2].strip()
            commented = "#" in line or is_mapping or previous.startswith(("#", "- {")) or not key
            assert commented or line.startswith("  "), f"{file}:{number}: a key without a comment"
        if file.name == "model.yaml":
            OmniConfig(**yaml.safe_load(text))
        else:
            cls = TowerArguments if "tower:" in text.splitlines()[1] else SFTArguments
            load_arguments(cls, ["--config", str(file)])


def test_command_line_overrides_the_file_and_unknown_keys_are_errors(tmp_path):
    file = tmp_path / "stage.yaml"
    file.write_text("output_dir: a\nsteps: 5\n")
    args = load_arguments(SFTArguments, ["--config", str(file), "--steps", "7"])
    assert (args.output_dir, args.steps) == ("a", 7)
    file.write_text("output_dir: a\nstep: 5\n")
    with pytest.raises(ValueError, match=r"unknown keys \['step'\]"):
        load_arguments(SFTArguments, ["--config", str(file)])
    with pytest.raises(SystemExit):
        load_arguments(SFTArguments, ["--output_dir", "a", "--stepz", "3"])


def test_cosine_schedule():
    factors = [cosine_factor(step, 100, 0.1, 0.01) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert cosine_factor(100, 100, 0.1, 0.01) == pytest.approx(0.01)


def test_packing_keeps_every_item_and_the_capacity():
    torch.manual_seed(0)
    lengths = torch.randint(1, 90, (200,)).tolist()
    rows = pack_greedily(lengths, 128)
    assert sorted(item for row in rows for item in row) == list(range(200))
    assert all(sum(lengths[item] for item in row) <= 128 for row in rows)
    assert sum(lengths) / (128 * len(rows)) > 0.9
    assert pack_greedily([300, 5], 128) == [[0], [1]]


def test_packed_rows_equal_single_rows_in_loss_and_gradients(tiny_yaml):
    torch.manual_seed(0)
    model = OmniForConditionalGeneration(OmniConfig(**yaml.safe_load(tiny_yaml.read_text())))
    processor = OmniProcessor.from_pretrained("nano")
    blend = Blend([{"path": f"nano:{skill}"} for skill in SKILLS])
    samples = [encode_row(blend[place], processor) for place in range(7)]
    packed = collate_packed(samples, 256)
    assert packed["input_ids"].shape[0] < 7
    loss = model(**packed, skip_logits=True).loss
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    trained = sum(int((sample["labels"][:, 1:] != -100).sum()) for sample in samples)
    single = sum(model(**sample, skip_logits=True, num_items_in_batch=trained).loss for sample in samples)
    expected = torch.autograd.grad(single, list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(loss, single, atol=1e-5, rtol=1e-5)
    for ours, other in zip(grads, expected):
        if ours is not None:
            torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-4)


def test_resumed_run_equals_the_uninterrupted_one(tiny_yaml, tmp_path):
    train_sft(stage(tiny_yaml, tmp_path / "whole"))
    train_sft(stage(tiny_yaml, tmp_path / "cut"))
    for name in ("step-6", "final"):  # as if killed after step 3
        for file in sorted((tmp_path / "cut" / name).rglob("*"), reverse=True):
            file.unlink()
        (tmp_path / "cut" / name).rmdir()
    train_sft(stage(tiny_yaml, tmp_path / "cut"))
    whole, cut = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    lines = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert [line["loss"] for line in lines[3:6]] == [line["loss"] for line in lines[6:]]
    assert set(json.loads((tmp_path / "cut" / "heldout.jsonl").read_text().splitlines()[-1])) == {"step", *SKILLS}


def test_only_the_named_groups_change(tiny_yaml, tmp_path):
    train_sft(
        stage(tiny_yaml, tmp_path, train=["vision_projector", "head"], steps=3, data=[{"path": "nano:image_shape"}])
    )
    before = OmniForConditionalGeneration.from_pretrained(tmp_path / "step-3").state_dict()
    torch.manual_seed(0)
    start = OmniForConditionalGeneration(OmniConfig(**yaml.safe_load(tiny_yaml.read_text()))).state_dict()
    changed = {group_of(name) for name, value in start.items() if not torch.equal(value, before[name])}
    assert changed == {"vision_projector", "head"}
    with pytest.raises(ValueError, match="unknown parameter groups"):
        train_sft(stage(tiny_yaml, tmp_path / "other", train=["visoin"]))


def test_groups_cover_every_parameter(tiny_yaml):
    model = OmniForConditionalGeneration(OmniConfig(**yaml.safe_load(tiny_yaml.read_text())))
    assert {group_of(name) for name, _ in model.named_parameters()} == set(GROUPS)


def test_vision_tower_learns_and_goes_into_a_stage(tiny_yaml, tmp_path):
    args = TowerArguments(
        tower="vision",
        model_config=str(tiny_yaml),
        output_dir=str(tmp_path / "tower"),
        steps=50,
        samples_per_step=4,
        eval_every=50,
        workers=0,
        learning_rate=5e-3,
    )
    pretrain_tower(args)
    lines = [json.loads(line) for line in (tmp_path / "tower" / "log.jsonl").read_text().splitlines()]
    assert "colour" in lines[-1]["heldout"]
    tower = tmp_path / "tower" / "tower.safetensors"
    train_sft(stage(tiny_yaml, tmp_path / "sft", steps=1, towers={"vision": str(tower)}, train=["head"]))
    saved = OmniForConditionalGeneration.from_pretrained(tmp_path / "sft" / "final").state_dict()
    for name, value in load_file(tower).items():
        assert torch.equal(saved[name], value), name


def test_broken_rows_name_file_and_row(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"messages": []}\n{"message": 1}\n')
    blend = Blend([{"path": str(file)}])
    with pytest.raises(OmniInputError, match=r"rows\.jsonl, row 2"):
        for place in range(20):
            blend[place]
    with pytest.raises(ValueError, match="unknown keys in data"):
        Blend([{"path": "nano:text_copy", "wieght": 2}])
