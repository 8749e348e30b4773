"""How time and memory of a prefill grow with the length of the prompt.

    python -m modeling_omni.benchmark_length [--tokens 4096,16384,65536] [--chunk 2048] [--model nano]

A prompt of random tokens runs in chunks behind a preallocated cache, each length in a process of its own. Attention is
quadratic by nature; its layers are timed apart, so that the rest can be seen to be linear. Memory is the height of the
call beyond weights and caches. `--tokens 262144` takes a quarter of an hour on two cores, nearly all of it attention.
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from transformers import StaticCache

from .benchmark import peak_memory, synchronize
from .inference import load
from .modeling_language import OmniAttention


@torch.no_grad()
def measure(model, tokens: int, chunk: int) -> dict[str, float]:
    """Seconds in all and in the attention layers, bytes of the caches, and peak bytes beyond them and the weights."""
    text, device = model.config.llm_config, str(model.device)
    ids = torch.randint(32, text.vocab_size, (1, tokens), device=model.device)
    spent, started = [0.0], [0.0]

    def before(*_):
        synchronize(device)
        started[0] = time.perf_counter()

    def after(*_):
        synchronize(device)
        spent[0] += time.perf_counter() - started[0]

    options = {"use_cache": True, "logits_to_keep": 1, "prefill_chunk_size": chunk}
    model(input_ids=ids[:, : 2 * chunk], **options)  # warms up
    for module in model.modules():
        if isinstance(module, OmniAttention):
            module.register_forward_pre_hook(before), module.register_forward_hook(after)
    cache = StaticCache(config=text, max_cache_len=tokens)
    start = time.perf_counter()
    peak = peak_memory(lambda: model(input_ids=ids, past_key_values=cache, **options), device)
    seconds = time.perf_counter() - start
    held = sum(t.nbytes for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor))
    return {"tokens": tokens, "seconds": seconds, "attention": spent[0], "cache": held, "peak": peak - held}


def markdown(rows: list[dict]) -> str:
    """A line per length; growth: time outside attention per token, relative to the first line's."""
    lines = ["| tokens | seconds | of these attention | rest, µs per token | growth | caches | peak beyond |"]
    lines.append("|--:|--:|--:|--:|--:|--:|--:|")
    rest = [(row["seconds"] - row["attention"]) / row["tokens"] for row in rows]
    for row, own in zip(rows, rest):
        share = row["attention"] / row["seconds"]
        lines.append(
            f"| {row['tokens']:,} | {row['seconds']:.2f} | {share:.0%} | {own * 1e6:.0f} | {own / rest[0]:.2f} "
            f"| {row['cache'] / 2**20:.0f} MB | {row['peak'] / 2**20:.0f} MB |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_omni.benchmark_length", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--tokens", default="4096,16384,65536", help="comma-separated lengths")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens run at a time")
    parser.add_argument("--model", default="nano", help="nano (the default) or a checkpoint folder")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    lengths = [int(number) for number in given.tokens.split(",")]
    if given.one:
        model, _ = load(given.model)
        print(json.dumps(measure(model, lengths[0], given.chunk)))
        return 0
    rows = []
    for length in lengths:
        command = [sys.executable, "-m", "modeling_omni.benchmark_length", "--one", "--tokens", str(length)]
        command += ["--chunk", str(given.chunk), "--model", given.model]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
        print(f"{length:,} tokens: {rows[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
