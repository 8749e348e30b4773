"""Operations, cache bytes and prompt tokens by arithmetic: what a model costs before it runs (paper 4.6 and Table 12).

Floating-point operations count a multiply-add as two. Counted are the products with weights, the scores and sums of
attention (causal: half of the square), and Mamba-2's recurrence and convolution; norms, activations and the router's
choice are left out (well under one percent). The chunked scan, which trades operations for matrix products, spends more
than the recurrence counted here.

    python -m modeling_omni.flops

prints the tables for the released 30B-A3B: the 512-frame video of the paper without and with tubelets and EVS, its
prefill, what query-conditioned token reduction (token_reduction.py) would save, and cache bytes.

Shape legend: S prompt tokens, L tokens that reach a layer, D width, H Mamba heads, P head size, N state size.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from .configuration_omni import OmniConfig, OmniTextConfig, resolve_checkpoint
from .media import VideoClip
from .token_reduction import keep_schedule
from .video_processing_omni import OmniVideoProcessor

# A token per word with the blank before it, per digit, per run of other signs, per run of blanks left over.
LABEL_RULE = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


# ---- operations ----


def layer_flops(config: OmniTextConfig) -> dict[str, float]:
    """Operations per token of one layer of each kind ("M", "E", "*", "-") and of the "head"; no attention scores."""
    D = config.hidden_size
    inner, conv = config.mamba_intermediate_size, config.mamba_conv_size
    mamba = 2 * D * (inner + conv + config.mamba_num_heads) + 2 * inner * D  # projections in and out
    mamba += 4 * inner * config.ssm_state_size + 2 * config.conv_kernel * conv  # state update and read, convolution
    width = config.moe_latent_size or D
    experts = config.num_experts_per_tok * 4 * width * config.moe_intermediate_size
    experts += 4 * D * config.moe_shared_expert_intermediate_size * config.n_shared_experts
    experts += 2 * D * config.n_routed_experts + (4 * D * width if config.moe_latent_size else 0)
    heads = config.num_attention_heads + config.num_key_value_heads
    return {
        "M": mamba,
        "E": experts,
        "*": 4 * D * heads * config.head_dim,
        "-": 4 * D * config.intermediate_size,
        "head": 2 * D * config.vocab_size,
    }


def score_flops(config: OmniTextConfig, tokens: float) -> float:
    """Scores and weighted sums of one attention layer over `tokens`, causal."""
    return 4 * config.num_attention_heads * config.head_dim * tokens * tokens / 2


def prefill_flops(
    config: OmniTextConfig, tokens: float, visual: float = 0, shares: Sequence[float] | None = None
) -> dict[str, float]:
    """Operations of a prefill: {"M", "E", "*", "-", "scores", "head", "total"}; the head runs for one token.

    Args:
        tokens: of the prompt, visual ones included. visual: how many are visual.
        shares: of the visual tokens that enter each layer (`keep_schedule`), all if None. Scoring is not counted.
    """
    pattern, per_token = config.hybrid_override_pattern, layer_flops(config)
    counts = dict.fromkeys("ME*-", 0.0) | {"scores": 0.0, "head": per_token["head"]}
    for kind, share in zip(pattern, shares or [1.0] * len(pattern), strict=True):
        here = tokens - visual + share * visual
        counts[kind] += here * per_token[kind]
        if kind == "*":
            counts["scores"] += score_flops(config, here)
    return counts | {"total": sum(counts.values())}


def train_flops(config: OmniTextConfig, tokens: float, document: float) -> float:
    """Forward and backward pass over packed documents of `document` tokens, the head on every token included."""
    forward = prefill_flops(config, tokens)
    forward["scores"] = prefill_flops(config, document)["scores"] * tokens / document
    return 3 * (sum(forward[kind] for kind in ("M", "E", "*", "-", "scores")) + tokens * forward["head"])


def decode_bytes(config: OmniTextConfig, batch: int, context: float, itemsize: int = 2) -> float:
    """Bytes that one decoding step must read: the weights it uses, keys and values, Mamba's states (read and written).

    Experts count as often as different ones are expected of an even router.
    """
    D, inner = config.hidden_size, config.mamba_intermediate_size
    width = config.moe_latent_size or D
    used = config.n_routed_experts * (1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch)
    shared = config.moe_shared_expert_intermediate_size * config.n_shared_experts
    weights = {
        "M": D * (inner + config.mamba_conv_size + config.mamba_num_heads) + inner * D,
        "E": 2 * used * width * config.moe_intermediate_size + 2 * D * shared + D * config.n_routed_experts,
        "*": 2 * D * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim,
        "-": 2 * D * config.intermediate_size,
    }
    total = sum(weights[kind] for kind in config.hybrid_override_pattern) + D * config.vocab_size
    per_token, fixed = cache_bytes(config, itemsize=itemsize)
    return total * itemsize + batch * (per_token * context + 2 * fixed)


def vision_flops(config: OmniConfig, patches: Sequence[int], frames: int = 1, projector: bool = True) -> float:
    """Vision tower and projector on items of so many patches each; `frames` of a tubelet (1 for pictures)."""
    vision, merge = config.vision_config, config.merge_size**2
    D, inner = vision.hidden_size, vision.intermediate_size
    total = 0.0
    for count in patches:
        rows = count + vision.num_prefix_tokens
        total += vision.num_hidden_layers * rows * (8 * D * D + 4 * D * inner + 4 * D * rows)
        total += 2 * count * vision.patch_dim * frames * D
        if projector:
            total += 2 * count / merge * config.projector_hidden_size * (D * merge + config.llm_config.hidden_size)
    return total


def cache_bytes(config: OmniTextConfig, packed: bool = False, itemsize: int = 2) -> tuple[int, int]:
    """(bytes per token of all attention layers, bytes of all Mamba layers at any length) of one sequence's cache.

    Args:
        packed: keys and values are in FP8.
        itemsize: bytes of a value in keys, values and convolution inputs; the recurrent state is in
            `mamba_ssm_cache_dtype`.
    """
    pattern = config.hybrid_override_pattern
    per_token = pattern.count("*") * 2 * config.num_key_value_heads * config.head_dim * (1 if packed else itemsize)
    state = config.mamba_intermediate_size * config.ssm_state_size * (4 if "32" in config.mamba_ssm_cache_dtype else 2)
    return per_token, pattern.count("M") * (state + config.mamba_conv_size * config.conv_kernel * itemsize)


# ---- prompt tokens ----


def counting_tokenizer():
    """A tokenizer for counting alone: this package's special tokens, and LABEL_RULE for text.

    The released vocabulary is not part of this package. Its pre-tokenizer cuts text as LABEL_RULE says (digits one by
    one), and its 131,072 entries are taken to hold every word of the frame labels as one token, so that labels and
    question count as many tokens as they have pieces. With the released folder at hand give its processor to
    `video_tokens` instead.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    added = AutoTokenizer.from_pretrained(resolve_checkpoint("nano")).added_tokens_decoder
    vocab = {str(token): number for number, token in sorted(added.items())}
    backend = Tokenizer(models.WordLevel(vocab | {"piece": len(vocab)}, unk_token="piece"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(LABEL_RULE), "isolated")
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in vocab])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>", pad_token="<unk>"
    )


def video_tokens(
    tubelets: bool = True,
    pruning_rate: float = 0.0,
    frames: int = 512,
    side: int = 512,
    fps: float = 30.0,
    question: str = "",
    processor=None,
) -> dict[str, int]:
    """Prompt tokens {"text", "video", "total", ...} of a square video (as in Table 12), by the real prompt builder.

    Args:
        tubelets: two frames in one tubelet, else one (every frame then has its own label).
        pruning_rate: of EVS.
        processor: `OmniProcessor` with the tokenizer that counts; the released sizes with `counting_tokenizer` if None.
    """
    from .processing_omni import OmniProcessor

    tokenizer = counting_tokenizer() if processor is None else processor.tokenizer
    video_processor = OmniVideoProcessor() if processor is None else processor.video_processor
    sizes = video_processor.to_dict() | {"video_temporal_patch_size": 2 if tubelets else 1}
    counter = OmniProcessor(video_processor=OmniVideoProcessor(**sizes), tokenizer=tokenizer)
    pixels = np.broadcast_to(np.zeros(1, np.uint8), (frames, side, side, 3))  # takes no memory
    clip = VideoClip(pixels, list(range(frames)), fps, frames / fps)
    content = [{"type": "video", "video": clip}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return counter.count_tokens(messages, add_generation_prompt=True, video_pruning_rate=pruning_rate)


PAPER_CASES = {  # name -> (tubelets, EVS rate, tokens that the paper gives)
    "frames one by one": (False, 0.0, 141_000),
    "tubelets": (True, 0.0, 75_000),
    "tubelets, EVS 0.5": (True, 0.5, 42_000),
}


def main() -> None:
    argparse.ArgumentParser(prog="python -m modeling_omni.flops", description=__doc__).parse_args()
    config = OmniConfig()
    llm = config.llm_config
    per_token, fixed = cache_bytes(llm)
    kinds = layer_flops(llm)
    active = {kind: llm.hybrid_override_pattern.count(kind) * kinds[kind] / 1e9 for kind in "ME*"}
    print(
        f"30B-A3B: {sum(active.values()):.2f} GFLOP per token (Mamba-2 {active['M']:.2f}, experts {active['E']:.2f}, "
        f"attention {active['*']:.2f}) and scores; head {kinds['head'] / 1e9:.2f}.\n"
        f"Cache: {per_token:,} bytes per token and {fixed / 1e6:.1f} MB per sequence in bfloat16.\n"
    )
    print("| 512 frames of 512 x 512 | tokens | paper | visual | LM prefill, TFLOP | vision, TFLOP |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, (tubelets, rate, paper) in PAPER_CASES.items():
        count, size = video_tokens(tubelets, rate), 2 if tubelets else 1
        vision = vision_flops(config, [1024] * (512 // size), size) / 1e12
        total = prefill_flops(llm, count["total"])["total"] / 1e12
        print(f"| {name} | {count['total']:,} | {paper:,} | {count['video']:,} | {total:.0f} | {vision:.0f} |")
    count = video_tokens()
    full = prefill_flops(llm, count["total"])["total"]
    vision = vision_flops(config, [1024] * 256, 2)
    print("\n| visual_keep (tubelets) | LM prefill, TFLOP | LM alone | LM and vision |\n|--:|--:|--:|--:|")
    for keep in (0.5, 0.25):
        shares = keep_schedule(llm.hybrid_override_pattern, keep)
        total = prefill_flops(llm, count["total"], count["video"], shares)["total"]
        print(f"| {keep} | {total / 1e12:.0f} | {full / total:.1f}x | {(full + vision) / (total + vision):.1f}x |")


if __name__ == "__main__":
    main()
