"""Training over several processes: DeepSpeed ZeRO-3 with expert parallelism, or plain data parallelism (paper 3.1.8).

ZeRO-3 keeps every parameter, gradient and optimizer state cut into one piece per process. Expert parallelism (EP) of
degree P additionally gives each process of a group of P its own 1/P of every layer's routed experts: tokens travel to
their experts and back (two all-to-alls per layer) where ZeRO-3 alone would gather the experts at every process. The
groups are consecutive processes; processes that hold the same experts (their number is world / P) cut these
between them as ZeRO-3 does, so memory of weights and optimizer is the same with and without EP.

What every process must then do alike, or all of them hang: call the same modules in the same order and number. Here:
`pad_missing_modalities` gives a batch without pictures (videos, sound) a tiny one that nothing learns from, and
`agree_on_step` settles how often the audio tower and the head run. Nothing in this model is random in training (no
dropout, no LayerDrop, batch norm pinned).

Verified with two gloo processes on CPU. The same code chooses NCCL where there are GPUs; that was never run.

Shape legend: T tokens of all rows, D hidden size, K experts per token, E experts, L experts of one process,
R rows (one per token and chosen expert).
"""

import contextlib
import gc
import json
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from safetensors.torch import load_file, save_file
from torch import nn

from .configuration_omni import OmniConfig
from .media import OmniInputError
from .modeling_audio import plan_passes
from .modeling_language import LOSS_CHUNK, Experts, MoE, relu2
from .modeling_omni import AUDIO, IMAGE, VIDEO, OmniForConditionalGeneration

# ZeRO-3 finds an expert's processes through attributes that DeepSpeed defines for its own expert layer
# (`_cut_over_expert_group`); they are private, hence one release. test_distributed.py tells whether another one fits.
DEEPSPEED_VERSION = "0.19.8"
PAD_FRAMES = 8  # mel frames of the audio that stands in for a missing one: one token

_STATE_FILE = "zero3-{rank:05d}-of-{world:05d}.safetensors"


# ---- start ----


def make_accelerator(max_grad_norm: float = 0.0, **trackers) -> Accelerator:
    """The Accelerator of this process, as `accelerate launch --config_file configs/accelerate/<name>.yaml` set it up.

    With `distributed_type: DEEPSPEED` the DeepSpeed configuration is made here: the YAML file gives `zero_stage`,
    `zero3_init_flag`, `offload_optimizer_device` and `mixed_precision`, this function everything else.

    Args:
        max_grad_norm: gradient clipping (DeepSpeed clips by itself), 0 for none.
        trackers: of `Accelerator`: `log_with`, `project_dir`.

    Raises:
        OmniInputError: the processes did not find each other, or the configuration is not one we support.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    gpu = torch.cuda.is_available()
    options = dict(trackers)
    # the others wait while one process measures the data, tests or writes a checkpoint
    group = {"timeout": timedelta(hours=6)} if world > 1 else {}
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        options["deepspeed_plugin"] = _deepspeed_plugin(max_grad_norm)
        if not gpu:  # without this every process believes that it is alone, and trains on the same rows
            group["backend"] = "gloo"
    elif world > 1 and not gpu:
        options["cpu"] = True
    if group:
        options["kwargs_handlers"] = [InitProcessGroupKwargs(**group)]
    accelerator = Accelerator(**options)
    # shared by the whole process: a trainer that broke off between two optimizer steps leaves it at False, and then no
    # optimizer would ever step
    accelerator.gradient_state._set_sync_gradients(True)
    if accelerator.num_processes != world:
        raise OmniInputError(
            f"{world} processes were started but accelerate sees {accelerator.num_processes}: start with `accelerate "
            "launch --config_file configs/accelerate/<name>.yaml`; with DeepSpeed never set use_cpu"
        )
    return accelerator


def _deepspeed_plugin(max_grad_norm: float):
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise OmniInputError(f"this configuration needs `pip install deepspeed=={DEEPSPEED_VERSION}`") from error
    from accelerate.utils import DeepSpeedPlugin

    if deepspeed.__version__.split("+")[0] != DEEPSPEED_VERSION:
        raise OmniInputError(f"deepspeed {deepspeed.__version__} is installed, only {DEEPSPEED_VERSION} is supported")
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise OmniInputError("deepspeed_config_file is not supported: see configs/accelerate/zero3.yaml for its keys")
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    if stage != "3":
        raise OmniInputError(f"zero_stage {stage} is not supported: use 3, or plain data parallelism")
    offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
    if offload not in ("none", "cpu"):
        raise OmniInputError(f"offload_optimizer_device {offload} is not supported: use none or cpu")
    gpu = torch.cuda.is_available()
    if not gpu:  # an optional C++ kernel that would be compiled at start, for a minute and with a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    zero = {
        "stage": 3,
        "overlap_comm": gpu,
        "contiguous_gradients": True,
        "memory_efficient_linear": False,  # adds biases outside of the product: other rounding in bf16
        # integers: "auto" would be worked out from a hidden_size that a composed configuration does not have
        "reduce_bucket_size": 50_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_param_persistence_threshold": 100_000,
        "sub_group_size": 100_000_000,
    }
    if offload == "cpu":
        zero["offload_optimizer"] = {"device": offload, "pin_memory": gpu}
    config = {
        "train_batch_size": int(os.environ.get("WORLD_SIZE", 1)),  # DeepSpeed only counts with it
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # see `microbatch`: the loop says which one is the last
        "gradient_clipping": max_grad_norm,
        "data_types": {"grad_accum_dtype": "fp32"},  # bf16 would round small gradients of a step's many rows away
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    plugin = DeepSpeedPlugin()  # reads zero3_init_flag; the rest of what it reads is replaced
    plugin.deepspeed_config.update(config)
    return plugin


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether parameters are cut over the processes (ZeRO-3)."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def offloads(accelerator: Accelerator) -> bool:
    """Whether the optimizer's state stands in the host's memory."""
    if not is_sharded(accelerator):
        return False
    return "offload_optimizer" in accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]


def model_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype to load weights in: ZeRO-3 keeps float32 masters itself, everything else trains float32 weights."""
    return torch.bfloat16 if is_sharded(accelerator) and accelerator.mixed_precision == "bf16" else torch.float32


# ---- expert parallelism ----


class _AllToAll(torch.autograd.Function):
    """Rows [R, D] to the processes of a group: `send[p]` of them to process p, `receive[p]` from it."""

    @staticmethod
    def forward(ctx, rows_RD, send, receive, group):
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(rows_RD, send, receive, group)

    @staticmethod
    def backward(ctx, grad_RD):
        return _exchange(grad_RD, ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange(rows_RD, send, receive, group):
    received = rows_RD.new_empty(sum(receive), rows_RD.shape[1])
    dist.all_to_all_single(received, rows_RD.contiguous(), receive, send, group=group)
    return received


class ParallelExperts(nn.Module):
    """This process's share of a layer's routed experts; equal to `Experts` of all of them.

    The parameters have the names of `Experts`, [L, ...] instead of [E, ...]: process p of the group has experts
    p * L to (p + 1) * L - 1.
    """

    def __init__(self, up_proj: nn.Parameter, down_proj: nn.Parameter, group: dist.ProcessGroup):
        super().__init__()
        self.up_proj, self.down_proj = up_proj, down_proj
        self.group, self.size = group, dist.get_world_size(group)
        self.num_local = getattr(up_proj, "ds_shape", up_proj.shape)[0]

    def forward(self, hidden_TD: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        order = experts_TK.flatten().argsort(stable=True)  # rows by expert, hence by process
        tokens = order // experts_TK.shape[1]
        counts_PL = experts_TK.flatten().bincount(minlength=self.size * self.num_local).view(self.size, -1)
        theirs_PL = torch.empty_like(counts_PL)  # rows that each process sends to each of this one's experts
        dist.all_to_all_single(theirs_PL, counts_PL, group=self.group)
        send, receive = counts_PL.sum(1).tolist(), theirs_PL.sum(1).tolist()
        rows_RD = _AllToAll.apply(hidden_TD[tokens], send, receive, self.group)

        local = torch.arange(self.num_local, device=order.device).repeat(self.size)
        by_expert = local.repeat_interleave(theirs_PL.flatten()).argsort(stable=True)
        # experts without rows take part as well: every process's graph, and every parameter's gradient, must be there
        parts = rows_RD[by_expert].split(theirs_PL.sum(0).tolist())
        outputs = [
            F.linear(relu2(F.linear(part, up)), down)
            for part, up, down in zip(parts, self.up_proj.unbind(), self.down_proj.unbind(), strict=True)
        ]
        rows_RD = _AllToAll.apply(torch.cat(outputs)[by_expert.argsort()], receive, send, self.group)
        weighted = rows_RD * weights_TK.flatten()[order, None].to(rows_RD.dtype)
        return torch.zeros_like(hidden_TD).index_add(0, tokens, weighted)


def prepare_expert_parallel(model: nn.Module, expert_parallel: int, accelerator: Accelerator) -> None:
    """Leaves each process its own 1/`expert_parallel` of the routed experts, in place.

    Call it on a loaded model, before the optimizer is made: the experts' parameters are new ones. 1 changes nothing.

    Raises:
        OmniInputError: the degree does not divide the processes or the experts, or there is no ZeRO-3.
    """
    if expert_parallel == 1:
        return
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    experts = {layer.experts.num_experts for layer in layers if isinstance(layer.experts, Experts)}
    if not is_sharded(accelerator):
        raise OmniInputError(
            f"expert_parallel: {expert_parallel} needs ZeRO-3: start with `accelerate launch --config_file "
            "configs/accelerate/zero3_experts.yaml`"
        )
    if expert_parallel < 1 or accelerator.num_processes % expert_parallel or any(n % expert_parallel for n in experts):
        raise OmniInputError(
            f"expert_parallel: {expert_parallel} must divide the {accelerator.num_processes} processes and the "
            f"{sorted(experts)} experts of a layer"
        )
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import groups

    groups._create_expert_and_data_parallel(expert_parallel)
    name = f"ep_size_{expert_parallel}"
    group = groups._get_expert_parallel_group(name)
    rank = dist.get_rank(group)
    for layer in layers:
        whole = layer.experts
        local = []
        for parameter in (whole.up_proj, whole.down_proj):
            with GatheredParameters([parameter]):
                share = parameter.data.chunk(expert_parallel)[rank].clone()
            share = nn.Parameter(share, requires_grad=parameter.requires_grad)
            _cut_over_expert_group(share, name, groups)
            if hasattr(parameter, "ds_id"):  # built in pieces (zero3_init_flag): the new ones are cut right away
                parameter.convert_to_zero_parameters(param_list=[share])
            local.append(share)
        layer.experts = ParallelExperts(*local, group)
        del whole, parameter
        gc.collect()  # ZeRO's parameters stand in reference cycles; all layers' old experts at once would not fit


def _cut_over_expert_group(parameter: nn.Parameter, name: str, groups) -> None:
    """Tells DeepSpeed that this parameter is cut over, and reduced between, the processes with the same experts."""
    parameter.allreduce = False  # keep the model broadcast at start from making all experts those of process 0
    parameter.group_name = name
    parameter.ds_zero_placement_family = "autoep_expert"  # averages over the world, sums the norm over the EP group
    parameter.ds_zero_partition_group_name = name
    parameter.ds_zero_partition_process_group = groups._get_expert_data_parallel_group(name)


def prepare_training(accelerator: Accelerator, model: nn.Module, optimizers: list) -> tuple[nn.Module, list]:
    """`accelerator.prepare` of the model and its optimizers, checked.

    Set learning rates in the `param_groups` of the optimizers returned here, never in those of the ones given: with
    ZeRO-3 the optimizer may be another object.

    Raises:
        OmniInputError: ZeRO-3 and more than one optimizer.
    """
    if is_sharded(accelerator) and len(optimizers) != 1:
        raise OmniInputError(f"ZeRO-3 takes one optimizer (optimizer: adamw), not {len(optimizers)}")
    model, *optimizers = accelerator.prepare(model, *optimizers)
    if is_sharded(accelerator):
        for name, parameter in model.module.named_parameters():
            own = getattr(parameter, "ds_zero_partition_process_group", None)
            if getattr(parameter, "ds_zero_placement_family", None) == "autoep_expert" and own is not None:
                assert parameter.ds_process_group is own, f"{name}: DeepSpeed cut an expert over the wrong processes"
                assert model.optimizer._autoep_expert_parallel_group([parameter]) is not None, name
    return model, optimizers


# ---- steps ----


def bare_model(model: nn.Module) -> OmniForConditionalGeneration:
    """Our model inside DeepSpeed's, DDP's and PEFT's wrappers."""
    return next(module for module in model.modules() if isinstance(module, OmniForConditionalGeneration))


def pad_missing_modalities(batch: dict[str, torch.Tensor], config: OmniConfig) -> dict[str, torch.Tensor]:
    """The batch with a tiny image, video or sound where it has none, so that every process runs every tower.

    Their placeholder tokens (one each) stand behind the first row, a document of their own where rows are packed:
    nothing before them can see them, no label is on them, so loss and gradients stay as they are (those of a tower
    that had no input become zero where they were absent). Rows grow by up to three tokens.

    Args:
        batch: inputs as the processor or a packing collator returns them.
    """
    ids, merge, patch = batch["input_ids"], config.merge_size, 3 * config.vision_config.patch_size**2
    device, added, batch = ids.device, [], dict(batch)
    for key, grid, kind, size in (
        ("pixel_values", "image_grid_thw", IMAGE, patch),
        ("pixel_values_videos", "video_grid_thw", VIDEO, patch * config.vision_config.video_temporal_patch_size),
    ):
        if batch.get(key) is None:
            batch[key] = torch.zeros(merge**2, size, device=device)
            batch[grid] = torch.tensor([[1, merge, merge]], device=device)
            added.append((config.img_context_token_id, kind))
    if batch.get("input_features") is None:
        batch["input_features"] = torch.zeros(1, PAD_FRAMES, config.sound_config.num_mel_bins, device=device)
        batch["input_features_mask"] = torch.ones(1, PAD_FRAMES, dtype=torch.bool, device=device)
        batch["audio_clip_counts"] = torch.ones(1, dtype=torch.long, device=device)
        added.append((config.sound_context_token_id, AUDIO))
    if not added:
        return batch
    new_ids, new_types = torch.tensor(added, device=device).T
    first = torch.arange(len(ids), device=device)[:, None] == 0
    columns = {
        "input_ids": (new_ids, 0),
        "mm_token_type_ids": (new_types, 0),
        "attention_mask": (torch.ones_like(new_ids), 0),
        "labels": (torch.full_like(new_ids, -100), -100),
        "seq_idx": (torch.full_like(new_ids, ids.shape[1]), -1),
    }
    for name, (values, fill) in columns.items():
        old = batch.get(name)
        if old is None and name == "mm_token_type_ids":
            old = torch.zeros_like(ids)
        elif old is None and name == "attention_mask":
            old = torch.ones_like(ids)
        if old is not None:
            batch[name] = torch.cat([old, torch.where(first, values, fill).to(old.dtype)], 1)
    return batch


def trained_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Tokens of a batch that the loss is over (the first of a row is never predicted)."""
    return int((batch["labels"][:, 1:] != -100).sum())


def agree_on_step(accelerator: Accelerator, model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> int:
    """Makes the processes agree on one optimizer step; call it once per step, with its micro-batches.

    Returns the trained tokens of all processes and micro-batches: pass `num_items_in_batch=tokens /
    accelerator.num_processes` to the model (data parallelism averages over processes), and the loss, summed over
    micro-batches and averaged over processes, is the mean over all tokens.

    Raises:
        OmniInputError: the processes came with different numbers of micro-batches.
    """
    inner = bare_model(model)
    tower = inner.model.audio_tower
    passes = [
        len(plan_passes(batch["input_features_mask"].sum(-1).tolist(), tower.max_frames_per_pass))
        for batch in batches
        if batch.get("input_features_mask") is not None
    ]
    tokens = [trained_tokens(batch) for batch in batches]
    if accelerator.num_processes == 1:
        return sum(tokens)
    chunks = max(1, -(-max(tokens) // LOSS_CHUNK))
    own = torch.tensor([[sum(tokens), len(batches), chunks, max(passes, default=0)]], device=accelerator.device)
    all_tokens, numbers, all_chunks, all_passes = accelerator.gather(own).T.tolist()
    if len(set(numbers)) > 1:
        raise OmniInputError(f"processes have different numbers of micro-batches in one step: {numbers}")
    inner.min_loss_chunks, tower.min_passes = max(all_chunks), max(all_passes)
    inner.model.vision_tower.max_patches_per_pass = 2**62  # always one pass
    return sum(all_tokens)


@contextlib.contextmanager
def microbatch(accelerator: Accelerator, model: nn.Module, last: bool):
    """Around forward and backward of one micro-batch; `last`: the optimizer steps after it."""
    if is_sharded(accelerator):
        model.set_gradient_accumulation_boundary(last)
        yield
    elif last or accelerator.num_processes == 1:
        yield
    else:
        with accelerator.no_sync(model):
            yield


def backward(accelerator: Accelerator, model: nn.Module, loss: torch.Tensor) -> None:
    """Adds the gradients of `loss`. Unlike accelerate's `backward` it neither divides the loss nor steps."""
    if is_sharded(accelerator):
        model.backward(loss, scale_wrt_gas=False)
    else:
        accelerator.backward(loss)


def clip_and_step(accelerator: Accelerator, model: nn.Module, optimizers: list, max_norm: float) -> tuple[float, bool]:
    """Clips, steps and clears the gradients -> (norm before clipping, whether the step was done).

    A norm that is not finite skips the step, on every process alike. ZeRO-3 clips to `make_accelerator`'s norm.
    """
    if is_sharded(accelerator):
        model.step()
        return float(model.get_global_grad_norm()), model.was_step_applied()
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = float(nn.utils.clip_grad_norm_(parameters, max_norm or torch.inf))
    finite = norm - norm == 0.0
    for optimizer in optimizers:
        if finite:
            optimizer.step()
        optimizer.zero_grad()
    return norm, finite


# ---- checkpoints ----


@torch.no_grad()
def gathered_state(model: nn.Module, keep=lambda name: True) -> dict[str, torch.Tensor] | None:
    """Whole parameters and buffers by name on process 0, None elsewhere; every process must call it.

    Args:
        model: the prepared model or what is in it; cut or not.
        keep: which names are wanted (adapters only, say).
    """
    from deepspeed.runtime.zero import GatheredParameters

    model = getattr(model, "module", model)
    main = dist.get_rank() == 0
    groups_of = {
        id(parameter): (module.group, module.size)
        for module in model.modules()
        if isinstance(module, ParallelExperts)
        for parameter in module.parameters(recurse=False)
    }
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not keep(name):
            continue
        with GatheredParameters([value] if hasattr(value, "ds_id") else []):
            whole = value.data
            if id(value) in groups_of:
                group, size = groups_of[id(value)]
                first = dist.get_rank(group) == 0
                shares = [torch.empty_like(whole) for _ in range(size)] if first else None
                dist.gather(whole.contiguous(), shares, dst=dist.get_global_rank(group, 0), group=group)
                whole = torch.cat(shares) if main else whole
            if main:
                state[name] = whole.detach().to("cpu", copy=True)
    return state if main else None


def save_released(accelerator: Accelerator, model: nn.Module, folder: str | Path) -> None:
    """Writes the model in the released layout, gathered at process 0; every process must call it.

    `from_pretrained` reads the folder in one process or in many. Host memory for one whole copy is needed.
    """
    inner = bare_model(model)
    state = None
    if is_sharded(accelerator):
        names = {id(module): name for name, module in getattr(model, "module", model).named_modules()}
        prefix = names[id(inner)]
        state = gathered_state(model, lambda name: name.startswith(prefix))
        state = state and {name[len(prefix) :].lstrip("."): value for name, value in state.items()}
        # what from_pretrained noted under ZeRO-3 has rules that put a wrong prefix back; None: our registered rules
        inner._weight_conversions = None
    if accelerator.is_main_process:
        inner.save_pretrained(folder, state_dict=state)
    accelerator.wait_for_everyone()


def save_state(model: nn.Module, folder: str | Path) -> None:
    """Writes this process's float32 weights and optimizer state under ZeRO-3: one file per process, never pickled.

    Together with `save_released` in the same folder it resumes exactly, on as many processes.
    """
    tensors, numbers = {}, {}
    for number, (flat, state) in enumerate(_sub_groups(model.optimizer)):
        tensors[f"{number}.weights"] = flat.detach().cpu().contiguous()
        for key, value in state.items():
            if torch.is_tensor(value):
                tensors[f"{number}.{key}"] = value.detach().cpu().contiguous()
            else:
                numbers[f"{number}.{key}"] = value
    metadata = {"layout": _state_layout(model.optimizer), "numbers": json.dumps(numbers)}
    file = Path(folder) / _STATE_FILE.format(rank=dist.get_rank(), world=dist.get_world_size())
    file.parent.mkdir(parents=True, exist_ok=True)  # nodes may have discs of their own
    save_file(tensors, file, metadata=metadata)


def load_state(model: nn.Module, folder: str | Path) -> None:
    """Reads what `save_state` wrote into a prepared model of the same processes, groups and degree of EP.

    Frozen parameters are not in it: build the model from the weights in the same folder.

    Raises:
        OmniInputError: another number of processes, degree of EP or choice of trained parameters.
    """
    from safetensors import safe_open

    file = Path(folder) / _STATE_FILE.format(rank=dist.get_rank(), world=dist.get_world_size())
    if not file.exists():
        found = sorted(path.name for path in Path(folder).glob("zero3-*"))
        raise OmniInputError(
            f"{folder} has no state of {dist.get_world_size()} processes (it has {found[:1] or 'none'}): resume with "
            "as many as it was written with, or start a new run from its weights (`model:`)"
        )
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    optimizer = model.optimizer
    if metadata["layout"] != _state_layout(optimizer):
        raise OmniInputError(
            f"{file} was written with another expert_parallel, other trained groups or another model; resume with the "
            "same, or start a new run from its weights (`model:`)"
        )
    tensors, numbers = load_file(file), json.loads(metadata["numbers"])
    optimizer.checkpoint_event_prologue()
    for number, (flat, state) in enumerate(_sub_groups(optimizer)):
        flat.data.copy_(tensors[f"{number}.weights"])
        prefix = f"{number}."
        for key, value in (tensors | numbers).items():
            name = key.removeprefix(prefix)
            if not key.startswith(prefix) or name == "weights":
                continue
            old = state.get(name)
            state[name] = value.to(old.device) if torch.is_tensor(old) else value
        optimizer.fp16_partitioned_groups_flat[number].data.copy_(flat.data)
        optimizer._unflatten_partitioned_parameters(number)
    if optimizer.persistent_parameters:  # kept whole at every process: cut now, gathered anew by the epilogue
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    optimizer.checkpoint_event_epilogue()


def _sub_groups(optimizer):
    """(flat float32 weights, state of the inner optimizer) of each of ZeRO-3's sub-groups of parameters."""
    return [(flat, optimizer.optimizer.state[flat]) for flat in optimizer.fp32_partitioned_groups_flat]


def _state_layout(optimizer) -> str:
    """What must be equal for a state to fit: the shape and place of every parameter of every sub-group."""
    return json.dumps(
        [
            [[list(p.ds_shape), getattr(p, "group_name", None)] for p in params] + [optimizer.sub_group_to_group_id[i]]
            for i, params in enumerate(optimizer.fp16_groups)
        ]
    )


__all__ = [
    "ParallelExperts",
    "agree_on_step",
    "backward",
    "bare_model",
    "clip_and_step",
    "gathered_state",
    "is_sharded",
    "load_state",
    "make_accelerator",
    "microbatch",
    "model_dtype",
    "pad_missing_modalities",
    "prepare_expert_parallel",
    "prepare_training",
    "save_released",
    "save_state",
    "trained_tokens",
]
