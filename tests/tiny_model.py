"""A tiny model with every kind of layer, and batches of any media mix built by hand (no processor), for tests."""

import torch

from modeling_omni.configuration_omni import OmniConfig
from modeling_omni.data import cost_of
from modeling_omni.modeling_omni import OmniForConditionalGeneration
from modeling_omni.packing import collate_rows, pack_rows

VOCAB = 160
IMAGE_ID, IMG, IMG_END, AUDIO_ID, SO_START, SO_END = 18, 19, 20, 27, 28, 29
IMAGE, VIDEO, AUDIO = 1, 2, 3
PATCH_DIM, MELS = 3 * 16 * 16, 16

LLM = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 4096,
    "eos_token_id": None,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_prefix_tokens": 10,
    "max_resolution": 128,
}
SOUND = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "subsampling_conv_channels": 8,
    "num_mel_bins": MELS,
    "projection_hidden_size": 40,
}


def tiny_config(pattern="ME*M-", vocab_size=VOCAB, mels=MELS, **changes) -> OmniConfig:
    return OmniConfig(
        **{
            "llm_config": LLM | {"hybrid_override_pattern": pattern, "vocab_size": vocab_size},
            "vision_config": dict(VISION),
            "sound_config": SOUND | {"num_mel_bins": mels},
            "projector_hidden_size": 48,
            "eos_token_id": None,
        }
        | changes
    )


@torch.no_grad()
def randomize(model, seed=0):
    """Weights large enough that every one matters in the logits; made of names, so it fits the native class too.

    dt_bias is 0.5: softplus is then far above 0.001, where the native class clamps dt while it prefills (its
    `time_step_min`) and the config's `time_step_limit` says not to.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or any(
            part in name for part in ("lambda1", "featurizer", "norm_mean", "norm_std", "A_log")
        ):
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("dt_bias"):
            tensor.fill_(0.5)
        elif name.endswith("running_var"):
            tensor.copy_(1 + 0.3 * noise.tanh())
        elif tensor.dim() > 1:
            position = any(part in name for part in ("pos_embed", "position_embedding", "cls", "embeddings.weight"))
            fan_in = tensor[0].numel() if tensor.dim() != 3 or "experts" not in name else tensor.shape[-1]
            tensor.copy_(noise * (0.5 if position else fan_in**-0.5))
        else:
            tensor.copy_(0.2 * noise + (1 if "norm" in name and name.endswith("weight") else 0))
    return model


def tiny_model(seed=0, **changes) -> OmniForConditionalGeneration:
    model = randomize(OmniForConditionalGeneration(tiny_config(**changes)), seed).eval()
    model.generation_config.pad_token_id = 0
    return model


def clip_tokens(frames: int) -> int:
    for _ in range(3):
        frames = (frames - 1) // 2 + 1
    return frames


def make_sample(row: list, seed: int, prune: float = 0.0) -> dict:
    """One prompt. Parts of a row: n (n text tokens), ("image", h, w), ("video", t, h, w), ("audio", [frames, ...]).

    With `prune` (EVS) all kept places of a video stand in its first tubelet, as the processor lays them out.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    sample = {"ids": [], "types": [], "images": [], "videos": [], "keep": [], "audios": []}

    def put(ids, kind=0):
        sample["ids"] += ids
        sample["types"] += [kind] * len(ids)

    def text(n):
        put(torch.randint(40, VOCAB, (n,), generator=generator).tolist())

    for part in row:
        if isinstance(part, int):
            text(part)
        elif part[0] == "image":
            _, h, w = part
            put([IMG])
            put([IMAGE_ID] * (h * w // 4), IMAGE)
            put([IMG_END])
            sample["images"].append((torch.randn(h * w, PATCH_DIM, generator=generator), (1, h, w)))
        elif part[0] == "video":
            _, t, h, w = part
            per_tubelet = h * w // 4
            counts = [per_tubelet] * t
            if prune:
                sample["keep"].append(max(per_tubelet, int(t * per_tubelet * (1 - prune))))
                counts = [sample["keep"][-1]] + [0] * (t - 1)
            for count in counts:
                text(2)
                put([IMG])
                put([IMAGE_ID] * count, VIDEO)
                put([IMG_END])
            sample["videos"].append((torch.randn(t * h * w, 2 * PATCH_DIM, generator=generator), (t, h, w)))
        else:
            put([SO_START])
            put([AUDIO_ID] * sum(clip_tokens(frames) for frames in part[1]), AUDIO)
            put([SO_END])
            sample["audios"].append([torch.randn(frames, MELS, generator=generator) for frames in part[1]])
    return sample


def collate(samples: list[dict], left: bool = True) -> dict:
    """Samples -> the model's inputs as the processor gives them; labels on all text."""
    longest = max(len(s["ids"]) for s in samples)

    def pad(values, fill):
        rows = []
        for row in values:
            padding = [fill] * (longest - len(row))
            rows.append(padding + row if left else row + padding)
        return torch.tensor(rows)

    batch = {
        "input_ids": pad([s["ids"] for s in samples], 0),
        "attention_mask": pad([[1] * len(s["ids"]) for s in samples], 0),
        "labels": pad([[i if i >= 40 else -100 for i in s["ids"]] for s in samples], -100),
    }
    images = [item for s in samples for item in s["images"]]
    videos = [item for s in samples for item in s["videos"]]
    audios = [item for s in samples for item in s["audios"]]
    if images or videos or audios:
        batch["mm_token_type_ids"] = pad([s["types"] for s in samples], 0)
    if images:
        batch["pixel_values"] = torch.cat([pixels for pixels, _ in images])
        batch["image_grid_thw"] = torch.tensor([grid for _, grid in images])
    if videos:
        batch["pixel_values_videos"] = torch.cat([pixels for pixels, _ in videos])
        batch["video_grid_thw"] = torch.tensor([grid for _, grid in videos])
        keep = [number for s in samples for number in s["keep"]]
        if keep:
            batch["video_keep_tokens"] = torch.tensor(keep)
    if audios:
        clips = [clip for audio in audios for clip in audio]
        batch["input_features"] = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
        frames = torch.tensor([len(clip) for clip in clips])
        batch["input_features_mask"] = torch.arange(frames.max()) < frames[:, None]
        batch["audio_clip_counts"] = torch.tensor([len(audio) for audio in audios])
    return batch


def prompt_of(batch: dict) -> dict:
    """The batch without labels, for `generate`."""
    return {name: value for name, value in batch.items() if name != "labels"}


def collate_packed(samples: list[dict[str, torch.Tensor]], row_tokens: int) -> dict[str, torch.Tensor]:
    """Encoded samples -> a batch of as many packed rows as they need (see `collate_rows`)."""
    rows, _ = pack_rows([cost_of(sample) for sample in samples], row_tokens)
    return collate_rows([[samples[item] for item in row] for row in rows])


def tiny_checkpoint(folder, seed=0, only: tuple[str, ...] = (), **changes):
    """Writes a tiny model that takes nano's processor; with `only` it can write nothing but these tokens."""
    from transformers import GenerationConfig

    from modeling_omni.processing_omni import OmniProcessor

    model = tiny_model(seed, vocab_size=512, mels=80, **changes)
    processor = OmniProcessor.from_pretrained("nano")
    allowed = processor.tokenizer.convert_tokens_to_ids(list(only))
    banned = [i for i in range(512) if allowed and i not in allowed]
    model.generation_config = GenerationConfig(
        eos_token_id=[2, 11], pad_token_id=0, suppress_tokens=banned or None, enable_thinking=False
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def media_rows(folder) -> list[dict]:
    """RL rows of every modality, the media as files in `folder`; the answer to all of them is red."""
    import numpy as np
    from PIL import Image

    from modeling_omni.media import save_audio, save_video

    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    Image.fromarray(frames[0]).resize((96, 96)).save(folder / "a.png")
    save_audio(folder / "a.wav", (0.3 * np.sin(np.arange(8000) / 5)).astype(np.float32), 16000)
    save_video(folder / "a.mp4", frames, 4.0)
    parts = {"text": [], "image": ["a.png"], "audio": ["a.wav"], "video": ["a.mp4"]}
    return [
        {
            "id": kind,
            "source": kind,
            "prompt": [{"role": "user", "content": [
                *({"type": kind, "path": name} for name in names), {"type": "text", "text": "What colour is it?"},
            ]}],
            "answer": "red",
            "verifier": "string_match",
            "prompt_opened_think": False,
        }
        for kind, names in parts.items()
    ]  # fmt: skip
