"""Inference from the command line: ask, chat, batches, a server, held-out scores, merging, FP8 and NVFP4."""

import argparse
import contextlib
import json
import os
import signal
import sys
import threading

EXAMPLES = """examples:
  python infer.py ask --image photo.jpg "What colour is the circle?"
  python infer.py ask --video clip.mp4 --audio question.wav
  python infer.py ask --model nvidia/Nemotron-3-Nano-Omni-30B-A3B-Reasoning-BF16 --think --video talk.mp4 "Summarise."
  python infer.py chat
  python infer.py batch --in rows.jsonl --out results.jsonl
  python infer.py serve --port 8000
  python infer.py eval --suite nano --samples 100 --out table.json
  python infer.py eval --data docvqa.jsonl chartqa.jsonl --think --out runs/eval
  python infer.py eval --suite tables --samples 20 --out runs/tables
  python infer.py compare --models nano runs/nano/rl/omni_rl/final --samples 100 --out compared.json
  python infer.py merge --adapter runs/lora/final --out merged
  python infer.py export --format nvfp4 --out nano-nvfp4
"""

# ------------------------------------------------------------------------------------------------------ arguments


class MediaInOrder(argparse.Action):
    """Collects --image, --video and --audio into one list of (kind, source), in the order given."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.media = [*namespace.media, (self.dest, values)]


def number(kind, fits, bounds: str):
    """An argparse type: a number of `kind` for which `fits` holds; `bounds` says so in words."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):  # NaN fits nothing
            raise argparse.ArgumentTypeError(f"{text!r} is not {bounds}")
        return value

    return parse


def build_parser() -> argparse.ArgumentParser:
    runtime = argparse.ArgumentParser(add_help=False)
    group = runtime.add_argument_group("model")
    group.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                       help="auto: as stored (nano on a CPU: float32)")  # fmt: skip
    group.add_argument("--device", default="auto", help="auto (all GPUs, else CPU), cpu, cuda, cuda:1, mps ...")
    group.add_argument("--attn", choices=("eager", "sdpa", "flash_attention_2", "flash_attention_3"),
                       help="attention kernel (default: the best that transformers finds)")  # fmt: skip
    group.add_argument("--kv-cache", choices=("auto", "fp8", "model"), default="auto",
                       help="keys and values: auto (FP8 where the checkpoint has scales for it), fp8, or the model's "
                       "dtype")  # fmt: skip
    model = argparse.ArgumentParser(add_help=False, parents=[runtime])
    model.add_argument("--model", default="nano", help="nano (shipped), a checkpoint folder or a Hugging Face id")

    media = argparse.ArgumentParser(add_help=False)
    group = media.add_argument_group("media")
    positive = number(int, lambda n: n >= 1, "a whole number of 1 or more")
    group.add_argument("--frames", type=positive, metavar="N", help="frames of a video, evenly spread, at most")
    group.add_argument("--fps", type=number(float, lambda n: 0 < n < float("inf"), "a number above 0"),
                       help="frames per second of a video (default: 2, and at most 256 frames)")  # fmt: skip
    group.add_argument("--video-pruning-rate", type=number(float, lambda n: 0 <= n < 1, "from 0 to below 1"),
                       metavar="Q", help="EVS: share of video tokens to drop (default: the processor's)")  # fmt: skip
    group.add_argument("--max-media-tokens", type=positive, metavar="N",
                       help="budget of all media; pictures and frames get smaller to fit it")  # fmt: skip
    group.add_argument("--max-prompt-tokens", type=positive, metavar="N",
                       help="a longer prompt loses frames and pixels by rule, text and sound never (default: the "
                       "model's context less --max-new-tokens)")  # fmt: skip
    group.add_argument("--audio-from-video", choices=("auto", "on", "off"), default="auto",
                       help="hear a video's sound: where it has any, always (else an error), never")  # fmt: skip
    group.add_argument("--allow-urls", action="store_true",
                       help="let http(s) URLs stand for files; those of private addresses stay refused")  # fmt: skip
    group.add_argument("--limit", action="append", default=[], metavar="NAME=VALUE",
                       help="another limit on media and text, such as timeout=60; all of them, with their defaults: "
                       "modeling_omni/limits.py; may be repeated")  # fmt: skip

    asking = argparse.ArgumentParser(add_help=False)
    group = asking.add_argument_group("prompt and seed")
    group.add_argument("--system", help="system prompt")
    group.add_argument("--seed", type=int, help="seed of the sampling")

    generation = argparse.ArgumentParser(add_help=False)
    group = generation.add_argument_group("generation (defaults: the checkpoint's generation_config.json)")
    group.add_argument("--think", action=argparse.BooleanOptionalAction,
                       help="reason before the answer (default: enable_thinking of generation_config.json, else yes; "
                       "nano: no)")  # fmt: skip
    group.add_argument("--max-new-tokens", type=positive, metavar="N", help="tokens of reasoning and answer, at most")
    group.add_argument("--temperature", metavar="T", help="0: greedy; else sampling at this temperature",
                       type=number(float, lambda n: 0 <= n < float("inf"), "a number of 0 or more"))  # fmt: skip
    group.add_argument("--top-p", type=number(float, lambda n: 0 < n <= 1, "above 0 and at most 1"), metavar="P",
                       help="sampling among the likeliest tokens that add up to P")  # fmt: skip
    group.add_argument("--prefill-chunk-size", type=positive, metavar="N",
                       help="run the prompt N tokens at a time: less memory, same result")  # fmt: skip

    reasoning = argparse.ArgumentParser(add_help=False)
    group = reasoning.add_argument_group("reasoning")
    group.add_argument("--reasoning-budget", type=int, metavar="N",
                       help="tokens of thought, after which it ends at the next newline; -1: no limit (default: "
                       "reasoning_budget of generation_config.json, else no limit)")  # fmt: skip
    group.add_argument("--reasoning-grace", type=number(int, lambda n: n >= 0, "a whole number of 0 or more"),
                       metavar="N", help="tokens beyond the budget in which the thought may still find its end "
                       "(default: reasoning_grace of generation_config.json, else 1024)")  # fmt: skip

    parser = argparse.ArgumentParser(
        prog="infer.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = "ask | chat | batch | serve | eval | compare | merge | export"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)

    ask = commands.add_parser(
        "ask", parents=[model, media, asking, generation, reasoning], help="one question about any mix of media",
        description="One question. The media stand in the prompt in the order given here, then the question. The "
        "answer goes to stdout, what the media cost and the reasoning to stderr.",
    )  # fmt: skip
    ask.add_argument("question", nargs="?", default="", help="may be left out if a sound asks it")
    for kind in ("image", "video", "audio"):
        ask.add_argument(f"--{kind}", action=MediaInOrder, default=argparse.SUPPRESS, metavar="FILE",
                         help=f"{kind} file, data: URL or (with --allow-urls) URL; may be repeated")  # fmt: skip
    ask.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    ask.set_defaults(run=run_ask, media=[])

    chat = commands.add_parser(
        "chat", parents=[model, media, asking, generation, reasoning], help="a conversation in the terminal",
        description="A conversation in the terminal; /help in it lists its commands. Media are encoded once, and the "
        "model goes on from what it has read.",
    )  # fmt: skip
    chat.set_defaults(run=run_chat)
    for command in (ask, chat):
        command.add_argument("--mtp-drafts", type=positive, metavar="K",
                             help="the checkpoint's draft head drafts K tokens for each pass: same answer")  # fmt: skip

    batch = commands.add_parser(
        "batch", parents=[model, media, asking, generation, reasoning], help="JSONL of prompts to JSONL of answers",
        description="Answers every row of a JSONL file: one line of output per row, a result or an error. Started "
        "again after a kill it goes on where it was. Rows are {'messages': [...]} or {'prompt': '...', 'image': "
        "'a.png', 'audio': [...]}, with an optional 'id'; paths start at the file's folder. A summary as one JSON "
        "object goes to stdout; exit code 1 if there were errors.",
    )  # fmt: skip
    batch.add_argument("--in", required=True, dest="source", metavar="FILE", help="JSONL, one prompt per line")
    batch.add_argument("--out", required=True, metavar="FILE", help="JSONL; appended to if it exists")
    batch.add_argument("--batch-tokens", type=positive, default=32768, metavar="N",
                       help="prompt and new tokens of a batch, padding included (default: 32768)")  # fmt: skip
    batch.add_argument("--batch-size", type=positive, default=32, metavar="N", help="rows of a batch (default: 32)")
    batch.add_argument("--workers", type=positive, default=2, metavar="N",
                       help="threads that decode media ahead of the model (default: 2)")  # fmt: skip
    batch.add_argument("--retry-errors", action="store_true", help="try rows again that have an error so far")
    batch.set_defaults(run=run_batch)

    serve = commands.add_parser(
        "serve", parents=[model, media, generation, reasoning], help="an OpenAI-compatible server",
        description="OpenAI's chat completions under /v1, for many clients: what waits runs as one batch. "
        "The flags of generation, reasoning and media are defaults that requests may change (--max-new-tokens and "
        "--max-media-tokens: upper limits). Other hosts than loopback need a password in OMNI_API_KEY.",
    )  # fmt: skip
    group = serve.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    group.add_argument("--port", type=number(int, lambda n: 0 <= n < 65536, "a port"), default=8000,
                       help="default: 8000; 0: a free one")  # fmt: skip
    group.add_argument("--name", help="name of the model for clients (default: as given to --model)")
    group.add_argument("--max-batch", type=positive, default=8, metavar="N", help="requests of a batch (default: 8)")
    group.add_argument("--batch-tokens", type=positive, default=65536, metavar="N",
                       help="prompt and new tokens of a batch, padding included (default: 65536)")  # fmt: skip
    group.add_argument("--max-waiting", type=positive, default=64, metavar="N",
                       help="requests that may wait; more are refused (default: 64)")  # fmt: skip
    group.add_argument("--max-body-mb", type=positive, default=64, metavar="N",
                       help="size of a request and of each of its media, in MiB (default: 64)")  # fmt: skip
    group.add_argument("--cache-mb", type=number(int, lambda n: n >= 0, "a whole number of 0 or more"), default=1024,
                       metavar="N", help="memory for the states of conversations, and as much for media, so that a "
                       "client's next turn goes on where it was; 0: none (default: 1024)")  # fmt: skip
    group.add_argument("--max-media", type=positive, default=64, metavar="N",
                       help="media items of a request (default: 64)")  # fmt: skip
    group.add_argument("--max-seconds", type=number(float, lambda n: 0 < n < float("inf"), "a number above 0"),
                       default=600.0, metavar="S", help="time of a request, waiting included")  # fmt: skip
    serve.set_defaults(run=run_serve)

    evaluate = commands.add_parser(
        "eval", parents=[model, media, generation, reasoning], help="benchmarks, held-out skills, the paper's tables",
        description="Scores with a 95 % interval, as a Markdown table on stdout: of benchmarks in JSONL files "
        "(--data), of nano's held-out skills (--suite nano, the default; only --think and the reasoning flags change "
        "how it answers), or the paper's tables: of budgets, tubelets and EVS (--suite tables, on nano or on --data), "
        "of FP8 and NVFP4 (--suite quantization, nano's skills). Killed and started again with the same --out, all but "
        "--suite nano go on where they were.",
    )  # fmt: skip
    group = evaluate.add_argument_group("benchmarks and tables")
    group.add_argument("--data", nargs="+", metavar="[NAME=]FILE", help="JSONL rows with 'prompt' or 'messages', "
                       "'answer', 'verifier'; needs --out")  # fmt: skip
    group.add_argument("--metric", help="verifier of rows that name none")
    group.add_argument("--errors", choices=("wrong", "leave out"), default="wrong",
                       help="what rows with errors count as (default: wrong)")  # fmt: skip
    group.add_argument("--retry-errors", action="store_true", help="try rows again that have an error so far")
    group.add_argument("--runs", type=positive, default=1, metavar="N", help="answers to every row (default: 1)")
    group.add_argument("--system", help="system prompt")
    group.add_argument("--batch-tokens", type=positive, default=32768, metavar="N",
                       help="prompt and new tokens of a batch, padding included (default: 32768)")  # fmt: skip
    tables = ("modes", "11", "12", "13")
    group.add_argument("--tables", nargs="+", metavar="TABLE", choices=tables, default=tables,
                       help="of --suite tables (default: modes 11 12 13)")  # fmt: skip
    group.add_argument("--formats", nargs="+", metavar="FORMAT", default=["bf16", "fp8", "nvfp4"], help="of --suite "
                       "quantization: bf16, formats of export, folders of packed checkpoints (default: bf16 fp8 "
                       "nvfp4); --data are its calibration rows")  # fmt: skip
    group.add_argument("--budgets", nargs="+", type=int, metavar="N", help="of Table 11 (default: from 13/16 of "
                       "--max-new-tokens down to 0)")  # fmt: skip
    group.add_argument("--table-frames", nargs="+", type=positive, metavar="N", help="frames of Tables 12 and 13 "
                       "(default: 128 256; nano: 4 8)")  # fmt: skip
    group.add_argument("--ttft-clip", nargs=2, type=positive, metavar=("FRAMES", "SIDE"), help="clip whose time to "
                       "first token is measured (default: 512 512; nano: 64 64)")  # fmt: skip
    group.add_argument("--ttft-runs", type=positive, default=5, metavar="N", help="times it is measured (default: 5)")
    evaluate.set_defaults(run=run_eval)

    compare = commands.add_parser(
        "compare", parents=[runtime, reasoning], help="models on the same held-out prompts", allow_abbrev=False,
        description="What changed from the first model to each of the others on the same held-out prompts of the nano "
        "skills: paired differences with 95 % intervals and McNemar's exact test, as Markdown tables on stdout.",
    )  # fmt: skip
    compare.add_argument("--models", nargs="+", metavar="MODEL", help="two or more, the first is the one that the "
                         "others are compared with")  # fmt: skip
    compare.add_argument("--rollouts", nargs="+", metavar="FOLDER", help="instead: two or more folders of `train.py "
                         "filter` on the same prompts; compares the scores of the sampled answers")  # fmt: skip
    compare.set_defaults(run=run_compare)
    for command in (evaluate, compare):
        suites = ("nano", "tables", "quantization") if command is evaluate else ("nano",)
        command.add_argument("--suite", choices=suites, default="nano", help="which tests (default: nano)")
        command.add_argument("--skills", help="comma-separated (default: all)")
        command.add_argument("--samples", type=positive, help="held-out samples per skill (default: 100), rows of a "
                             "benchmark (default: all; --suite tables: 100)")  # fmt: skip
        command.add_argument("--seed", type=int, default=10**6,
                             help="seed of the first sample, or of sampled answers (default: 1000000)")  # fmt: skip
        command.add_argument("--batch-size", type=positive, default=25, help="prompts at a time (default: 25)")
        command.add_argument("--without", choices=("sound", "picture"), help="take it out of the prompts first")
        command.add_argument("--out", metavar="PATH", help="also write it, with settings and versions: a JSON file; "
                             "for --data and --suite tables a folder")  # fmt: skip
    compare.add_argument("--think", action=argparse.BooleanOptionalAction,
                         help="reason before the answer (default: in text_math only)")  # fmt: skip

    merge = commands.add_parser(
        "merge", help="a LoRA adapter into its base: a whole checkpoint",
        description="Adds a LoRA adapter to the weights of its base, in float32, and writes a whole checkpoint in the "
        "released layout and the base's dtypes, processor included. Its folder goes to stdout.",
    )  # fmt: skip
    merge.add_argument("--adapter", required=True, metavar="DIR", help="folder that PEFT or train.py has saved")
    merge.add_argument("--model", metavar="BASE", help="nano, a checkpoint folder or a Hugging Face id (default: the "
                       "one that the adapter names)")  # fmt: skip
    merge.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not exist, or be empty")
    merge.set_defaults(run=run_merge)

    export = commands.add_parser(
        "export", parents=[model], help="a checkpoint in FP8 or NVFP4, or back in bfloat16",
        description="Writes a checkpoint in the released FP8 or NVFP4 layout, scales of inputs and of the KV cache "
        "calibrated on a few rows, or a packed one back in bfloat16 (--format bf16, no calibration). Weights are read "
        "and written shard by shard. Sizes go to stdout as JSON.",
    )  # fmt: skip
    export.add_argument("--format", required=True, choices=("fp8", "nvfp4", "nvfp4_all", "nvfp4_coarse", "bf16"),
                        help="fp8, nvfp4: the paper's recipes; nvfp4_all: all linear layers of the language model in "
                        "NVFP4; nvfp4_coarse: the same with 7 of its 15 values, for experiments")  # fmt: skip
    export.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not exist, or be empty")
    export.add_argument("--data", nargs="+", metavar="SOURCE", help="calibration rows as for training: JSONL files, "
                        "nano:<skill> ... (default for nano: its skills)")  # fmt: skip
    export.add_argument("--rows", type=positive, default=32, metavar="N", help="packed rows to calibrate on (32)")
    export.add_argument("--row-tokens", type=positive, default=2048, metavar="N", help="tokens of a row (2048)")
    export.set_defaults(run=run_export)
    return parser


# ------------------------------------------------------------------------------------------------------ helpers


def note(text: str = "", end: str = "\n", dim: bool = False) -> None:
    """To stderr, so that stdout holds answers alone."""
    if dim and sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        text = f"\033[2m{text}\033[0m"
    print(text, end=end, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stop_on_ctrl_c(stop: threading.Event):
    """The first Ctrl-C ends the generation at the next token; a second one interrupts as usual."""

    def on_ctrl_c(*_):
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, on_ctrl_c)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def generate(model, processor, inputs: dict, options, show: bool = True, conversation=None) -> dict:
    """Streams reasoning to stderr and the answer to stdout (if `show`); the result of `stream_answer`."""
    from modeling_omni.inference import stream_answer

    stop, shown = threading.Event(), None
    names = ("seed", "max_new_tokens", "temperature", "top_p", "prefill_chunk_size", "mtp_drafts")
    chosen = {name: getattr(options, name) for name in (*names, "reasoning_budget", "reasoning_grace")}
    stream = stream_answer(model, processor, inputs, stop, conversation=conversation, **chosen)
    with stop_on_ctrl_c(stop), contextlib.closing(stream):
        for section, piece in stream:
            if section == "end":
                result = piece
            elif show:
                if section != shown and section == "reasoning":
                    note("reasoning:", dim=True)
                elif section != shown and shown == "reasoning":
                    note("\nanswer:", dim=True)
                shown = section
                if section == "reasoning":
                    note(piece, end="", dim=True)
                else:
                    print(piece, end="", flush=True)
    if show:
        if shown == "reasoning":
            note()
        print(flush=True)
        if result["finish_reason"] == "length":
            note(f"(cut off after {result['generated_tokens']} tokens; see --max-new-tokens)", dim=True)
        if result.get("thought_cut"):
            note(f"(the reasoning budget of {result['reasoning_budget']} tokens ended the thought)", dim=True)
    return result


def check_length(model, total: int) -> None:
    """A note for prompts beyond the length that the model was made for: they run, but less reliably."""
    length = model.config.get_text_config().max_position_embeddings
    if total > length:
        note(f"note: {total} prompt tokens are more than the {length} this model was made for; see --max-prompt-tokens")


def check_reasoning(model, options) -> None:
    """A note where the reasoning budget has to be lowered so that the answer has room."""
    from modeling_omni.inference import default_max_new_tokens
    from modeling_omni.reasoning_budget import reasoning_limits

    limit = options.max_new_tokens or default_max_new_tokens(model)
    lowered = reasoning_limits(model, limit, options.reasoning_budget, options.reasoning_grace)[2]
    if lowered:
        note(f"note: {lowered}; see --max-new-tokens")


def is_out_of_memory(error: Exception) -> bool:
    from modeling_omni.limits import is_out_of_memory  # not above: the package would slow --help down

    return is_out_of_memory(error)


def out_of_memory(error: Exception) -> str:
    return (
        f"error: out of memory ({(str(error) or 'MemoryError').splitlines()[0]}); lower --max-prompt-tokens or "
        "--frames, or give --prefill-chunk-size"
    )


def load_model(options):
    from modeling_omni.inference import load

    with contextlib.redirect_stdout(sys.stderr):  # some libraries greet on stdout, which is for answers
        model, processor = load(options.model, options.dtype, options.device, options.attn)
    model.config.llm_config.kv_cache_dtype = options.kv_cache
    return model, processor


def media_options(options) -> dict:
    limits = given_limits(options)
    sampling = {"frames": options.frames, "fps": options.fps, "audio_from_video": options.audio_from_video}
    return sampling | {"limits": limits}


def given_limits(options, limits=None):
    """`default_limits()`, or `limits`, with --allow-urls and --limit."""
    from dataclasses import replace

    from modeling_omni.limits import default_limits, with_limits

    limits = replace(limits or default_limits())
    limits.allow_urls = options.allow_urls or limits.allow_urls
    return with_limits(limits, options.limit)


def prompt_options(options) -> dict:
    chosen = {"video_pruning_rate": options.video_pruning_rate, "max_media_tokens": options.max_media_tokens}
    return chosen | {"media_limits": given_limits(options)}


# ------------------------------------------------------------------------------------------------------ commands


def run_ask(options) -> int:
    from modeling_omni.degrade import prompt_limit
    from modeling_omni.inference import (
        budget_lines,
        default_max_new_tokens,
        default_thinking,
        encode_fitting,
        media_budget,
        open_media,
        user_message,
    )

    choices = media_options(options)  # the files first: a wrong name should not wait for a large model
    messages = [user_message(options.question, [open_media(kind, source, **choices) for kind, source in options.media])]
    if options.system:
        messages.insert(0, {"role": "system", "content": options.system})
    model, processor = load_model(options)
    thinking = default_thinking(model) if options.think is None else options.think
    limit = prompt_limit(model, options.max_new_tokens or default_max_new_tokens(model), options.max_prompt_tokens)
    inputs, messages, lowered = encode_fitting(model, processor, messages, limit, thinking, **prompt_options(options))
    budget = media_budget(processor, messages, inputs)
    for line in [f"lowered to fit {limit} tokens: {line}" for line in lowered] + budget_lines(budget):
        note(line)
    check_length(model, sum(budget["tokens"].values()))
    if thinking:
        check_reasoning(model, options)
    result = generate(model, processor, inputs, options, show=not options.json)
    if options.json:
        about = {"thinking": thinking, "model": options.model} | ({"degraded": lowered} if lowered else {})
        print(json.dumps({**result, **budget, **about}), flush=True)
    return 130 if result["finish_reason"] == "interrupted" else 0


def run_chat(options) -> int:
    from modeling_omni.chat import Chat
    from modeling_omni.media import OmniInputError

    model, processor = load_model(options)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit "ignore"
    interactive = sys.stdin.isatty()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are refused with their message
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history of input()
        note("/help lists the commands; end of input quits")
    chat = Chat(
        model, processor, options.system, options.think, options.reasoning_budget, options.max_new_tokens,
        options.max_prompt_tokens, media_options(options), prompt_options(options),
    )  # fmt: skip
    while not chat.over:
        turns, line = chat.turns, ""
        try:
            try:
                line = input("> " if interactive else "")
            except EOFError:
                return 0
            notes, messages = chat.take(line)
            for text in notes:
                note(text)
            options.reasoning_budget = chat.reasoning_budget
            if line.startswith("/budget"):
                check_reasoning(model, options)
            if messages is not None:
                turn = chat.prepare(messages)
                for text in turn.notes:
                    note(text)
                check_length(model, turn.total)
                result = generate(model, processor, turn.inputs, options, conversation=chat.cache)
                note(chat.answered(turn, result), dim=True)
        except OmniInputError as error:
            note(f"error: {error}")
        except KeyboardInterrupt:
            if line and chat.turns == turns:
                note("\n(stopped; this message was not sent)")
            else:  # at the prompt, or between the answer and the prompt
                note("\n/quit leaves")
        except Exception as error:  # the conversation outlives a message that is too large
            if not is_out_of_memory(error):
                raise
            chat.cache.clear()
            note(out_of_memory(error) + "; the message was not sent, what was said before is kept")
    return 0


def run_batch(options) -> int:
    from modeling_omni.batch_inference import run_batch

    limits = given_limits(options)
    sampling = {"num_frames": options.frames, "fps": options.fps, "media_limits": limits}
    model, processor = load_model(options)
    check_reasoning(model, options)
    names = ("batch_tokens", "batch_size", "workers", "retry_errors", "system", "seed", "max_new_tokens")
    names += ("prefill_chunk_size", "temperature", "top_p", "reasoning_budget", "reasoning_grace", "max_prompt_tokens")
    summary = run_batch(
        model, processor, options.source, options.out, progress=sys.stderr.isatty(), thinking=options.think,
        video_sound=options.audio_from_video, encode_options=prompt_options(options) | sampling,
        **{name: getattr(options, name) for name in names},
    )  # fmt: skip
    print(json.dumps(summary), flush=True)
    return 1 if summary["errors"] else 0


def run_serve(options) -> int:
    from modeling_omni.media import OmniInputError

    try:
        from modeling_omni.serving import LOOPBACK, Server, ServerLimits, bind, serve
    except ImportError as error:
        raise OmniInputError(f"the server needs {error.name}: pip install 'modeling-omni[serve]'") from error
    key = os.environ.get("OMNI_API_KEY") or None
    with contextlib.closing(bind(options.host, options.port, key)) as listener:  # before the model: that may take long
        model, processor = load_model(options)
        check_reasoning(model, options)
        names = ("max_batch", "batch_tokens", "max_waiting", "max_media", "max_new_tokens")
        limits = ServerLimits(seconds=options.max_seconds, **{name: getattr(options, name) for name in names})
        limits.max_body_bytes = limits.media.max_bytes = limits.media.max_url_bytes = options.max_body_mb * 1024**2
        limits.media = given_limits(options, limits.media)
        names = ("temperature", "top_p", "reasoning_budget", "reasoning_grace", "fps", "video_pruning_rate")
        defaults = {name: getattr(options, name) for name in (*names, "max_media_tokens", "max_prompt_tokens")}
        defaults |= {"thinking": options.think, "num_frames": options.frames}
        defaults["use_audio_in_video"] = False if options.audio_from_video == "off" else None
        defaults["video_sound"] = "on" if options.audio_from_video == "on" else "auto"
        server = Server(
            model, processor, options.name or options.model, limits, key,
            hosts=LOOPBACK if options.host in LOOPBACK else None, defaults=defaults,
            prefill_chunk_size=options.prefill_chunk_size, cache_bytes=options.cache_mb * 1024**2,
        )  # fmt: skip
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        note(f"listening on http://{host}:{port}/v1, model {server.name}; Ctrl-C stops")
        serve(server, listener)
    return 0


def run_eval(options) -> int:
    from modeling_omni.evaluation_commands import run_eval

    return run_eval(options, load_model, note)


def run_compare(options) -> int:
    from modeling_omni.evaluation_commands import run_compare

    return run_compare(options, load_model, note)


def run_merge(options) -> int:
    from modeling_omni.lora import merge_adapter

    print(merge_adapter(options.adapter, options.out, options.model, progress=sys.stderr.isatty()), flush=True)
    return 0


def run_export(options) -> int:
    from modeling_omni import quantized_export as export

    export.check_export(options.model, options.out, options.format)
    scales = None
    if options.format != "bf16":
        sources = export.calibration_sources(options.model, options.data)
        model, processor = load_model(options)
        note(f"calibrating on {options.rows} rows of {options.row_tokens} tokens of {len(sources)} source(s)")
        batches = export.calibration_batches(processor, sources, options.rows, options.row_tokens)
        scales = export.calibrate(model, batches)
        del model
    print(json.dumps(export.export_checkpoint(options.model, options.out, options.format, scales)), flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs one command; 2 and one line on stderr where the input is at fault, 130 after Ctrl-C."""
    options = build_parser().parse_args(argv)
    from transformers.utils import logging

    from modeling_omni.media import OmniInputError

    logging.set_verbosity_error()
    if not sys.stderr.isatty() or "nano" in (getattr(options, "model", None), *getattr(options, "models", ())):
        logging.disable_progress_bar()
    try:
        return options.run(options)
    except OmniInputError as error:
        note(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        note(out_of_memory(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
