"""What every process of test_lora.py's ZeRO-3 test does; started by `accelerate launch`. Arguments: base, folder."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_model import collate, make_sample

from modeling_omni import distributed as D
from modeling_omni.lora import add_lora, check_adapter_gradients, lora_table, save_adapter, watch_adapter_gradients
from modeling_omni.modeling_omni import OmniForConditionalGeneration

# Rows of the processes: the second one has no sound in the first step
ROWS = [
    [[4, ("image", 2, 4), 3, ("audio", [60, 30]), 9], [6, ("image", 4, 4), 3, ("video", 2, 2, 2), 5]],
    [[12], [5, ("audio", [60]), 9]],
]
# Routed experts carry adapters, or are spread over the processes
CASES = {
    "adapted": ({"presets": ["attention_mamba", "shared_experts", "routed_experts", "projectors", "towers"]}, 1),
    "spread": ({"presets": ["attention_mamba", "projectors"], "modules_to_save": ["lm_head"]}, 2),
}


def adapted_model(base: str, case: str, prepare=lambda model: None) -> OmniForConditionalGeneration:
    model = OmniForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    prepare(model)
    torch.manual_seed(0)
    return add_lora(model, CASES[case][0] | {"r": 2}).train()


def optimizer_of(model) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def batch_of(step: int, process: int) -> dict:
    return collate([make_sample(ROWS[step][process], 10 * step + process)], left=False)


def train(accelerator, base: str, folder: Path, case: str) -> None:
    accelerator.free_memory()
    accelerator.deepspeed_engine_wrapped = None
    degree = CASES[case][1]
    model = adapted_model(base, case, lambda model: D.prepare_expert_parallel(model, degree, accelerator))
    model.activation_checkpointing_enable()
    model, optimizers = D.prepare_training(accelerator, model, [optimizer_of(model)])
    watch, log = watch_adapter_gradients(model.module), {"losses": [], "waiting": []}
    for step in range(len(ROWS)):
        batch = batch_of(step, accelerator.process_index)
        padded = D.pad_missing_modalities(batch, D.bare_model(model).config)
        tokens = D.agree_on_step(accelerator, model, [padded])
        with D.microbatch(accelerator, model, True):
            items = tokens / accelerator.num_processes
            loss = model(**padded, skip_logits=True, num_items_in_batch=items).loss
            D.backward(accelerator, model, loss)
        log["waiting"].append(sorted(check_adapter_gradients(model.module, [batch], watch)))
        D.clip_and_step(accelerator, model, optimizers, 0.0)
        log["losses"].append(accelerator.gather(loss.detach()[None]).mean().item())
    save_adapter(model.module, folder / case)
    log["table"] = lora_table(model.module)
    (folder / f"{case}-{accelerator.process_index}.json").write_text(json.dumps(log))
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    accelerator = D.make_accelerator()
    assert accelerator.num_processes == 2 and D.is_sharded(accelerator)
    for case in CASES:
        train(accelerator, sys.argv[1], Path(sys.argv[2]), case)
