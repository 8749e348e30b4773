"""What a stage takes before it starts: bytes per GPU, batches and steps, from its configuration alone (paper Table 6).

Parameters are counted on the meta device. Under ZeRO-3 every GPU holds 1/world of the weights (2 bytes in bfloat16), of
the trained ones' gradients (4, summed in float32) and of their float32 masters and Adam moments (12); expert
parallelism changes who holds an expert, not how many bytes. Offload moves the last 16 to the host, which holds 4 more:
the gradients once as they are summed and once as the optimizer reads them.

Activations are counted from this package's own code, tensor by tensor: what autograd saves per token in a block of each
kind (`block_bytes`), with float32 where the code computes in float32. A recomputed block saves its input only. One
block at a time then holds what it saves, times `PEAK` for the gradients and temporaries of its backward pass; that
factor was measured with the CPU allocator. tests/test_planning.py checks the sums against saved-tensor hooks.

Assumptions, all on the safe side unless said: rows are full; all media positions of a row are patches, or all are
sound, whichever costs more; experts are evenly loaded (not on the safe side: there is no capacity limit); blocks that
are frozen inside a trained path save as much as trained ones; what context parallelism adds to Mamba's blocks (under
a tenth) is left out. A GPU is taken to hold 95 % of its size, for fragments. The host's bytes are offload and decoded
pictures (`input_bytes`); a row full of video would have twice the pixels of one full of pictures.

Shape legend: D width, F inner width of an MLP, H heads, P head size, G groups, N state size, Q tokens of a scan chunk,
C conv channels, K experts per token, E experts, V vocabulary, b bytes of a value in the dtype of the weights.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import yaml

from . import ssd
from .configuration_omni import OmniConfig, resolve_checkpoint
from .modeling_language import LOSS_CHUNK
from .modeling_omni import OmniForConditionalGeneration
from .packing import LONG_ROW

GIB = 2**30
PARTS = ("vision", "audio", "vision_projector", "audio_projector", "language")
LANGUAGE_KINDS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}  # blocks that `recompute` can name singly
# Memory at the height of a block's backward pass over what its forward pass saves; measured within a quarter of these.
PEAK = {"M": 1.7, "E": 1.7, "*": 1.4, "-": 2.1, "vision": 1.4, "audio": 1.6, "subsampling": 1.2, "projector": 1.6}
SCAN_BUFFERS = 10  # of the largest size that the scan's backward pass holds at a time, whatever the row's length
LOGIT_BYTES = 12.5  # per logit of one chunk of the loss, forward and backward; 12.1 measured
CUDA_AND_NCCL = 2 * GIB  # context, kernels and communication buffers of a GPU; an estimate
ZERO_BUFFERS = 1 * GIB  # reduce and prefetch buckets, a sub-group in float32 (sizes in distributed.py); an estimate
USABLE = 0.95
CLIP_TOKENS = 375  # of a 30 s clip


# ---- counting ----


def stage_config(args) -> tuple[OmniConfig, str]:
    """The sizes of a stage's model and where they come from; those of the released 30B if its model is not here."""
    if args.model_config:
        return OmniConfig(**yaml.safe_load(Path(args.model_config).read_text())), args.model_config
    folder = Path(resolve_checkpoint(args.model))
    if (folder / "config.json").is_file():
        config = OmniConfig.from_pretrained(folder)
        config.llm_config.num_nextn_predict_layers = config.llm_config.num_nextn_predict_layers or args.mtp_layers
        return config, str(args.model)
    return OmniConfig(), f"the released 30B-A3B ({args.model} is not here)"


def count_parameters(config: OmniConfig, train: list[str], lora: dict | None = None) -> dict[str, tuple[int, int]]:
    """Group -> (trained, frozen) parameters. With `lora` (see lora.py) only adapters are trained, not `train`."""
    counts = {}
    for group, size, requires_grad in parameter_sizes(config, lora):
        both = counts.setdefault(group, [0, 0])
        both[0 if (requires_grad if lora is not None else group in train) else 1] += size
    return {group: tuple(both) for group, both in counts.items()}


_SIZES = {}  # building 30B with adapters takes a second, also without memory


def parameter_sizes(config: OmniConfig, lora: dict | None) -> list[tuple[str, int, bool]]:
    """(group, elements, whether it asks for a gradient) of every parameter, from a model on the meta device."""
    from .lora import add_lora, base_name
    from .training import group_of

    key = config.to_json_string(), json.dumps(lora, sort_keys=True)
    if key not in _SIZES:
        with torch.device("meta"):
            model = OmniForConditionalGeneration(config)
            if lora is not None:
                model = add_lora(model, lora)
        named = model.named_parameters()
        _SIZES[key] = [(group_of(base_name(name)), p.numel(), p.requires_grad) for name, p in named]
    return _SIZES[key]


def largest_layer(config: OmniConfig, expert_parallel: int = 1) -> int:
    """Parameters that ZeRO-3 gathers as a whole at most: the experts of one layer (of this rank), or the head."""
    llm = config.llm_config
    width = llm.moe_latent_size or llm.hidden_size
    experts = 2 * llm.n_routed_experts * llm.moe_intermediate_size * width if "E" in llm.hybrid_override_pattern else 0
    return max(experts // expert_parallel, llm.vocab_size * llm.hidden_size)


def block_bytes(config: OmniConfig, kind: str, b: int) -> float:
    """Bytes that autograd saves in one block, per token of it (a patch in the vision tower; audio tokens are 80 ms).

    Args:
        kind: a letter of `hybrid_override_pattern`, "vision", "audio", "subsampling" (8 mel frames per token),
            "vision_projector" or "audio_projector".
        b: bytes of a value in the dtype of weights and residual stream, 2 or 4.
    """
    llm, vision, audio = config.llm_config, config.vision_config, config.sound_config
    D = llm.hidden_size
    norm = 2 * b * D  # input and output
    if kind == "M":
        inner, C, N = llm.mamba_intermediate_size, llm.mamba_conv_size, llm.ssm_state_size
        H, P = llm.mamba_num_heads, llm.mamba_head_dim
        elements = ssd.SCAN_ELEMENTS * ssd.TRAINING_FACTOR
        largest = max(ssd.SCAN_CHUNK**2, P * N)
        run = ssd.SCAN_CHUNK * ssd.chunks_at_once(1, H, largest, elements)  # a state is kept of each
        projected = b * (inner + C + H) + 12 * H  # in_proj's output; dt before and after softplus and clamp, float32
        return norm + projected + b * C + 4 * inner * N / run + 4 * inner + b * inner
    if kind == "E":
        width, K = llm.moe_latent_size or D, llm.num_experts_per_tok
        latent = b * 2 * width if llm.moe_latent_size else 0
        experts = (28 + b) * K + 4
        shared = llm.moe_shared_expert_intermediate_size * llm.n_shared_experts * b
        router = 4 * llm.n_routed_experts + (4 * D if b == 2 else 0)
        return norm + experts + shared + router + latent
    if kind == "*":  # every packed document's output, and all of them together
        heads = 3 * llm.num_attention_heads + 2 * llm.num_key_value_heads
        return norm + heads * llm.head_dim * b + 4 * llm.num_attention_heads
    if kind == "-":
        return norm + llm.intermediate_size * b
    if kind == "vision":
        width = 8 * vision.hidden_size + 2 * vision.intermediate_size
        return b * width + 4 * vision.num_attention_heads + 4 * b
    if kind == "audio":
        width = 19 * audio.hidden_size + 4 * audio.intermediate_size
        return b * (width + 10) + 16 * audio.hidden_size + 4 * audio.num_attention_heads * CLIP_TOKENS
    if kind == "subsampling":
        return b * audio.num_mel_bins * (5.875 * audio.subsampling_conv_channels + 8)
    if kind == "vision_projector":
        width, inner = vision.hidden_size * config.merge_size**2, config.projector_hidden_size
    else:
        width, inner = audio.hidden_size, audio.projection_hidden_size
    return 2 * width * b + inner * b


def sorted_row_bytes(config: OmniConfig, kind: str, b: int) -> float:
    """Bytes per token of a block's backward pass that PEAK does not tell: experts' rows and their gradients, sorted."""
    llm = config.llm_config
    return 2 * llm.num_experts_per_tok * (llm.moe_latent_size or llm.hidden_size) * b if kind == "E" else 0


def activation_phases(
    config: OmniConfig, args, trained: set[str], b: int, rows: int = 1, context_parallel: int = 1
) -> list[tuple[str, float, float]]:
    """(part, bytes kept from the forward pass, bytes more at the height of its backward pass), in order of the forward.

    Args:
        trained: groups with trained parameters; a tower that nothing in or before it trains keeps nothing.
        rows: packed rows of one forward pass on this GPU (with its peers of context parallelism).
    """
    llm, vision, audio = config.llm_config, config.vision_config, config.sound_config
    row_tokens = rows * args.row_tokens
    tokens = row_tokens / context_parallel
    D, pattern = llm.hidden_size, llm.hybrid_override_pattern
    limit = rows * args.media_tokens / context_parallel if args.media_tokens else math.inf
    patches = min(tokens * config.merge_size**2, limit)
    sounds = min(tokens, limit)
    recompute = set(args.recompute)

    def part(name, blocks, inputs, recomputed, at_once=math.inf):
        """blocks: (kind of block, number, tokens of it); inputs: bytes of a block's input, per token."""
        kept = peak = 0.0
        for kind, number, count in blocks:
            saved = block_bytes(config, kind, b)
            factor = PEAK.get(kind, PEAK["projector"])
            again = name in recomputed or LANGUAGE_KINDS.get(kind) in recomputed
            kept += number * count * (inputs if again else saved)
            more = saved * (factor if again else factor - 1) + sorted_row_bytes(config, kind, b)
            fixed = 4 * SCAN_BUFFERS * ssd.SCAN_ELEMENTS * ssd.TRAINING_FACTOR if kind == "M" else 0
            peak = max(peak, min(count, at_once) * more + fixed)
        return name, kept, peak

    towers = []
    for name, blocks, inputs, at_once in (
        ("vision", [("vision", vision.num_hidden_layers, patches)], b * vision.hidden_size, 128 * 1024),
        (
            "audio",
            [("subsampling", 1, sounds), ("audio", audio.num_hidden_layers, sounds)],
            b * audio.hidden_size,
            16 * CLIP_TOKENS,
        ),
    ):
        tower_phases = []
        if name in trained:
            tower_phases.append(part(name, blocks, inputs, recompute, at_once))
        projector = f"{name}_projector"
        if trained & {name, projector}:
            count = patches / config.merge_size**2 if name == "vision" else sounds
            width = vision.hidden_size * config.merge_size**2 if name == "vision" else audio.hidden_size
            own = part(projector, [(projector, 1, count)], b * width, recompute)
            gathered = row_tokens * D * (2 * b + 4) if context_parallel > 1 else 0  # media tokens of all ranks
            tower_phases.append((own[0], own[1], own[2] + gathered))
        towers.append(tower_phases)
    phases = max(towers, key=lambda tower: sum(phase[1] + phase[2] for phase in tower))  # a row is full of one
    if trained - {"head"}:
        blocks = [(kind, pattern.count(kind), tokens) for kind in sorted(set(pattern))]
        name, kept, peak = part("language", blocks, b * D, recompute)
        kept += tokens * 2 * b * D  # input and output of the last norm
        phases.append((name, kept, peak))
    loss = tokens * 3 * b * D + min(tokens, LOSS_CHUNK) * llm.vocab_size * LOGIT_BYTES
    return [*phases, ("loss", 0.0, loss)]


def highest(phases: list[tuple[str, float, float]]) -> tuple[str, float, float, float]:
    """(part, total, kept, peak) at the height of the backward pass: parts are freed from the last to the first."""
    kept, heights = 0.0, []
    for name, own, peak in phases:
        kept += own
        heights.append((name, kept + peak, kept, peak))
    return max(heights, key=lambda height: height[1])


# ---- one case ----


def input_bytes(config: OmniConfig, args, accumulation: int, rows: int = 1, b: int = 4) -> float:
    """Bytes of host memory of the decoded pixels that one process and its loader workers hold at once.

    A worker has its window with the rows that it packs next, and two batches (what DataLoader fetches ahead), in
    float32; the process has its own share of all batches of a step, in the dtype of the weights (`b` bytes), since
    their trained tokens are counted before the first forward pass.
    """
    patches = min(args.row_tokens * config.merge_size**2, args.media_tokens or math.inf)
    window = 4 if args.row_tokens < LONG_ROW else 1  # of PackedRows
    held = max(1, args.workers) * (window + 3 * rows) + accumulation * rows / args.context_parallel * b / 4
    return held * patches * 4 * 3 * config.vision_config.patch_size**2


def stage_memory(
    config: OmniConfig,
    args,
    counts: dict[str, tuple[int, int]],
    gpus: int = 1,
    nodes: int = 1,
    b: int = 2,
    sharded: bool = True,
    offload: bool = False,
    gpu: bool = True,
    rows: int = 1,
) -> dict:
    """Bytes of one case: on each GPU "weights", "gradients", "optimizer", "kept", "peak", "buffers" and their "total";
    "height": the part whose backward pass is the height; "host": on each node, for offload and decoded pixels.

    Args:
        args: `SFTArguments`; those of rows, batches, workers, recomputation and parallelism are read.
        counts: from `count_parameters`.
        gpus: of a node. b: bytes of a weight. sharded: ZeRO-3 (else every GPU holds everything). gpu: whether to count
            what CUDA and NCCL take. rows: packed rows of one forward pass.
    """
    world = gpus * nodes
    trained = sum(pair[0] for pair in counts.values())
    weights = b * (trained + sum(pair[1] for pair in counts.values()))
    share = world if sharded else 1
    masters = (8 if b == 4 else 12) * trained
    phases = activation_phases(
        config, args, {group for group, pair in counts.items() if pair[0]}, b, rows, args.context_parallel
    )
    height, _, kept, peak = highest(phases)
    buffers = CUDA_AND_NCCL if gpu else 0
    if sharded:
        # gathered weights, and before they are cut up the gradients of a whole layer
        gradients = counts.get("language", (0, 0))[0] > counts.get("language", (0, 0))[1]
        buffers += ZERO_BUFFERS + largest_layer(config, args.expert_parallel) * b * (1 + gradients)
    readers = max(1, world // args.context_parallel) * rows
    pixels = gpus * input_bytes(config, args, math.ceil(args.global_batch_size / readers), rows, b)
    row = {
        "weights": weights / share,
        "gradients": 0 if offload else 4 * trained / share,
        "optimizer": 0 if offload else masters / share,
        "kept": kept,
        "peak": peak,
        "buffers": buffers,
    }
    row["total"] = sum(row.values())
    return row | {"height": height, "host": pixels + ((masters + 8 * trained) / nodes if offload else 0)}


# ---- a stage on given machines ----


def plan(args, gpus: int = 8, gpu_gib: float = 80, host_gib: float = 1024) -> dict:
    """Whether a stage fits on one node under ZeRO-3 in bfloat16 (configs/accelerate/zero3*.yaml), and how.

    Tried in this order, until one fits: as configured (degrees of parallelism that divide the GPUs); every part
    recomputed; as configured with the optimizer offloaded; both; more context parallelism. Then, if that offloads, the
    fewest nodes that need no offload; and LoRA with the default presets.

    Returns:
        "rows": what was tried, each a dict of `stage_memory` with "how", "changes" (keys of `args` to change),
        "offload", "lora", "nodes", "data_parallel", "accumulation" (None where the batch does not divide), "fits".
        "best": the row to use: of those on one node that train what is configured, else on more nodes, else LoRA, the
        first that fits; or None. "counts": `count_parameters`. "tokens_per_step", "steps" for `train_tokens` (0 if not
        known). "sizes": where the model's sizes are from.
    """
    config, sizes = stage_config(args)
    counts = count_parameters(config, args.train, args.lora)
    trained = {group for group, pair in counts.items() if pair[0]}
    in_use = trained | {f"{name}_projector" for name in ("vision", "audio") if name in trained} | {"language"}
    recompute = args.recompute + [part for part in PARTS if part in in_use and part not in args.recompute]
    degrees = [degree for degree in range(args.context_parallel + 1, gpus + 1) if gpus % degree == 0]
    tried = []

    def first_fit(ways, counts=counts, lora=False):
        """Adds a row per way (how, nodes, offload, changes) until one fits."""
        for how, nodes, offload, changes in ways:
            changes = {key: value for key, value in changes.items() if value != getattr(args, key)}
            for key, whole in (
                ("context_parallel", gpus * nodes),
                ("expert_parallel", math.gcd(gpus * nodes, config.llm_config.n_routed_experts)),
            ):
                asked = changes.get(key, getattr(args, key))
                degree = max(n for n in range(1, asked + 1) if whole % n == 0)
                if degree != asked:
                    changes[key] = degree
            case = argparse.Namespace(**vars(args) | changes)
            row = stage_memory(config, case, counts, gpus, nodes, offload=offload, rows=args.micro_batch_size)
            data_parallel = gpus * nodes // case.context_parallel
            batch, readers = args.global_batch_size, data_parallel * args.micro_batch_size
            row |= {"how": how, "changes": changes, "offload": offload, "lora": lora, "nodes": nodes}
            row |= {"data_parallel": data_parallel, "context_parallel": case.context_parallel}
            row["accumulation"] = None if batch % readers else batch // readers
            row["fits"] = row["total"] <= USABLE * gpu_gib * GIB and row["host"] <= host_gib * GIB
            tried.append(row)
            if row["fits"]:
                return row
        return None

    all_parts = {"recompute": recompute}
    ways = [("as configured", 1, False, {}), ("all recomputed", 1, False, all_parts)]
    ways += [("offload", 1, True, {}), ("offload, all recomputed", 1, True, all_parts)]
    ways = [way for way in ways if way[3] is not all_parts or recompute != args.recompute]
    ways += [(f"offload, CP {degree}", 1, True, all_parts | {"context_parallel": degree}) for degree in degrees]
    best = first_fit(ways)
    if best is None or best["offload"]:
        ways = [
            (way if degree == args.context_parallel else f"{way}, CP {degree}", nodes, False, changes)
            for nodes in (2, 4, 8, 16, 32)
            for degree in (args.context_parallel, *degrees)
            for way, changes in [(f"{nodes} nodes", all_parts | {"context_parallel": degree})]
        ]
        more = first_fit(ways)
        best = best or more
    if args.lora is None and "language" in trained:
        alone = all_parts | {"expert_parallel": 1}  # see lora.py
        ways = [("LoRA", 1, False, alone)]
        ways += [(f"LoRA, CP {degree}", 1, False, alone | {"context_parallel": degree}) for degree in degrees]
        adapted = first_fit(ways, count_parameters(config, args.train, {}), lora=True)
        best = best or adapted
    rows = [row for row in tried if row["nodes"] == 1 or row["fits"]]
    tokens = args.global_batch_size * args.row_tokens
    steps = math.ceil(args.train_tokens / tokens) if args.train_tokens else 0
    return {"rows": rows, "best": best, "counts": counts, "tokens_per_step": tokens, "steps": steps, "sizes": sizes}


COLUMNS = ("weights", "gradients", "optimizer", "kept", "peak", "buffers", "total")


def memory_estimate(
    args,
    world: int = 1,
    dtype: torch.dtype = torch.float32,
    sharded: bool = False,
    offload: bool = False,
    gpu: bool = False,
    rows: int = 1,
    config: OmniConfig | None = None,
) -> str:
    """The table that training shows before it starts: memory of one process, by part.

    Args:
        world: processes. dtype: of the weights. sharded: ZeRO-3. gpu: whether CUDA takes its share too.
        rows: packed rows of one forward pass.
    """
    config = config or stage_config(args)[0]
    counts = count_parameters(config, args.train, args.lora)
    row = stage_memory(config, args, counts, world, 1, dtype.itemsize, sharded, offload, gpu, rows)
    unit, size = ("GiB", GIB) if row["total"] >= GIB else ("MiB", 2**20)
    line = ", ".join(f"{name} {row[name] / size:.1f}" for name in COLUMNS[:-1])
    host = f"; on the host {row['host'] / size:.1f} {unit}" if row["host"] else ""
    return (
        f"memory of each of {world} process(es), estimated: {row['total'] / size:.1f} {unit} at most ({line}; height: "
        f"backward pass of {row['height']}){host}"
    )


def plan_text(path: str, args, gpus: int, gpu_gib: float, host_gib: float, overrides: str = "") -> str:
    """One stage's `plan` as text; `overrides`: what the command line changed of the file."""
    result = plan(args, gpus, gpu_gib, host_gib)
    rows, best = result["rows"], result["best"]
    trained = sum(pair[0] for pair in result["counts"].values())
    total = trained + sum(pair[1] for pair in result["counts"].values())
    first = rows[0]
    split = (
        f"{first['data_parallel']} (data parallel) x {first['accumulation']} (accumulated) x {args.micro_batch_size}"
        if first["accumulation"]
        else f"not a multiple of {first['data_parallel']} (data parallel): change global_batch_size"
    )
    lines = [
        f"{path}: sizes of {result['sizes']}",
        f"  parameters   {total / 1e9:.3f} B, trained {trained / 1e9:.3f} B ({', '.join(args.train)})",
        f"  step         {args.global_batch_size} rows of "
        f"{args.row_tokens:,} tokens = {result['tokens_per_step'] / 1e6:.2f} M tokens; rows = {split}",
    ]
    if result["steps"]:
        billions = f"{args.train_tokens / 1e9:.1f} B tokens"
        lines.append(f"  steps        {result['steps']:,} for {billions}; configured {args.steps:,}")
    head = "  GiB per GPU".ljust(26) + "".join(f"{name:>11}" for name in COLUMNS) + f"{'host/node':>11}"
    lines.append(head)
    for row in rows:
        numbers = "".join(f"{row[name] / GIB:11.1f}" for name in COLUMNS) + f"{row['host'] / GIB:11.0f}"
        lines.append(f"  {row['how']:24}{numbers}  {'fits' if row['fits'] else 'no'}")
    lines.append(
        f"  -> {best['how']}: {launch_line(path + overrides, args, best, gpus)}" if best else "  -> does not fit"
    )
    return "\n".join(lines)


def launch_line(path: str, args, row: dict, gpus: int) -> str:
    """The command that starts a stage in the way of a row of `plan`."""
    experts = row["changes"].get("expert_parallel", args.expert_parallel) > 1
    name = "nodes" if row["nodes"] > 1 else "zero3_experts" if experts else "zero3"
    line = f"accelerate launch --config_file configs/accelerate/{name}.yaml"
    if row["nodes"] > 1:
        line += f" --num_machines {row['nodes']}"
    if (row["nodes"], gpus) != (1, 8):
        line += f" --num_processes {gpus * row['nodes']}"
    if row["offload"] != (name == "zero3_experts"):
        line += f" --offload_optimizer_device {'cpu' if row['offload'] else 'none'}"
    line += f" train.py sft --config {path}"
    for key, value in row["changes"].items():
        line += f" --{key} {' '.join(value) if isinstance(value, list) else value}"
    return line + (" (with `lora: {}` in the file)" if row["lora"] else "")


def fits_table(stages: list[tuple[str, object]], gpus: int = 8, gpu_gib: float = 80, host_gib: float = 1024) -> str:
    """Markdown: which stage runs on one node, which needs offload, LoRA or more nodes.

    Args:
        stages: (name, `SFTArguments`) of each.
    """
    lines = [
        f"| stage | tokens per row | trained | on {gpus} x {gpu_gib:g} GB | per GPU (host) | without offload | LoRA |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, args in stages:
        result = plan(args, gpus, gpu_gib, host_gib)
        rows, best = result["rows"], result["best"]
        plain = next((row for row in rows if row["fits"] and not row["offload"] and not row["lora"]), None)
        lora = next((row for row in rows if row["fits"] and row["lora"]), None)
        trained = sum(pair[0] for pair in result["counts"].values())
        cells = [
            name,
            f"{args.row_tokens:,}",
            f"{trained / 1e9:.2f} B",
            way_cell(best) if best else "no",
            size_cell(best) if best else "",
            "fits" if plain and plain is best else f"{way_cell(plain)}: {size_cell(plain)}" if plain else "no",
            f"{way_cell(lora)}: {size_cell(lora)}" if lora else "no" if any(row["lora"] for row in rows) else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def way_cell(row: dict) -> str:
    degree = row["context_parallel"]
    return row["how"] + (f", CP {degree}" if degree > 1 and "CP" not in row["how"] else "")


def size_cell(row: dict) -> str:
    host = f" ({row['host'] / GIB:.0f})" if row["host"] else ""
    return f"{row['total'] / GIB:.0f} GiB{host}"


def plan_command(argv: list[str]) -> None:
    """`train.py plan --config FILE... [--gpus 8] [--gpu_memory 80] [--host_memory 1024] [--markdown] [--key value]`."""
    from .training import SFTArguments, load_arguments

    parser = argparse.ArgumentParser(prog="train.py plan", description=plan.__doc__.splitlines()[0])
    parser.add_argument("--config", nargs="+", required=True, help="stages, e.g. configs/30b/stage*.yaml")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--gpu_memory", type=float, default=80, help="GiB of a GPU")
    parser.add_argument("--host_memory", type=float, default=1024, help="GiB of a node")
    parser.add_argument("--markdown", action="store_true", help="one table of all stages, as in the README")
    options, rest = parser.parse_known_args(argv)
    machine = (options.gpus, options.gpu_memory, options.host_memory)
    stages = [(path, load_arguments(SFTArguments, ["--config", path, *rest])) for path in options.config]
    if options.markdown:
        print(fits_table([(Path(path).stem, args) for path, args in stages], *machine))
    else:
        print(
            "\n\n".join(plan_text(path, args, *machine, "".join(f" {word}" for word in rest)) for path, args in stages)
        )


__all__ = ["count_parameters", "fits_table", "memory_estimate", "plan", "plan_command"]
