"""The first SFT stage for real, small: arguments, packing, freezing, resuming, tower pre-training."""

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny_model import collate_packed

from modeling_omni.configuration_omni import OmniConfig
from modeling_omni.data import Blend, encode_row
from modeling_omni.lora import merge_adapter
from modeling_omni.media import OmniInputError
from modeling_omni.modeling_omni import OmniForConditionalGeneration
from modeling_omni.packing import pack_rows
from modeling_omni.pretraining import TowerArguments, pretrain_tower
from modeling_omni.processing_omni import OmniProcessor
from modeling_omni.qad import QADArguments
from modeling_omni.reporting import report_command
from modeling_omni.training import (
    GROUPS,
    RECOMPUTED,
    SFTArguments,
    cosine_factor,
    group_of,
    load_arguments,
    recompute_activations,
    train_sft,
)

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
        "weight_of": "rows",
        "global_batch_size": 2,
        "micro_batch_size": 2,
        "row_tokens": 192,
        "save_every": 3,
        "eval_samples": 2,
        "log_every": 1,
        "workers": 0,
    }
    return SFTArguments(**values | changes)


def test_every_config_loads():
    files = [file for scale in ("nano", "30b") for file in sorted((ROOT / "configs" / scale).glob("*.yaml"))]
    assert len(files) >= 12
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
            cls = QADArguments if "stage: qad" in text else cls
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
    rows, left = pack_rows([(length, 0) for length in lengths], 128)
    assert not left
    assert sorted(item for row in rows for item in row) == list(range(200))
    assert all(sum(lengths[item] for item in row) <= 128 for row in rows)
    assert sum(lengths) / (128 * len(rows)) > 0.9
    assert pack_rows([(300, 0), (5, 0)], 128)[0] == [[0], [1]]


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
        assert (ours is None) == (other is None)
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


def test_killed_run_resumes_to_the_same_bits(tiny_yaml, tmp_path):
    changes = {"steps": 40, "save_every": 4, "eval_samples": 0, "report_to": [], "cpe_eval": False}
    changes |= {"data": [{"path": "nano:text_sum"}, {"path": "nano:image_shape"}]}
    train_sft(stage(tiny_yaml, tmp_path / "whole", **changes))
    config = tmp_path / "stage.yaml"
    config.write_text(yaml.safe_dump(dataclasses.asdict(stage(tiny_yaml, tmp_path / "cut", **changes))))
    command = [sys.executable, str(ROOT / "train.py"), "sft", "--config", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "cut").glob("*-8")) and process.poll() is None:  # step-8, or while it is written
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    train_sft(stage(tiny_yaml, tmp_path / "cut", **changes))
    whole, cut = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    losses = {}
    for run in ("whole", "cut"):  # steps that were run twice stand twice in the log
        lines = [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        losses[run] = {line["step"]: line["loss"] for line in lines}
    assert losses["whole"] == losses["cut"] and len(losses["cut"]) == 40


@pytest.mark.parametrize("engine", ["cpu_processes", "zero3"])
def test_two_processes_that_share_rows_train_like_one(tiny_yaml, tmp_path, engine):
    """The command itself: context parallelism, plain and over ZeRO-3, stopped and gone on in the middle."""
    if engine == "zero3":
        pytest.importorskip("deepspeed")
    model = OmniForConditionalGeneration(OmniConfig(**yaml.safe_load(tiny_yaml.read_text())))
    model.save_pretrained(tmp_path / "start")
    start = {"model": str(tmp_path / "start"), "model_config": None, "report_to": [], "eval_samples": 0}
    start |= {"warmup_fraction": 0.0, "min_learning_rate": 1e-3, "data": [{"path": f"nano:{s}"} for s in SKILLS]}
    train_sft(stage(tiny_yaml, tmp_path / "one", **start))
    for steps in (3, 6):
        config = tmp_path / "stage.yaml"
        args = stage(tiny_yaml, tmp_path / "two", **start, steps=steps, context_parallel=2)
        config.write_text(yaml.safe_dump(dataclasses.asdict(args)))
        launcher = str(ROOT / "configs/accelerate" / f"{engine}.yaml")
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            launcher,
            "--num_processes",
            "2",
        ]
        command += ["--mixed_precision", "no", str(ROOT / "train.py"), "sft", "--config", str(config)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
    logs = [
        [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("one", "two")
    ]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4, 5, 6]
    for one, two in zip(*logs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=2e-3) and two["samples"] == one["samples"]
    one, two = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys()
    # AdamW moves weights without a gradient to speak of by noise, hence the median
    assert torch.median(torch.cat([(one[n] - two[n]).abs().flatten() for n in one])) < 1e-5


def test_gradients_that_are_not_finite_are_skipped_and_then_stop_the_run(tiny_yaml, tmp_path, capsys):
    model = OmniForConditionalGeneration(OmniConfig(**yaml.safe_load(tiny_yaml.read_text())))
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    args = stage(tiny_yaml, tmp_path / "run", model=str(tmp_path / "broken"), model_config=None, max_skipped=3)
    with pytest.raises(OmniInputError, match=r"3 steps in a row without a finite gradient.*nano:\w+, row \d+"):
        train_sft(args)
    assert capsys.readouterr().out.count("skipped; its rows") == 3
    assert "nano:" in json.loads((tmp_path / "run" / "skipped-0.jsonl").read_text().splitlines()[0])["rows"][0]


def test_resuming_with_other_settings_is_refused(tiny_yaml, tmp_path):
    train_sft(stage(tiny_yaml, tmp_path, steps=3, eval_samples=0))
    (tmp_path / "step-9").mkdir()  # an incomplete copy is passed over
    with pytest.raises(OmniInputError, match="other settings: train, seed"):
        train_sft(stage(tiny_yaml, tmp_path, train=["head"], seed=1))
    with pytest.raises(OmniInputError, match="other settings: data"):
        train_sft(stage(tiny_yaml, tmp_path, data=[{"path": "nano:text_sum"}]))
    for changes, message in (
        ({"context_parallel": 2}, "does not divide the 1 process"),
        ({"final_dtype": "bf16"}, "final_dtype: unknown"),
        ({"eval_skills": ["image_wrod"]}, "eval_skills: unknown"),
        ({"global_batch_size": 3}, "must be a multiple"),
        ({"train": ["visoin"]}, "train: unknown"),
    ):
        with pytest.raises(OmniInputError, match=message):
            train_sft(stage(tiny_yaml, tmp_path / "other", **changes))


def test_full_disk_keeps_the_last_checkpoint(tiny_yaml, tmp_path):
    train_sft(stage(tiny_yaml, tmp_path, steps=3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # every larger file fails as on a full disk
    try:
        with pytest.raises(OmniInputError, match=r"step-6 could not be written.*last good one is .*step-3"):
            train_sft(stage(tiny_yaml, tmp_path, report_to=[]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.glob("*-*") if path.is_dir()] == ["step-3"]
    train_sft(stage(tiny_yaml, tmp_path))
    assert (tmp_path / "step-6" / "model.safetensors").exists()


def test_recomputation_changes_no_gradient(tiny_yaml):
    torch.manual_seed(0)
    model = OmniForConditionalGeneration(OmniConfig(**yaml.safe_load(tiny_yaml.read_text()))).train()
    processor, blend = OmniProcessor.from_pretrained("nano"), Blend([{"path": f"nano:{skill}"} for skill in SKILLS])
    batch = collate_packed([encode_row(blend[place], processor) for place in range(6)], 256)
    gradients, kept = {}, {}
    for parts in ([], ["vision"], ["language"], ["attention", "moe"], [*RECOMPUTED]):
        recompute_activations(model, parts)
        saved = []

        def pack(tensor, saved=saved):
            saved.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**batch, skip_logits=True, use_cache=False).loss
        gradients[tuple(parts)] = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
        kept[tuple(parts)] = sum(saved)
    for parts, found in gradients.items():
        for ours, plain in zip(found, gradients[()], strict=True):
            assert (ours is None and plain is None) or torch.allclose(ours, plain, atol=1e-6), parts
    assert kept[tuple(RECOMPUTED)] < kept[("language",)] < kept[("attention", "moe")] < kept[()]
    assert kept[("vision",)] < kept[()]
    with pytest.raises(ValueError, match="recompute: unknown parts"):
        recompute_activations(model, ["towers"])


def test_weights_are_shares_of_tokens_and_a_run_leaves_its_reports(tiny_yaml, tmp_path, capsys):
    data = [{"path": "nano:text_copy", "weight": 1}, {"path": "nano:image_colour", "weight": 1}]
    args = stage(tiny_yaml, tmp_path, weight_of="tokens", data=data, previews=2, optimizer="muon", eval_data=data[:1])
    train_sft(args)
    resolved = yaml.safe_load((tmp_path / "config.resolved.yaml").read_text())
    short, long = (source["mean_tokens"] for source in resolved["data"])
    assert short < long
    shown = capsys.readouterr().out
    assert "trained" in shown and "memory of each" in shown and "router" in shown
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert {"busiest_expert", "tokens_per_second", "share_image", "packing", "bad_rows"} <= set(line)
    assert len((tmp_path / "previews.jsonl").read_text().splitlines()) == 2
    assert 0 < json.loads((tmp_path / "heldout_loss.jsonl").read_text())["nano:text_copy"] < 20
    card = (tmp_path / "final" / "README.md").read_text()
    assert "nano:image_colour | 50.0 %" in card and "held-out skill" in card
    assert list(tmp_path.glob("**/events.out.tfevents*"))


def test_report_of_several_stages(tmp_path, capsys):
    for number in range(2):
        (tmp_path / f"stage{number}").mkdir()
        lines = [{"step": 1, "image_word": 0.1, "text_sum": 0.2}, {"step": 2, "image_word": 0.25 + number / 2}]
        (tmp_path / f"stage{number}" / "heldout.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report_command([str(tmp_path / "stage0"), str(tmp_path / "stage1"), "--plot", str(tmp_path / "plot.png")])
    assert "| image_word | 25 | 75 |" in capsys.readouterr().out
    (tmp_path / "other").mkdir()  # a folder of the same name elsewhere
    shutil.copytree(tmp_path / "stage0", tmp_path / "other" / "stage1")
    report_command([str(tmp_path / name) for name in ("stage0", "stage1", "other/stage1")])
    shown = capsys.readouterr().out
    assert f"| stage0 | {tmp_path}/stage1 | {tmp_path}/other/stage1 |" in shown and "| 25 | 75 | 25 |" in shown
    assert Image.open(tmp_path / "plot.png").size[0] > 300
    with pytest.raises(OmniInputError, match="no heldout.jsonl"):
        report_command([str(tmp_path)])


def test_recipe_runs_what_is_not_finished_and_processes_share_the_tests(tiny_yaml, tmp_path):
    tower = {"tower": "vision", "model_config": str(tiny_yaml), "output_dir": str(tmp_path / "tower"), "steps": 1}
    tower |= {"samples_per_step": 2, "workers": 0}
    first = stage(tiny_yaml, tmp_path / "first", steps=1, train=["head"], report_to=[], micro_batch_size=1)
    first = dataclasses.asdict(first)
    first["towers"] = {"vision": str(tmp_path / "tower" / "tower.safetensors")}
    configs = [tmp_path / "tower.yaml", tmp_path / "first.yaml"]
    for path, values in zip(configs, (tower, first), strict=True):
        path.write_text(yaml.safe_dump(values))
    command = [sys.executable, "train.py", "recipe", *map(str, configs)]
    command += ["--launch", "configs/accelerate/cpu_processes.yaml", "--plot", str(tmp_path / "plot.png")]
    shown = []
    for _ in range(2):
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
        assert result.returncode == 0, result.stderr[-3000:]
        shown.append(result.stdout)
    assert "nothing to do" not in shown[0] and shown[1].count("nothing to do") == 2
    line = json.loads((tmp_path / "first" / "heldout.jsonl").read_text())
    assert list(line) == ["step", *SKILLS]  # every skill once, in order, whichever process tested it
    assert all(f"| {skill} |" in text for skill in SKILLS for text in shown)
    assert (tmp_path / "plot.png").is_file()
    configs[0].write_text(yaml.safe_dump(tower | {"steps": "many", "output_dir": str(tmp_path / "no")}))
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert result.returncode == 1 and "tower.yaml failed" in result.stderr


def test_adapters_train_resume_and_merge(tiny_yaml, tmp_path):
    model = OmniForConditionalGeneration(OmniConfig(**yaml.safe_load(tiny_yaml.read_text())))
    model.save_pretrained(tmp_path / "base")
    OmniProcessor.from_pretrained("nano").save_pretrained(tmp_path / "base")
    start = {"model": str(tmp_path / "base"), "model_config": None, "processor": None, "lora": {}}
    start |= {"warmup_fraction": 0.0, "min_learning_rate": 1e-3}  # a constant rate
    for run, steps in (("whole", [6]), ("cut", [3, 6])):
        for number in steps:
            train_sft(stage(tiny_yaml, tmp_path / run, **start, steps=number))
    merge_adapter(tmp_path / "cut" / "final", tmp_path / "merged")
    OmniForConditionalGeneration.from_pretrained(tmp_path / "merged")
    whole, cut = (load_file(tmp_path / run / "final" / "adapter_model.safetensors") for run in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert any(value.abs().max() > 0 for name, value in whole.items() if "lora_B" in name)


def test_only_the_named_groups_change(tiny_yaml, tmp_path):
    train_sft(
        stage(tiny_yaml, tmp_path, train=["vision_projector", "head"], steps=3, data=[{"path": "nano:image_shape"}])
    )
    before = OmniForConditionalGeneration.from_pretrained(tmp_path / "step-3").state_dict()
    torch.manual_seed(0)
    start = OmniForConditionalGeneration(OmniConfig(**yaml.safe_load(tiny_yaml.read_text()))).state_dict()
    changed = {group_of(name) for name, value in start.items() if not torch.equal(value, before[name])}
    assert changed == {"vision_projector", "head"}


def test_groups_cover_every_parameter(tiny_yaml):
    config = OmniConfig(**yaml.safe_load(tiny_yaml.read_text()))
    config.llm_config.num_nextn_predict_layers = 1
    model = OmniForConditionalGeneration(config)
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
    args.steps = 52
    pretrain_tower(args)  # goes on
    assert sorted(path.name for path in (tmp_path / "tower").glob("step-*")) == ["step-50", "step-52"]
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
