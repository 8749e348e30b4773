"""The released layout <-> our modules, in transformers' own conversion mechanism.

`from_pretrained` reads the released names (checkpoint of nvidia/Nemotron-3-Nano-Omni-30B-A3B-Reasoning: 7,349
tensors) shard by shard; `save_pretrained` applies the same rules backwards and writes exactly those names, so vLLM and
NVIDIA's tools take a fine-tune as they take the original. Experts are one tensor each on disk and two stacked
parameters per layer in memory.
"""

import re
from collections.abc import Iterator

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming

# (released name, our name). Order matters when saving: the first rule that fits wins.
RENAMES = [
    (r"^language_model\.lm_head\.", r"lm_head."),
    (r"^language_model\.backbone\.", r"model.language_model."),
    (r"^language_model\.mtp\.", r"mtp."),
    (r"^vision_model\.radio_model\.input_conditioner\.", r"model.vision_tower.input_conditioner."),
    (r"^vision_model\.radio_model\.model\.patch_generator\.", r"model.vision_tower.patch_generator."),
    (r"^vision_model\.radio_model\.model\.blocks\.", r"model.vision_tower.blocks."),
    (r"^mlp1\.0\.", r"model.vision_projector.norm."),
    (r"^mlp1\.1\.", r"model.vision_projector.linear1."),
    (r"^mlp1\.3\.", r"model.vision_projector.linear2."),
    (r"^sound_encoder\.encoder\.", r"model.audio_tower."),
    (r"^sound_projection\.", r"model.audio_projector."),
]

# The language models of the family that are released alone (Nemotron 3 Nano, Super, Ultra); `lm_head.` and `mtp.` are
# called the same here.
TEXT_RENAMES = [(r"^backbone\.", r"model.language_model.")]

# Written by transformers' native class for parts that this architecture does not have: LayerScale (ones) and indices
# of summary tokens. `mtp.` are draft heads (modeling_mtp.py), left out where the config says 0 of them.
IGNORED_ON_LOAD = [r"layer_scale[12]\.lambda1$", r"\.ls[12]\.", r"summary_idxs$", r"(^|\.)mtp\."]


def register_released_layout(name: str, renames: list[tuple[str, str]] = RENAMES) -> None:
    """Registers the rules for a model type or a class, by its name; a second call changes nothing."""
    rules = [WeightRenaming(released, ours) for released, ours in renames]
    for part in ("up_proj", "down_proj"):
        rules.append(
            WeightConverter(
                source_patterns=[f"mixer.experts.*.{part}.weight"],
                target_patterns=f"mixer.experts.{part}",
                operations=[MergeModulelist(dim=0)],
            )
        )
    register_checkpoint_conversion_mapping(name, rules, overwrite=True)


def released_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """One of our parameters -> released name and tensor, as `save_pretrained` writes them; stacked experts one by one.

    For engines that take weights by name while training goes on (vLLM).
    """
    for released, ours in RENAMES:
        if name.startswith(ours):
            name = re.sub(r"\\(.)", r"\1", released.strip("^")) + name[len(ours) :]
            break
    layer, stacked, part = name.partition(".mixer.experts.")
    if stacked and tensor.dim() == 3:
        for number, expert in enumerate(tensor):
            yield f"{layer}{stacked}{number}.{part}.weight", expert
    else:
        yield name, tensor
