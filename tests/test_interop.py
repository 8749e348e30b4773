"""Released layout in and out, against transformers' native class; PEFT, TRL, pipelines and accelerate on the model.

The native class (`NemotronH_Omni_Reasoning_V3`) is the oracle for text, images and audio. In two places it is not
one, and ours is checked against something else:
- it clamps Mamba's dt at `time_step_min` while it prefills (see test_language.py); here dt_bias is set so that every dt
  is far above the clamp and both agree;
- its video path raises (`torch.cat` of one tensor): ours is compared with RADIO run on packed frame pairs, a pixel
  shuffle and a projector in numpy, and the native language model on embeddings put together by hand.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_layout import released_config, released_tensors
from tiny_model import (
    IMAGE_ID,
    IMG,
    LLM,
    SOUND,
    VIDEO,
    VISION,
    collate,
    make_sample,
    prompt_of,
    randomize,
    tiny_model,
)
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM
from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3, NemotronH_Omni_Reasoning_V3_Config

from modeling_omni import OmniConfig, OmniForConditionalGeneration, OmniModel, OmniProcessor

TESTS = Path(__file__).parent
PATTERN = "ME*ME"  # the released file has no plain MLP layers
VIDEO_ROW = [3, ("video", 3, 4, 2), 4]
ROWS = {
    "text": [[23], [9]],
    "image": [[5, ("image", 2, 4), 3, ("image", 4, 4), 2], [4, ("image", 6, 2), 9]],
    "audio": [[2, ("audio", [60]), 3], [5, ("audio", [100]), 2, ("audio", [60]), 4]],
}


def native_config():
    return NemotronH_Omni_Reasoning_V3_Config(
        text_config=LLM | {"model_type": "nemotron_h", "hybrid_override_pattern": PATTERN},
        vision_config={
            "model_type": "radio",
            "hidden_size": VISION["hidden_size"],
            "num_hidden_layers": VISION["num_hidden_layers"],
            "num_attention_heads": VISION["num_attention_heads"],
            "mlp_ratio": VISION["intermediate_size"] / VISION["hidden_size"],
            "max_img_size": VISION["max_resolution"],
            "num_cls_tokens": 3,
            "num_registers": 7,
            "video_temporal_patch_size": 2,
        },
        audio_config=SOUND
        | {
            "model_type": "parakeet_encoder",
            "attention_bias": False,
            "convolution_bias": False,
            "scale_input": False,
            "projection_bias": False,
        },
        vision_hidden_size=VISION["hidden_size"],
        projector_hidden_size=48,
        image_token_id=IMAGE_ID,
        audio_token_id=27,
        video_token_id=131081,
    )


@pytest.fixture(scope="module")
def native_folder(tmp_path_factory):
    """A random checkpoint saved by the native class."""
    folder = tmp_path_factory.mktemp("native")
    randomize(NemotronH_Omni_Reasoning_V3(native_config())).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(native_folder):
    native = NemotronH_Omni_Reasoning_V3.from_pretrained(native_folder, attn_implementation="eager").eval()
    model = OmniForConditionalGeneration.from_pretrained(native_folder).eval()
    return model, native


@pytest.fixture(scope="module")
def our_folder(tmp_path_factory):
    """A random checkpoint saved by ours."""
    folder = tmp_path_factory.mktemp("ours")
    tiny_model(seed=1, pattern=PATTERN).save_pretrained(folder)
    return folder


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def native_inputs(batch):
    names = ("input_ids", "attention_mask", "pixel_values", "input_features", "input_features_mask")
    inputs = {name: batch[name] for name in names if name in batch}
    if "image_grid_thw" in batch:
        inputs["image_grid_hw"] = batch["image_grid_thw"][:, 1:]
    return inputs


def equal_models(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


# --- against the native class


@pytest.mark.parametrize("kind", ROWS)
@torch.no_grad()
def test_logits_equal_native(pair, kind):
    model, native = pair
    batch = prompt_of(collate([make_sample(row, i) for i, row in enumerate(ROWS[kind])]))
    valid = batch["attention_mask"].bool()
    expected = native(**native_inputs(batch), use_cache=True)
    actual = model(**batch, use_cache=True)
    assert expected.logits[valid].std() > 0.3  # the comparison means something
    close(actual.logits[valid], expected.logits[valid])
    ours, theirs, mask = actual.past_key_values, expected.past_key_values, batch["attention_mask"]
    for step in torch.randint(40, 160, (4, 2, 1)):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        expected = native(input_ids=step, attention_mask=mask, past_key_values=theirs, use_cache=True)
        actual = model(input_ids=step, attention_mask=mask, past_key_values=ours, use_cache=True)
        close(actual.logits, expected.logits)


@torch.no_grad()
def test_features_equal_native(pair):
    model, native = pair
    batch = collate([make_sample(row, i) for i, row in enumerate(ROWS["image"] + ROWS["audio"])])
    grid = batch["image_grid_thw"]
    expected = native.get_image_features(batch["pixel_values"], grid[:, 1:]).pooler_output
    close(model.model.get_image_features(batch["pixel_values"], grid), torch.cat(expected))
    audio = batch["input_features"], batch["input_features_mask"]
    features, counts = model.model.get_audio_features(*audio)
    # native keeps sub(frames + 1) outputs of a clip; the lengths here are those where that is the same number
    close(features, native.get_audio_features(*audio).pooler_output)
    assert counts.tolist() == [8, 13, 8]


@torch.no_grad()
def test_video_equals_an_independent_calculation(pair):
    model, native = pair
    batch = prompt_of(collate([make_sample(VIDEO_ROW, 0)]))
    pixels, (t, h, w) = batch["pixel_values_videos"], batch["video_grid_thw"][0].tolist()
    # patches [t*h*w, (frame, c, y, x)] -> frame pairs stacked on channels [t, 2*3, 16 h, 16 w]
    frames = pixels.view(t, h, w, 6, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(t, 6, 16 * h, 16 * w)
    patches = native.vision_model(frames).features.double().numpy().reshape(t, h, w, -1)
    squares = [
        np.concatenate([patches[k, y, x], patches[k, y, x + 1], patches[k, y + 1, x], patches[k, y + 1, x + 1]])
        for k in range(t)
        for y in range(0, h, 2)
        for x in range(0, w, 2)
    ]
    projector = {name: p.double().numpy() for name, p in native.multi_modal_projector.named_parameters()}
    x = np.stack(squares)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * projector["layer_norm.weight"]
    x = np.maximum(x @ projector["linear_1.weight"].T, 0) ** 2 @ projector["linear_2.weight"].T
    expected = torch.tensor(x, dtype=torch.float32)
    close(model.model.get_video_features(pixels, batch["video_grid_thw"]), expected)
    embeds = native.get_input_embeddings()(batch["input_ids"])
    embeds[batch["mm_token_type_ids"] == VIDEO] = expected
    close(model(**batch).logits, native.language_model(inputs_embeds=embeds).logits)
    with pytest.raises(TypeError):  # the day this fails, the native class has become an oracle for video
        native(input_ids=batch["input_ids"], pixel_values_videos=frames.view(2 * t, 3, 16 * h, 16 * w))


def test_native_file_loads_whole(native_folder):
    names = {name for file in native_folder.glob("*.safetensors") for name in load_file(file)}
    assert any(name.startswith("language_model.backbone.layers.1.mixer.experts.7.") for name in names)
    model, info = OmniForConditionalGeneration.from_pretrained(native_folder, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not info["missing_keys"]
    # what the native class does not save has its one right value
    fresh = OmniForConditionalGeneration(model.config).state_dict()
    for name in ("model.vision_tower.input_conditioner.norm_std", "model.audio_tower.feature_extractor.featurizer.fb"):
        assert torch.equal(model.state_dict()[name], fresh[name]) and fresh[name].std() > 0
    config = OmniConfig.from_pretrained(native_folder)
    assert config.llm_config.hybrid_override_pattern == PATTERN and config.projector_hidden_size == 48
    assert config.vision_config.num_prefix_tokens == 10 and config.vision_config.position_grid == 8
    assert config.vision_config.intermediate_size == 64
    assert config.sound_config.projection_hidden_size == 40 and config.sound_config.num_mel_bins == 16
    assert config.img_context_token_id == IMAGE_ID and config.img_start_token_id == IMG


@torch.no_grad()
def test_our_file_loads_in_native(our_folder):
    model = OmniForConditionalGeneration.from_pretrained(our_folder).eval()
    # the config is given because the native config class refuses `sound_config.model_type` "parakeet", as released
    native, info = NemotronH_Omni_Reasoning_V3.from_pretrained(
        our_folder, config=native_config(), output_loading_info=True, attn_implementation="eager"
    )
    native.eval()
    assert not info["mismatched_keys"]
    for name in info["missing_keys"]:  # its own identity LayerScale and indices, not in the released file either
        assert re.search(r"layer_scale[12]\.lambda1$|summary_idxs$", name), name
    for name in info["unexpected_keys"]:  # in the released file too
        assert "input_conditioner" in name, name
    for kind, rows in ROWS.items():
        batch = prompt_of(collate([make_sample(row, i) for i, row in enumerate(rows)]))
        valid = batch["attention_mask"].bool()
        close(model(**batch).logits[valid], native(**native_inputs(batch)).logits[valid]), kind


# --- files


def pattern_of(name):
    return re.sub(r"(backbone\.layers|blocks|encoder\.layers|experts)\.\d+\.", r"\1.N.", name)


def test_saved_names_and_dtypes_are_the_released_ones(tmp_path):
    tiny_model(pattern=PATTERN).to(torch.bfloat16).save_pretrained(tmp_path / "cast")
    model = OmniForConditionalGeneration.from_pretrained(tmp_path / "cast", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    released = {pattern_of(name): (len(shape), dtype) for name, (shape, dtype) in released_tensors().items()}
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {pattern_of(n): (t.dim(), t.dtype) for n, t in saved.items()} == released
    experts = {name for name in saved if ".experts." in name}
    assert len(experts) == 2 * 8 * 2  # layers, experts, up and down
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_sharded_save_and_load_is_bit_equal(our_folder, tmp_path):
    model = OmniForConditionalGeneration.from_pretrained(our_folder)
    model.save_pretrained(tmp_path, max_shard_size="150KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(shards) > 3 and set(index["weight_map"].values()) == {shard.name for shard in shards}
    single = load_file(our_folder / "model.safetensors")
    assert set(index["weight_map"]) == set(single)
    for shard in shards:
        for name, tensor in load_file(shard).items():
            assert torch.equal(tensor, single[name]), name
    again, info = OmniForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    equal_models(again, model)


@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
def test_bfloat16_load(our_folder, option):
    model = OmniForConditionalGeneration.from_pretrained(our_folder, **{option: torch.bfloat16})
    kept = ("e_score_correction_bias", "norm_mean", "norm_std")
    single = load_file(our_folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float32 if name.endswith(kept) else torch.bfloat16), name
    bias = "layers.1.mixer.gate.e_score_correction_bias"
    assert torch.equal(model.state_dict()[f"model.language_model.{bias}"], single[f"language_model.backbone.{bias}"])
    output = model(**prompt_of(collate([make_sample([4, ("image", 2, 2), ("audio", [60]), 3], 0)])))
    assert output.logits.isfinite().all()


def test_auto_classes_without_remote_code(our_folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(released_config()))
    assert "auto_map" in released_config() and not list(tmp_path.glob("*.py"))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is OmniConfig
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(config, dtype=torch.bfloat16)
    assert type(model) is OmniForConditionalGeneration and model.dtype == torch.bfloat16
    folder = tmp_path / "tiny"
    OmniForConditionalGeneration.from_pretrained(our_folder).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"auto_map": released_config()["auto_map"]}))
    model = AutoModelForMultimodalLM.from_pretrained(folder)
    assert type(model) is OmniForConditionalGeneration
    equal_models(model, OmniForConditionalGeneration.from_pretrained(our_folder))
    base, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(base) is OmniModel and not info["missing_keys"]
    equal_models(base, model.model)


def test_streaming_load_stays_near_the_models_size(tmp_path):
    """Peak memory of loading 270 MB in shards, in a fresh process.

    Counted is anonymous memory, what the kernel cannot take back. The shards are mapped, not read: their pages count in
    the resident size too until the load ends (up to the model's size once more), but they are page cache.
    """
    code = f"""
import ctypes, gc, sys, threading, torch
sys.path.insert(0, {str(TESTS)!r})
from tiny_model import LLM, tiny_config
from modeling_omni import OmniForConditionalGeneration

def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) * 1024

torch.set_num_threads(1)
large = {{"hybrid_override_pattern": "ME*EMEME", "hidden_size": 512}}
large |= {{"n_routed_experts": 32, "moe_intermediate_size": 1024}}
config = tiny_config(llm_config=LLM | large)
with torch.device("meta"):
    model = OmniForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
model.to_empty(device="cpu")
for tensor in model.state_dict().values():
    tensor.fill_(1)
size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
model.save_pretrained({str(tmp_path)!r}, max_shard_size="40MB")
del model, tensor
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
before = peak = memory("RssAnon")
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, memory("RssAnon"))

watcher = threading.Thread(target=watch)
watcher.start()
model = OmniForConditionalGeneration.from_pretrained({str(tmp_path)!r}, dtype=torch.bfloat16)
done.set()
watcher.join()
assert all(t.flatten()[-1] == 1 for t in model.state_dict().values())
print(size, peak - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TESTS.parent, timeout=300)
    assert result.returncode == 0, result.stderr
    size, peak = map(int, result.stdout.split()[-2:])
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    assert size > 270e6 and 0.5 * size < peak < 1.4 * size, (size, peak)


@torch.no_grad()
def test_device_map(our_folder, tmp_path):
    batch = prompt_of(collate([make_sample([4, ("image", 2, 4), ("video", 2, 2, 2), ("audio", [60]), 3], 0)]))
    expected = OmniForConditionalGeneration.from_pretrained(our_folder)(**batch).logits
    auto = OmniForConditionalGeneration.from_pretrained(our_folder, device_map="auto")
    assert torch.equal(auto(**batch).logits, expected)
    # a part of the blocks on disk: accelerate's hooks run on every block of every tower, caches pass them untouched
    folder = tmp_path / "shards"
    auto.save_pretrained(folder, max_shard_size="150KB")
    room = int(0.8 * sum(t.numel() * t.element_size() for t in auto.state_dict().values()))
    split = OmniForConditionalGeneration.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": room}, offload_folder=tmp_path / "offload"
    )
    assert "disk" in split.hf_device_map.values() and "cpu" in split.hf_device_map.values()
    whole = ("OmniBlock", "VisionBlock", "ConformerBlock", "PatchGenerator")
    for name, module in split.named_modules():
        if type(module).__name__ in whole:
            assert not any(place.startswith(name + ".") for place in split.hf_device_map), name
    close(split(**batch).logits, expected, 1e-5)
    tokens = split.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, auto.generate(**batch, max_new_tokens=4, do_sample=False))


# --- PEFT

ATTENTION_AND_MAMBA = r"model\.language_model\.layers\.\d+\.mixer\.(q_proj|k_proj|v_proj|o_proj|in_proj)"


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ATTENTION_AND_MAMBA},
        {"target_modules": [], "target_parameters": ["mixer.experts.up_proj", "mixer.experts.down_proj"]},
    ],
    ids=["modules", "experts"],
)
def test_peft(our_folder, tmp_path, targets):
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    base = OmniForConditionalGeneration.from_pretrained(our_folder)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    batch = collate([make_sample([4, ("image", 2, 4), ("audio", [60]), 8], 0)])
    with torch.no_grad():
        start = base(**batch)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **targets))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and ".language_model.layers." in name for name in trained)
    # one attention layer and two Mamba layers; or two expert layers with two parameters each
    assert len(trained) == 2 * (4 + 2 if targets["target_modules"] else 4)
    output = model(**batch)
    close(output.logits, start.logits, 1e-5)  # a new adapter changes nothing
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # lora_A has a gradient only once lora_B has moved
        model(**batch).loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        trained_logits = model(**batch).logits
    assert (trained_logits - start.logits).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(OmniForConditionalGeneration.from_pretrained(our_folder), tmp_path)
    with torch.no_grad():
        close(again(**batch).logits, trained_logits, 1e-5)
        merged = again.merge_and_unload()
        close(merged(**batch).logits, trained_logits)
    assert type(merged) is OmniForConditionalGeneration
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    wanted = ATTENTION_AND_MAMBA + r"\.weight" if targets["target_modules"] else r".*mixer\.experts\.(up|down)_proj"
    assert changed and all(re.fullmatch(wanted, name) for name in changed)


# --- processor, pipelines, TRL


@pytest.fixture(scope="module")
def processor():
    from tiny_tokenizer import build_tokenizer

    processor = OmniProcessor(tokenizer=build_tokenizer())
    processor.image_processor.min_num_patches, processor.image_processor.max_num_patches = 16, 64
    return processor


@pytest.fixture(scope="module")
def speaking_model(processor):
    """Tiny, with the processor's vocabulary and mel bins."""
    return tiny_model(vocab_size=len(processor.tokenizer), mels=128)


@pytest.fixture(scope="module")
def picture():
    from PIL import Image
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg"))


def test_pipelines(processor, speaking_model, picture, tmp_path):
    import soundfile
    from transformers import pipeline

    time = np.arange(16000) / 16000
    soundfile.write(tmp_path / "tone.wav", 0.3 * np.sin(2 * np.pi * 440 * time), 16000)
    speaking_model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    question = {"type": "text", "text": "What is this?"}
    see = [{"role": "user", "content": [{"type": "image", "image": picture}, question]}]
    listen = [{"role": "user", "content": [{"type": "audio", "path": str(tmp_path / "tone.wav")}, question]}]
    both = [{"role": "user", "content": [*see[0]["content"][:1], *listen[0]["content"]]}]
    for task, chats in (("image-text-to-text", [see]), ("any-to-any", [see, listen, both])):
        pipe = pipeline(task, model=str(tmp_path / "model"), dtype=torch.float32, device="cpu")
        assert type(pipe.model) is OmniForConditionalGeneration and type(pipe.processor) is OmniProcessor
        for chat in chats:
            inputs = processor.apply_chat_template(
                chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            tokens = pipe.model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            expected = processor.post_process_image_text_to_text(tokens)[0]
            options = {"max_new_tokens": 4, "do_sample": False}
            (answer,) = pipe(text=chat, return_full_text=False, generate_kwargs=options)
            assert answer["generated_text"] == expected


def test_trl_contract(speaking_model):
    model = speaking_model
    text = model.config.get_text_config()
    assert (text.num_experts, text.num_experts_per_tok, text.router_aux_loss_coef) == (8, 3, 0.0)
    assert model.config.image_token_id == IMAGE_ID
    assert model.base_model_prefix == "model" and model.base_model is model.model
    assert model.get_output_embeddings() is model.lm_head
    batch = collate([make_sample([4, ("image", 2, 4), 3], 0)])
    with torch.no_grad():
        output = model.model(**prompt_of(batch))
        close(model.lm_head(output.last_hidden_state), model(**batch).logits, 1e-5)


def train_one_step(trainer):
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    loss = trainer.train().training_loss
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert np.isfinite(loss) and loss > 0
    return loss, moved


ARGUMENTS = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "dataloader_num_workers": 0,
}


def test_stock_sft_trainer(processor, speaking_model, tmp_path):
    import copy

    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": "one plus two is", "completion": " three"}, {"prompt": "the sky is", "completion": " blue"}]
    trainer = SFTTrainer(
        copy.deepcopy(speaking_model),
        args=SFTConfig(str(tmp_path), max_length=64, **ARGUMENTS),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor.tokenizer,
    )
    _, moved = train_one_step(trainer)
    assert {"lm_head.weight", "model.language_model.layers.0.mixer.in_proj.weight"} <= moved
    assert "model.language_model.layers.1.mixer.experts.up_proj" in moved
    assert not any("tower" in name or "projector" in name for name in moved)  # text reaches no tower


def test_stock_dpo_trainer(processor, speaking_model, tmp_path):
    import copy

    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": "one plus two is", "chosen": " three", "rejected": " seven"},
        {"prompt": "the sky is", "chosen": " blue", "rejected": " green"},
    ]
    trainer = DPOTrainer(
        copy.deepcopy(speaking_model),
        ref_model=copy.deepcopy(speaking_model),
        args=DPOConfig(str(tmp_path), max_length=64, **ARGUMENTS),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor.tokenizer,
    )
    loss, moved = train_one_step(trainer)
    assert loss == pytest.approx(np.log(2), abs=1e-4)  # policy and reference agree before the first step
    assert "lm_head.weight" in moved
