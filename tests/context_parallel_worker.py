"""The ranks of tests/test_context_parallel.py: every check against one process, errors written as JSON by rank 0.

python context_parallel_worker.py <folder> <world size> ... (processes are forked, so that imports are paid once)
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_model import collate, make_sample, tiny_model
from torch.nn.parallel import DistributedDataParallel

from modeling_omni.context_parallel import context_group, set_context_parallel, shard_batch

PATTERN = "M*EM-*M"
IMAGE, VIDEO, SOUND = ("image", 4, 6), ("video", 3, 4, 4), ("audio", [57, 30])


def packed(rows: list[list[list]]) -> dict:
    """Rows of documents (each as in `make_sample`) -> a batch as the collator of training rows makes it."""
    samples, lengths = [], []
    for number, documents in enumerate(rows):
        parts = [make_sample(document, 10 * number + i) for i, document in enumerate(documents)]
        samples.append({key: sum((part[key] for part in parts), []) for key in parts[0]})
        lengths.append([len(part["ids"]) for part in parts])
    batch = collate(samples, left=False)
    batch["seq_idx"] = torch.full_like(batch["input_ids"], -1)
    for row, own in enumerate(lengths):
        start = 0
        for document, length in enumerate(own):
            batch["seq_idx"][row, start : start + length] = document
            batch["labels"][row, start] = -100
            start += length
    return batch


def in_float64(model):
    """The model in float64 throughout, so that no rounding hides or excuses a difference."""
    torch.Tensor.float = torch.Tensor.double  # norms, router, scan and loss are computed in float32 otherwise
    model.config.llm_config._attn_implementation = "sdpa"  # eager's softmax is float32
    return model.double()


def media_rows() -> dict:
    return packed(
        [
            [[9, IMAGE, 5], [2], [3, VIDEO, 7, SOUND, 4], [1], [21], [6, ("image", 2, 4), 3]],
            [[40, ("audio", [90]), 25, ("image", 6, 4), 9, ("video", 2, 6, 4), 8], [3], [11]],
        ]
    )


def border_rows(size: int) -> dict:
    """Slices of 16 tokens; documents end at borders, just before and just behind them; one covers several slices."""
    ends = [16, 33, 47, 50, 63]  # the last document goes on to the end
    total = 32 * size
    lengths = [stop - start for start, stop in zip([0, *ends], [*ends, total])]
    other = [total - 17, 1, 1, 15]
    return packed([[[n] for n in lengths], [[n] for n in other]])


def run(model, batch: dict, group, engine: bool = False) -> dict[str, torch.Tensor]:
    """Loss, hidden states of every layer and gradients; with a group, gathered and averaged over its ranks.

    engine: leave the averaging of gradients to torch's data parallelism, which fails if a rank leaves out a parameter.
    """
    if group is not None:
        set_context_parallel(model, group)
        inputs = shard_batch(batch, dist.get_rank(group), dist.get_world_size(group))
    else:
        set_context_parallel(model, None)
        inputs = batch | {"use_cache": False}
    called = DistributedDataParallel(model, process_group=group) if engine else model
    for _ in range(1 + engine):  # it tells in the next step
        model.zero_grad()
        output = called(**inputs, output_hidden_states=True)
        output.loss.backward()
    result = {"loss": output.loss.detach().clone()}
    hidden = torch.stack(output.hidden_states, -2)
    if group is not None:
        hidden = replace(inputs["context"], group=group).gather_rows(hidden)
        dist.all_reduce(result["loss"], group=group)
        result["loss"] /= dist.get_world_size(group)
    result["hidden"] = hidden.detach()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if group is not None and parameter.requires_grad and not engine:
            assert gradient is not None or "vision" in name or "audio" in name, f"{name} has no gradient on this rank"
            gradient = torch.zeros_like(parameter) if gradient is None else gradient.clone()
            dist.all_reduce(gradient, group=group)
            gradient /= dist.get_world_size(group)
        if gradient is not None:
            result[name] = gradient.clone()
    return result


def difference(actual: dict, expected: dict, is_real: torch.Tensor) -> dict[str, float]:
    """Largest differences, of gradients relative to each one's largest entry; hidden states of padding do not count."""
    scale = max(value.abs().max().item() for name, value in expected.items() if name not in ("loss", "hidden"))
    worst = {"loss": abs(actual["loss"] - expected["loss"]).item()}
    worst["hidden"] = (actual["hidden"] - expected["hidden"])[is_real].abs().max().item()
    relative = {}
    for name in actual.keys() | expected.keys():
        if name not in ("loss", "hidden"):
            a, e = (values.get(name, torch.zeros(())) for values in (actual, expected))
            relative[name] = ((a - e).abs().max() / e.abs().max().clamp(min=1e-4 * scale)).item()
    worst["gradient"] = max(relative.values())
    worst["gradient_of"] = max(relative, key=relative.get)
    worst["gradients"] = sum(bool(value.abs().max() > 0) for name, value in expected.items())
    return worst


def main(rank: int, size: int, folder: Path):
    torch.manual_seed(rank)  # nothing may depend on equal generators
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    group = context_group(size)
    model = tiny_model(pattern=PATTERN)
    for layer in model.model.language_model.layers:
        if layer.kind == "M":
            layer.mixer.chunk = 8  # no multiple of which the slices are
            layer.mixer.dt_bias.data.fill_(-3.0)  # slow decay: states matter several slices later
    errors = {}

    def check(name, batch, engine=False):
        actual = run(model, batch, group, engine)
        if rank == 0:
            errors[name] = difference(actual, run(model, batch, None), batch["attention_mask"].bool())

    media = media_rows()
    check("float32", media)
    in_float64(model)
    check("packed rows with media", media)
    check("documents at borders", border_rows(size))
    left = collate([make_sample([9, IMAGE, 30, SOUND, 7], 3), make_sample([4, VIDEO, 5], 4)])
    left["labels"][torch.arange(2), left["attention_mask"].argmax(1)] = -100  # or padding would predict it
    check("left padding, not packed", left)
    one = collate([make_sample([131], 5)])
    check("one document", {name: one[name] for name in ("input_ids", "labels", "attention_mask")})
    check("shorter than the slices", collate([make_sample([5], 6)]))
    few = {name: value.clone() for name, value in media.items()}
    few["labels"][:, 4:] = -100  # all in the first slice: the other ranks have no trained token
    check("labels on one rank", few)

    model.train()
    model.model.vision_tower.force_cpe_eval_mode = True
    model.gradient_checkpointing_enable({"use_reentrant": False})
    check("gradient checkpointing", media)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("projector" in name)
    check("projectors alone", media)
    model.gradient_checkpointing_disable()
    model.requires_grad_(True)
    check("data parallel engine", media, engine=True)

    if size == 4:  # two rows at a time, each over two ranks: gradients averaged over all four ranks
        pairs = context_group(2)
        batches = [media, border_rows(2)]
        own = run(model, batches[rank // 2], pairs)
        mean = {"loss": own["loss"], "hidden": own["hidden"]}
        for name, parameter in model.named_parameters():
            mean[name] = own.get(name, torch.zeros_like(parameter))
            dist.all_reduce(mean[name])
            mean[name] /= 4
        if rank == 0:
            first, second = (run(model, batch, None) for batch in batches)
            expected = {name: (first[name] + second.get(name, 0)) / 2 for name in first.keys() - {"loss", "hidden"}}
            expected |= {"loss": first["loss"], "hidden": first["hidden"]}
            errors["two groups"] = difference(mean, expected, media["attention_mask"].bool())

    if rank == 0:
        (folder / "errors.json").write_text(json.dumps(errors))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number in map(int, sys.argv[2:]):
        folder = Path(sys.argv[1]) / str(number)
        folder.mkdir()
        torch.multiprocessing.start_processes(main, (number, folder), number, start_method="fork")
