"""The cases of every phase that benchmark.py measures: what is called, on which inputs, against whom.

Each phase is a generator: a case's models and inputs are made when its turn comes.
"""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from . import benchmark_peers as peers
from .flops import decode_bytes, prefill_flops, train_flops, vision_flops
from .inference import encode, open_media, user_message
from .modeling_language import ssd_scan
from .modeling_omni import OmniForConditionalGeneration

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
QUICK_TOKENS, LONG_CONTEXT = 64, 32768


@dataclass
class Case:
    """One row: calls to compare. A call may return its own seconds; else it is timed from outside."""

    size: str
    dtype: str
    calls: dict[str, Callable]  # "ours" first
    flops: float = 0.0  # of one call
    moved: float = 0.0  # bytes of weights and caches that one call (decoding: one step) must read
    missing: dict[str, str] = field(default_factory=dict)  # peer -> why it is not there
    memory: bool = False  # also measured in processes of its own
    alone: bool = False  # also run on one thread; such cases come first in their phase
    grad: bool = False


@dataclass
class Options:
    device: str
    dtypes: list[str]
    quick: bool
    seconds: float  # of repetitions, for each call of a case


def scratch(name: str, write: Callable[[Path], None]) -> Path:
    """A file that later runs find again (a GGUF model, a video): whole, or not at all."""
    path = Path(tempfile.gettempdir()) / "modeling-omni-benchmark" / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_name(f"{os.getpid()}-{name}")
        write(unfinished)
        unfinished.replace(path)
    return path


# ---- language model ----


@cache
def models(size: str, dtype: str, device: str):
    return peers.language_pair(size, DTYPES[dtype], device)


def add_llama(case: Case, options: Options, native, context: int, call: Callable) -> None:
    """Adds llama.cpp as a peer (`call(server)`), or the reason why it is missing; mid on a CPU only."""
    if not case.size.startswith("mid") or options.device != "cpu":
        return
    try:
        import gguf  # noqa: F401
        import xllamacpp  # noqa: F401
    except ImportError as error:
        case.missing["llama.cpp"] = f"{error.name} is not installed"
        return
    millions = native.num_parameters() // 10**6  # files of other versions stay apart
    path = scratch(f"mid-{millions}m-{case.dtype}.gguf", partial(peers.write_gguf, native))
    servers = {}

    def run():  # the server starts at its first turn, with the threads of that moment
        threads = torch.get_num_threads()
        if threads not in servers:
            servers.clear()
            servers[threads] = peers.llama_server(path, threads, context)
        return call(servers[threads])

    case.calls["llama.cpp"] = run


def random_ids(model, batch: int, length: int) -> torch.Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(32, vocabulary, (batch, length), device=model.device)


def prefill(options: Options) -> Iterator[Case]:
    plan = [("mid", dtype, tokens) for dtype in ("bf16", "fp32") for tokens in (1024, 4096)]
    plan += [("mid", "bf16", 16384)] + [("nano", "fp32", tokens) for tokens in (1024, 4096, 16384)]
    for size, dtype, tokens in [("nano", "fp32", QUICK_TOKENS)] if options.quick else plan:
        if dtype not in options.dtypes:
            continue
        ours, native = models(size, dtype, options.device)
        ids = random_ids(ours, 1, tokens)
        inputs = {"input_ids": ids, "use_cache": True, "logits_to_keep": 1}
        calls = {"ours": partial(ours, **inputs), "native": partial(native, **inputs)}
        case = Case(f"{size}, {tokens:,} tokens", dtype, calls)
        case.flops = prefill_flops(ours.config.llm_config, tokens)["total"]
        case.memory = (size, dtype, tokens) == ("mid", "bf16", 4096)
        case.alone = (size, dtype, tokens) == ("mid", options.dtypes[0], 1024)
        if tokens <= 1024:
            numbers = ids[0].tolist()
            add_llama(
                case, options, native, tokens + 64, lambda server, ids=numbers: peers.llama_seconds(server, ids)[0]
            )
        yield case


def reduction(options: Options) -> Iterator[Case]:
    """Prefill of a long video (random embeddings) and a question: all tokens in all layers, or a share of them
    in the mean over the layers. Compared with itself."""
    visual = QUICK_TOKENS if options.quick else 8192
    size, dtype = ("nano", "fp32") if options.quick else ("mid", "bf16")
    if dtype not in options.dtypes:
        return
    model = models(size, dtype, options.device)[0]
    types = torch.tensor([0] * 8 + [2] * visual + [0] * 32, device=options.device)[None]
    width = model.config.llm_config.hidden_size
    embeds = torch.randn(1, types.shape[1], width, device=options.device, dtype=DTYPES[dtype])
    given = {"inputs_embeds": embeds, "mm_token_type_ids": types, "max_new_tokens": 1, "do_sample": False}
    run = partial(model.generate, pad_token_id=0, **given)
    calls = {"ours": run, "ours, visual_keep 0.5": partial(run, visual_keep=0.5)}
    calls["ours, visual_keep 0.25"] = partial(run, visual_keep=0.25)
    yield Case(f"{size}, {visual:,} tokens of video", dtype, calls)


def continued(model, text, held: dict, batch: int, context: int, new: int, compiled: bool = False) -> float:
    """Decoding behind a long random cache, which is made at the first call and grows by a few tokens with each."""
    if not held:
        held["cache"] = peers.filled_cache(model, text, batch, context, compiled)
    ids = random_ids(model, batch, int(held["cache"].get_seq_length()) + 1)
    more = {"compile_config": peers.native_compiled_options()["compile_config"]} if compiled else {}
    return peers.seconds_per_token(model, ids, new, past_key_values=held["cache"], **more)


def decode(options: Options) -> Iterator[Case]:
    """Inside `generate`. The long cache has the 30B's 32 query heads on 2 KV heads, on which its cost depends."""
    plan = [("mid", dtype, batch, 256) for dtype in ("bf16", "fp32") for batch in (1, 8)]
    plan += [("mid32", dtype, 1, LONG_CONTEXT) for dtype in ("bf16", "fp32")]
    plan += [("nano", "fp32", batch, 256) for batch in (1, 8)]
    for size, dtype, batch, context in [("nano", "fp32", 1, 16), ("nano", "fp32", 1, 300)] if options.quick else plan:
        if dtype not in options.dtypes:
            continue
        ours, native = models(size, dtype, options.device)
        long, text = context > 256, ours.config.llm_config
        new = 3 if options.quick else 8 if long else 24
        case = Case(f"{size}, batch {batch}, {context:,} in the cache", dtype, {})
        case.moved = decode_bytes(text, batch, context, DTYPES[dtype].itemsize)
        if long:
            runs = {
                "ours": partial(continued, ours, text, {}, batch, context, new),
                "native": partial(continued, native, native.config, {}, batch, context, new),
                "ours, compiled": partial(continued, ours, text, {}, batch, context, new, True),
            }
        else:
            ids = random_ids(ours, batch, context)
            static = peers.native_compiled_options()
            runs = {
                "ours": partial(peers.seconds_per_token, ours, ids, new),
                "native": partial(peers.seconds_per_token, native, ids, new),
                "ours, compiled": partial(peers.seconds_per_token, ours, ids, new, **static),
                "native, compiled": partial(peers.seconds_per_token, native, ids, new, "batched_mm", **static),
            }
            if batch > 1:
                del runs["native, compiled"]
        # compiling takes a while for each shape, dtype and number of threads
        compiled = size != "nano" and (dtype == "bf16" or batch == 1)
        if compiled:
            torch.compiler.reset()  # else what differs from case to case is compiled as something that varies
        case.calls = {name: run for name, run in runs.items() if compiled or "compiled" not in name}
        if size == "mid" and batch == 1 and not long:
            case.alone = dtype == options.dtypes[0]
            numbers = ids[0].tolist()
            call = lambda server, ids=numbers, new=new: peers.llama_seconds(server, ids, new)[1]  # noqa: E731
            add_llama(case, options, native, context + new + 64, call)
        yield case


def train_step(model, ids: torch.Tensor, **more) -> None:
    model.train()
    model(input_ids=ids, labels=ids, use_cache=False, **more).loss.backward()
    model.zero_grad(set_to_none=True)
    model.eval()


def train(options: Options) -> Iterator[Case]:
    """Forward and backward pass over 2,048 tokens: ours four packed documents, native one (it cannot pack here)."""
    tokens = QUICK_TOKENS if options.quick else 2048
    for size, dtype in [("nano", "fp32")] if options.quick else [("mid", "bf16"), ("nano", "fp32")]:
        if dtype not in options.dtypes:
            continue
        ours, native = models(size, dtype, options.device)
        ids = random_ids(ours, 1, tokens)
        documents = torch.arange(tokens, device=options.device)[None] // (tokens // 4)
        packed = partial(train_step, ours, ids, seq_idx=documents, skip_logits=True)
        calls = {"ours": packed, "native": partial(train_step, native, ids)}
        flops = train_flops(ours.config.llm_config, tokens, tokens / 4)
        yield Case(f"{size}, {tokens:,} tokens", dtype, calls, flops, memory=size == "mid" or options.quick, grad=True)


def scan(options: Options) -> Iterator[Case]:
    """The Mamba-2 scan alone, at the sizes of a layer of mid."""
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

    text = peers.omni_config("mid").llm_config
    heads, size, groups, state = text.mamba_num_heads, text.mamba_head_dim, text.n_groups, text.ssm_state_size
    for tokens, dtype in itertools.product((QUICK_TOKENS,) if options.quick else (4096, 16384), options.dtypes):
        kind = {"device": options.device, "dtype": DTYPES[dtype]}
        x, B, C = (torch.randn(1, tokens, *s, **kind) for s in ((heads, size), (groups, state), (groups, state)))
        dt = torch.rand(1, tokens, heads, device=options.device) * 0.1
        A = -torch.arange(1, heads + 1, device=options.device).float()
        native = partial(mamba2_chunk_scan, x, dt, A, B, C, text.chunk_size, return_final_states=True)
        calls = {"ours": partial(ssd_scan, x, dt, A, B, C), "native": native}
        flops = 4.0 * tokens * heads * size * state  # of the recurrence; both spend more on chunks
        case = Case(f"{heads} heads, {tokens:,} tokens", dtype, calls, flops, alone=tokens <= 4096)
        case.memory = dtype == options.dtypes[0] and tokens != 4096
        yield case


# ---- towers ----


@cache
def towers(size: str, dtype: str, device: str):
    return peers.tower_pair(size, DTYPES[dtype], device)


def vision(options: Options) -> Iterator[Case]:
    for size, dtype in [("nano", "fp32")] if options.quick else [("mid", "bf16"), ("nano", "fp32")]:
        if dtype not in options.dtypes:
            continue
        ours, native = towers(size, dtype, options.device)
        config, kind = ours.config, {"device": options.device, "dtype": DTYPES[dtype]}
        step, count = (2, 2) if options.quick else (4 if size == "nano" else 8, 16)
        sides = [(h, w) for h in (2, 3, 4, 5) for w in (2, 3, 4, 6)][:count]  # all grids differ
        grid = torch.tensor([[1, h * step, w * step] for h, w in sides])
        pixels = torch.randn(int(grid.prod(-1).sum()), config.vision_config.patch_dim, **kind)
        calls = {
            "ours": partial(ours.get_image_features, pixels, grid),
            "native": partial(native.get_image_features, pixels, grid[:, 1:]),
        }
        flops = vision_flops(config, grid.prod(-1).tolist())
        yield Case(f"{size}, {count} images of different sizes", dtype, calls, flops)
        tubelets, h, w = (2, 4, 4) if options.quick else (32, 3 * step, 3 * step)
        frames = torch.randn(tubelets, 6, 16 * h, 16 * w, **kind)
        patches = frames.view(tubelets, 6, h, 16, w, 16).permute(0, 2, 4, 1, 3, 5).reshape(tubelets * h * w, -1)
        calls = {  # the native class's own video path raises: its tower alone, and ours alone
            "ours": partial(ours.model.vision_tower, patches, torch.tensor([[tubelets, h, w]]), is_video=True),
            "native": partial(native.vision_model, frames),
        }
        flops = vision_flops(config, [h * w] * tubelets, 2, projector=False)
        yield Case(f"{size}, {2 * tubelets} frames of {16 * w} x {16 * h}", dtype, calls, flops)


def audio(options: Options) -> Iterator[Case]:
    """Sound of 30 s, of 20 min (40 clips; native is given the same clips), and clips of mixed lengths."""
    plan = [("mid", "bf16", [30], "30 s"), ("mid", "bf16", [30, 5, 5, 5, 8, 3, 5, 4], "8 clips of 3 to 30 s")]
    plan += [("nano", "fp32", [30], "30 s"), ("nano", "fp32", [30] * 40, "20 min")]
    for size, dtype, seconds, name in [("nano", "fp32", [2, 1], "2 clips")] if options.quick else plan:
        if dtype not in options.dtypes:
            continue
        ours, native = towers(size, dtype, options.device)
        mels, longest = ours.config.sound_config.num_mel_bins, 100 * max(seconds)
        frames = 100 * torch.tensor(seconds, device=options.device)
        mask = torch.arange(longest, device=options.device) < frames[:, None]
        features = torch.randn(len(seconds), longest, mels, device=options.device).to(DTYPES[dtype])
        calls = {
            "ours": partial(ours.get_audio_features, features, mask),
            "native": partial(native.get_audio_features, features, mask),
        }
        yield Case(f"{size}, {name}", dtype, calls, memory=len(seconds) == 40)


# ---- from files and arrays ----


def preprocess(options: Options) -> Iterator[Case]:
    """Pictures, frames and sound to model inputs, released settings, on the CPU."""
    from transformers import ParakeetFeatureExtractor
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    from transformers.models.nemotron_h_omni import image_processing_nemotron_h_omni, video_processing_nemotron_h_omni

    from .feature_extraction_omni import OmniFeatureExtractor
    from .image_processing_omni import OmniImageProcessor
    from .video_processing_omni import OmniVideoProcessor

    random = np.random.default_rng(0)
    sizes = [(64, 96)] if options.quick else [(720, 1280), (1080, 1920), (512, 512), (900, 600)]
    pictures = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    norm = {"norm_mean": OPENAI_CLIP_MEAN, "norm_std": OPENAI_CLIP_STD}
    native = image_processing_nemotron_h_omni.NemotronH_Omni_Reasoning_V3ImageProcessor(**norm)
    more = {"return_tensors": "pt"}
    calls = {"ours": partial(OmniImageProcessor(), pictures, **more), "native": partial(native, pictures, **more)}
    yield Case(f"{len(pictures)} pictures", "fp32", calls)
    frames = random.integers(0, 256, (2, 64, 96, 3) if options.quick else (32, 720, 1280, 3), dtype=np.uint8)
    native = video_processing_nemotron_h_omni.NemotronH_Omni_Reasoning_V3VideoProcessor(**norm)
    channels_first = torch.from_numpy(frames).permute(0, 3, 1, 2)
    calls = {
        "ours": partial(OmniVideoProcessor(), [frames]),
        "native": partial(native, [channels_first], do_sample_frames=False, **more),
    }
    yield Case(f"{len(frames)} frames of {frames.shape[2]} x {frames.shape[1]}", "fp32", calls)
    seconds = 1 if options.quick else 300
    wave = random.uniform(-0.5, 0.5, seconds * 16000).astype(np.float32)
    calls = {
        "ours": partial(OmniFeatureExtractor(), [wave], sampling_rate=16000),
        "native": partial(ParakeetFeatureExtractor(feature_size=128), [wave], sampling_rate=16000, **more),
    }
    yield Case(f"{seconds} s of sound", "fp32", calls)


def write_video(path: Path, frames: int, side: int) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        ramp = np.linspace(0, 255, side, dtype=np.uint8)
        picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], ramp[::-1, None]), -1)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(picture, 3 * number, 1)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def first_token(model, processor, path: Path, frames: int, rate: float = 0.0, **more) -> None:
    part = open_media("video", str(path), frames=frames, audio_from_video="off")
    inputs = encode(model, processor, [user_message("What moves where?", [part])], False, video_pruning_rate=rate)
    model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0, **more)


def ttft(options: Options) -> Iterator[Case]:
    """From a video file to the first token at nano's sizes: decoding, processor, tower, prefill. Compared with itself.

    Without tubelets the tower takes frames one by one; weights are random, of that shape.
    """
    from .processing_omni import OmniProcessor
    from .video_processing_omni import OmniVideoProcessor

    frames, side = (8, 64) if options.quick else (512, 512)
    path = scratch(f"{frames}-{side}.mp4", partial(write_video, frames=frames, side=side))
    processor = OmniProcessor.from_pretrained(peers.resolve_checkpoint("nano"))
    sizes = processor.video_processor.to_dict() | {"video_temporal_patch_size": 1}
    parts = processor.image_processor, OmniVideoProcessor(**sizes), processor.feature_extractor, processor.tokenizer
    runs = []
    for number, own in ((1, OmniProcessor(*parts)), (2, processor)):
        config = peers.omni_config("nano")
        config.video_temporal_patch_size = config.vision_config.video_temporal_patch_size = number
        model = OmniForConditionalGeneration._from_config(config, dtype=torch.float32).to(options.device).eval()
        runs.append(partial(first_token, model, own, path, frames))
    calls = {
        "ours": runs[1],
        "ours, frames one by one": runs[0],
        "ours, tubelets and EVS 0.5": partial(runs[1], 0.5),
        "ours, tubelets and visual_keep 0.25": partial(runs[1], visual_keep=0.25),
    }
    yield Case(f"nano, {frames} frames of {side} x {side}, tubelets", "fp32", calls)


def load(options: Options) -> Iterator[Case]:
    """A checkpoint in shards, from the page cache: mid (nano with --quick) with its towers."""
    from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3

    config = peers.omni_config("nano" if options.quick else "mid")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = OmniForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder, max_shard_size="5MB" if options.quick else "200MB")
        shards = len(list(Path(folder).glob("*.safetensors")))
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        del model
        more = {"dtype": torch.bfloat16, "device_map": options.device}
        native = partial(NemotronH_Omni_Reasoning_V3.from_pretrained, config=peers.native_omni_config(config))
        ours = partial(OmniForConditionalGeneration.from_pretrained, folder, **more)
        yield Case(
            f"{size / 1e6:.0f} MB in {shards} shards", "bf16", {"ours": ours, "native": partial(native, folder, **more)}
        )


PHASES = {
    "prefill": prefill,
    "reduction": reduction,
    "train": train,
    "scan": scan,
    "vision": vision,
    "audio": audio,
    "preprocess": preprocess,
    "ttft": ttft,
    "load": load,
    "decode": decode,  # last, since compiling takes longest
}
