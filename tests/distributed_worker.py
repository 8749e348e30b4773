"""What every process of test_distributed.py does; started by `accelerate launch`. Argument: folder."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from tiny_model import collate, make_sample

from modeling_omni import distributed as D
from modeling_omni.modeling_omni import OmniForConditionalGeneration

MAX_NORM = 0.05  # small enough that it clips
RATES = {"projectors": 3e-3, "others": 1e-3}
# Rows of every micro-batch: [step][process][micro-batch] -> rows. The processes differ in modalities, lengths, chunks
# of the loss (1100 trained tokens are two) and passes of the audio tower (40 and 9 frames are two).
ROWS = [
    [
        [[[5, ("image", 4, 2), 9], [7]], [[("audio", [40, 9]), 12]]],
        [[[30]], [[3, ("video", 2, 2, 4), 6], [21]]],
    ],
    [
        [[[1100]], [[4, ("audio", [60]), ("image", 2, 2), 11]]],
        [[[8, ("video", 1, 2, 2), 5]], [[17], [6]]],
    ],
]
STEPS = len(ROWS)


def batches_of(step: int, process: int) -> list[dict]:
    seed = 100 * step + 50 * process
    return [
        collate([make_sample(row, seed + 10 * n + m) for m, row in enumerate(rows)], left=False)
        for n, rows in enumerate(ROWS[step][process])
    ]


def rate_of(group: str, step: int) -> float:
    return RATES[group] * (1 - 0.2 * step)


def optimizer_of(model) -> torch.optim.AdamW:
    """Two groups with their own rates; the vision tower is frozen."""
    model.model.vision_tower.requires_grad_(False)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = {"projectors": [p for n, p in named if "projector" in n], "others": []}
    groups["others"] = [p for n, p in named if "projector" not in n]
    # a large eps: with the usual one, parameters whose gradient is zero but for rounding move by the whole rate
    groups = [{"params": params, "lr": RATES[name], "name": name} for name, params in groups.items()]
    return torch.optim.AdamW(groups, eps=1e-3, weight_decay=0.1)


def train_step(accelerator, model, optimizers, step, on_gradients=None) -> tuple[float, float]:
    """-> loss over the tokens of all processes, gradient norm."""
    config = D.bare_model(model).config
    batches = [D.pad_missing_modalities(batch, config) for batch in batches_of(step, accelerator.process_index)]
    tokens = D.agree_on_step(accelerator, model, batches)
    for group in optimizers[0].param_groups:
        group["lr"] = rate_of(group["name"], step)
    total = 0.0
    for number, batch in enumerate(batches):
        with D.microbatch(accelerator, model, number == len(batches) - 1):
            loss = model(**batch, skip_logits=True, num_items_in_batch=tokens / accelerator.num_processes).loss
            D.backward(accelerator, model, loss)
        total += loss.item() / accelerator.num_processes
    if on_gradients is not None:
        on_gradients()
    norm, applied = D.clip_and_step(accelerator, model, optimizers, MAX_NORM)
    assert applied
    return accelerator.gather(torch.tensor([total])).sum().item(), norm


def gathered_gradients(model) -> dict:
    """Gradients of the prepared ZeRO-3 model by name; those of local experts under `name@process`."""
    grads = {}
    for name, parameter in model.module.named_parameters():
        if parameter.requires_grad:
            grad = model.optimizer.get_fp32_grad_for_param(parameter)
            if getattr(parameter, "allreduce", True) is False:
                shares = [torch.empty_like(grad) for _ in range(dist.get_world_size())]
                dist.all_gather(shares, grad.contiguous())
                grad = torch.cat(shares)
            grads[name] = grad.cpu().clone()
    return grads


def prepared(accelerator, source, expert_parallel, recompute):
    """As a process that starts: the model from files, an empty optimizer."""
    accelerator.free_memory()
    accelerator.deepspeed_engine_wrapped = None
    model = OmniForConditionalGeneration.from_pretrained(source, dtype=D.model_dtype(accelerator))
    D.prepare_expert_parallel(model, expert_parallel, accelerator)
    model.train()
    if recompute:
        model.gradient_checkpointing_enable()
    return D.prepare_training(accelerator, model, [optimizer_of(model)])


def zero3(accelerator, folder: Path, name: str, expert_parallel: int, threshold: int, recompute: bool):
    accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    out = folder / name
    model, optimizers = prepared(accelerator, folder / "start", expert_parallel, recompute)
    experts = [p for name, p in model.module.named_parameters() if name.endswith(".mixer.experts.up_proj")]
    log = {"steps": [], "experts_of_a_process": [p.ds_shape[0] for p in experts]}
    for step in range(STEPS):

        def keep_gradients(step=step):
            grads = gathered_gradients(model)
            if accelerator.is_main_process:
                out.mkdir(exist_ok=True)
                save_file(grads, out / f"gradients-{step}.safetensors")

        log["steps"].append(train_step(accelerator, model, optimizers, step, keep_gradients))
        D.save_released(accelerator, model, out / f"step-{step + 1}")
        D.save_state(model, out / f"step-{step + 1}")
        accelerator.wait_for_everyone()

    batch = D.pad_missing_modalities(batches_of(0, 0)[0], D.bare_model(model).config)
    D.agree_on_step(accelerator, model, [batch])
    with D.microbatch(accelerator, model, True):
        bad = torch.nan if accelerator.process_index == 1 else 1.0  # on one process alone
        D.backward(accelerator, model, model(**batch, skip_logits=True).loss * bad)
    log["not_finite"] = D.clip_and_step(accelerator, model, optimizers, MAX_NORM)[1]
    D.save_released(accelerator, model, out / "skipped")

    model, optimizers = prepared(accelerator, out / "step-1", expert_parallel, recompute)
    D.load_state(model, out / "step-1")
    log["resumed"] = train_step(accelerator, model, optimizers, 1)
    D.save_released(accelerator, model, out / "resumed")
    if expert_parallel > 1:
        model, optimizers = prepared(accelerator, out / "step-1", 1, recompute)
        try:
            D.load_state(model, out / "step-1")
        except ValueError as error:
            log["refused"] = str(error)
        try:
            D.prepare_expert_parallel(model.module, 3, accelerator)
        except ValueError as error:
            log["indivisible"] = str(error)
    if accelerator.is_main_process:
        (out / "log.json").write_text(json.dumps(log))


def data_parallel(folder: Path):
    """The same processes again, without DeepSpeed."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
    accelerator = D.make_accelerator(MAX_NORM)
    assert accelerator.num_processes == 2 and accelerator.distributed_type == DistributedType.MULTI_CPU
    model = OmniForConditionalGeneration.from_pretrained(folder / "start", dtype=D.model_dtype(accelerator)).train()
    model, optimizers = D.prepare_training(accelerator, model, [optimizer_of(model)])
    steps = [train_step(accelerator, model, optimizers, step) for step in range(STEPS)]
    D.save_released(accelerator, model, folder / "ddp" / "step-2")
    if accelerator.is_main_process:
        (folder / "ddp" / "log.json").write_text(json.dumps({"steps": steps}))


def main():
    folder = Path(sys.argv[1])
    accelerator = D.make_accelerator(MAX_NORM)
    assert accelerator.num_processes == 2 and D.is_sharded(accelerator)
    # parameters below the threshold stay whole at every process: none of them, or all the small ones
    zero3(accelerator, folder, "plain", expert_parallel=1, threshold=0, recompute=False)
    zero3(accelerator, folder, "experts", expert_parallel=2, threshold=2_000, recompute=True)
    data_parallel(folder)


if __name__ == "__main__":
    main()
