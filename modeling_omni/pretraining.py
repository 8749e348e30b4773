"""Pre-training of nano's towers on dense labels.

The paper takes C-RADIO and Parakeet pre-trained. Nano's towers start from random weights and learn first to say what
is drawn in each 4x4 cell of a patch (thing, colour, place, motion) and which word is spoken in each token. The label
heads are thrown away; the tower goes into the first SFT stage (`towers:` of its YAML file).
"""

import dataclasses
import json
import os
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from .checkpointing import load_optimizers, newest_checkpoint, put_in_place, save_optimizers, step_of
from .configuration_omni import OmniConfig
from .feature_extraction_omni import OmniFeatureExtractor
from .image_processing_omni import OmniImageProcessor
from .modeling_audio import OmniAudioModel, init_audio_weights
from .modeling_vision import OmniVisionModel, init_vision_weights
from .training import GROUPS, _key, cosine_factor, kind_of, make_optimizers
from .video_processing_omni import OmniVideoProcessor

IGNORE = -100
CELLS = 4  # dense labels per side of a patch
CHANNELS = ("thing", "colour", "column", "row", "motion")
PLACE_SHARE = 0.3  # of column and row in the loss: no edge of a tenth is sharp, and at full weight they drown letters


@dataclass
class TowerArguments:
    """Every key of a tower's YAML file."""

    tower: str = field(metadata={"help": "vision or audio"})
    model_config: str = field(metadata={"help": "YAML of an OmniConfig with the tower's sizes"})
    output_dir: str = field(metadata={"help": "folder for checkpoints, logs and tower.safetensors"})
    steps: int = _key(3000, "optimizer steps")
    samples_per_step: int = _key(32, "pictures and clips, or utterances, per step")
    video_share: float = _key(0.25, "vision: share of clips among the samples")
    learning_rate: float = _key(1e-3, "peak learning rate")
    warmup_fraction: float = _key(0.05, "share of steps of linear warm-up")
    weight_decay: float = _key(0.05, "weight decay of matrices")
    optimizer: str = _key("adamw", "adamw, or muon: Muon on hidden matrices, AdamW on the rest")
    seed: int = _key(0, "seed of data order and starting weights")
    save_every: int = _key(500, "steps between checkpoints")
    eval_every: int = _key(1000, "steps between held-out tests")
    workers: int = _key(1, "data loader processes")


class VisionBatches(Dataset):
    """Batch number -> patches of pictures and of clips with the labels of their cells [patches, 16, channels]."""

    def __init__(self, config: OmniConfig, args: TowerArguments, split: str):
        vision = config.vision_config
        self.args, self.split = args, split
        sizes = {"min_num_patches": vision.min_num_patches, "max_num_patches": vision.max_num_patches}
        self.images = OmniImageProcessor(**sizes)
        self.videos = OmniVideoProcessor(video_target_num_patches=vision.video_target_num_patches)

    def __len__(self) -> int:
        return self.args.steps

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        from .nano_data import dense_image_sample, dense_video_sample

        first = (self.args.seed << 32) + number * self.args.samples_per_step
        num_videos = round(self.args.samples_per_step * self.args.video_share)
        seeds = range(first, first + self.args.samples_per_step)
        batch = {}
        pixels, grids, labels = [], [], []
        for seed in list(seeds)[num_videos:]:
            picture, label = dense_image_sample(seed, self.split)
            h, w = label.shape[1] // CELLS, label.shape[2] // CELLS
            pixels.append((np.asarray(picture), h, w))
            grids.append((1, h, w))
            labels.append(labels_per_patch(label[:, None]))
        if pixels:
            batch |= {"pixels": self.images.patches(pixels), "grids": torch.tensor(grids), "labels": torch.cat(labels)}
        pixels, grids, labels = [], [], []
        for seed in list(seeds)[:num_videos]:
            frames, label = dense_video_sample(seed, self.split)
            t, h, w = label.shape[1], label.shape[2] // CELLS, label.shape[3] // CELLS
            pixels.append((frames, h, w))
            grids.append((t, h, w))
            labels.append(labels_per_patch(label))
        if pixels:
            batch |= {"video_pixels": self.videos.patches(pixels), "video_grids": torch.tensor(grids)}
            batch["video_labels"] = torch.cat(labels)
        return batch


def labels_per_patch(label: np.ndarray) -> torch.Tensor:
    """Labels [channels, t, 4h, 4w] of cells -> [t * h * w, 16, channels], patches in the tower's order."""
    cells = torch.from_numpy(label).unflatten(2, (-1, CELLS)).unflatten(4, (-1, CELLS))  # [c, t, h, 4, w, 4]
    return cells.permute(1, 2, 4, 3, 5, 0).flatten(0, 2).flatten(1, 2)


class AudioBatches(Dataset):
    """Batch number -> log-mel clips and the word (1 + its number, 0 for none) of every encoder token."""

    def __init__(self, config: OmniConfig, args: TowerArguments, split: str):
        self.args, self.split = args, split
        self.features = OmniFeatureExtractor(feature_size=config.sound_config.num_mel_bins)

    def __len__(self) -> int:
        return self.args.steps

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        from .nano_data.speech import spoken_utterance
        from .nano_data.vocabulary import SPOKEN_WORDS

        audios, labels = [], []
        for place in range(self.args.samples_per_step):
            rng = random.Random(f"{self.split}/{self.args.seed}/{number * self.args.samples_per_step + place}")
            audio, words, spans = spoken_utterance(rng, self.split)
            label = torch.zeros(len(audio) // 1280 + 1, dtype=torch.long)  # 80 ms tokens
            for word, (start, stop) in zip(words, spans):
                label[round(start / 1280) : max(round(stop / 1280), round(start / 1280) + 1)] = 1 + SPOKEN_WORDS.index(
                    word
                )
            audios.append(audio)
            labels.append(label)
        features = self.features(audios, sampling_rate=16000)
        longest = max(map(len, labels))
        padded = torch.stack([F.pad(label, (0, longest - len(label)), value=IGNORE) for label in labels])
        return {
            "features": features["input_features"],
            "mask": features["input_features_mask"],
            "labels": padded,
        }


class LabelledTower(nn.Module):
    """A tower with linear heads for its dense labels."""

    def __init__(self, tower: str, config: OmniConfig):
        super().__init__()
        from .nano_data import COLOUR_CLASSES, MOTION_CLASSES, PLACE_CLASSES, THING_CLASSES
        from .nano_data.vocabulary import SPOKEN_WORDS

        if tower == "vision":
            self.tower, init, part = OmniVisionModel(config.vision_config), init_vision_weights, config.vision_config
            classes = (THING_CLASSES, COLOUR_CLASSES, PLACE_CLASSES, PLACE_CLASSES, MOTION_CLASSES)
            self.sizes = [len(names) for names in classes]
        else:
            self.tower, init, part = OmniAudioModel(config.sound_config), init_audio_weights, config.sound_config
            self.sizes = [1 + len(SPOKEN_WORDS)]
            self.tower.batch_norm_training = True
        for module in self.tower.modules():
            init(module, part)
        self.norm = nn.LayerNorm(part.hidden_size)
        self.cells = CELLS**2 if tower == "vision" else 1
        self.head = nn.Linear(part.hidden_size, sum(self.sizes) * self.cells)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        """-> loss, share of right labels where there is something to see or hear, per channel."""
        pairs = []  # (logits [N, classes], labels [N])
        if "features" in batch:
            hidden, counts = self.tower(batch["features"], batch["mask"])
            labels = batch["labels"][:, : hidden.shape[1]].clone()
            labels = F.pad(labels, (0, hidden.shape[1] - labels.shape[1]), value=IGNORE)
            labels[torch.arange(hidden.shape[1]) >= counts[:, None]] = IGNORE
            pairs.append(("word", self.head(self.norm(hidden)).flatten(0, 1), labels.flatten()))
        for prefix, is_video in (("", False), ("video_", True)):
            if prefix + "pixels" in batch:
                hidden = self.tower(batch[prefix + "pixels"], batch[prefix + "grids"], is_video=is_video)
                logits = (
                    self.head(self.norm(hidden)).unflatten(-1, (self.cells, -1)).flatten(0, 1).split(self.sizes, -1)
                )
                labels = batch[prefix + "labels"].flatten(0, 1).T
                for name, channel, label in zip(CHANNELS, logits, labels):  # pictures have no motion
                    pairs.append((prefix + name, channel, label))
        loss, right = 0.0, {}
        for name, logits, labels in pairs:
            # most places hold nothing; at full weight they would drown what there is to learn
            weight = torch.full((logits.shape[-1],), 1.0, device=logits.device)
            weight[0] = 0.2
            share = PLACE_SHARE if name.endswith(("column", "row")) else 1.0
            loss = loss + share * F.cross_entropy(logits.float(), labels, weight, ignore_index=IGNORE)
            seen = labels > 0
            right[name] = (logits.argmax(-1) == labels)[seen].float().mean().item()
        return loss, right


def pretrain_tower(args: TowerArguments) -> None:
    """Trains one tower; started again with the same `output_dir` it goes on where it was."""
    if args.tower not in ("vision", "audio"):
        raise ValueError(f"tower must be 'vision' or 'audio', got {args.tower!r}")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    config = OmniConfig(**yaml.safe_load(Path(args.model_config).read_text()))
    torch.manual_seed(args.seed)
    model = LabelledTower(args.tower, config)
    groups = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(kind_of(name, parameter), []).append(parameter)
    decay = {"hidden": args.weight_decay, "decayed": args.weight_decay, "plain": 0.0}
    groups = [{"params": params, "weight_decay": decay[kind], "kind": kind} for kind, params in groups.items()]
    optimizers = make_optimizers(groups, args.optimizer)
    step, resumed = 0, newest_checkpoint(folder)
    if resumed is not None:
        step = step_of(resumed)
        model.load_state_dict(load_file(resumed / "model.safetensors"))
        load_optimizers(optimizers, resumed / "optimizer.safetensors")
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump(dataclasses.asdict(args), sort_keys=False))
    batches = VisionBatches if args.tower == "vision" else AudioBatches
    heldout = batches(config, args, "heldout")
    loader = DataLoader(Subset(batches(config, args, "train"), range(step, args.steps)), None, num_workers=args.workers)
    log = open(folder / "log.jsonl", "a")
    started, history = time.time(), []
    bar = tqdm(loader, total=args.steps, initial=step, mininterval=10)
    for batch in bar:
        model.train()
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = args.learning_rate * cosine_factor(step, args.steps, args.warmup_fraction, 0.01)
        loss, right = model(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        history.append({"loss": loss.item(), **right})
        if step % 50 == 0:
            line = {"step": step, "seconds": round(time.time() - started)} | mean_of(history)
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.set_postfix({key: value for key, value in line.items() if key not in ("step", "seconds")})
            history = []
        if step % args.eval_every == 0 or step == args.steps:
            model.eval()
            with torch.no_grad():
                line = {"step": step, "heldout": mean_of([model(heldout[n])[1] for n in range(10)])}
            log.write(json.dumps(line) + "\n")
            tqdm.write(str(line))
        if step % args.save_every == 0 or step == args.steps:
            save_tower(folder, args.tower, model, optimizers, step)


def save_tower(folder: Path, tower: str, model: LabelledTower, optimizers: list, step: int) -> None:
    """`folder/tower.safetensors` for `towers:` of a stage, and a checkpoint `folder/step-N` to go on from."""
    prefix = GROUPS[tower]
    tensors = {prefix + name: value.contiguous() for name, value in model.tower.state_dict().items()}
    save_file(tensors, folder / "partial.safetensors")
    os.replace(folder / "partial.safetensors", folder / "tower.safetensors")
    partial = folder / f"partial-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, partial / "model.safetensors")
    save_optimizers(optimizers, partial / "optimizer.safetensors")
    (partial / "state-0.json").write_text(json.dumps({"step": step}))
    put_in_place(partial, folder / f"step-{step}")


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every key over the rows that have it (and have something to measure)."""
    keys = {key: None for row in rows for key in row}
    return {key: round(float(np.nanmean([row[key] for row in rows if key in row])), 4) for key in keys}
