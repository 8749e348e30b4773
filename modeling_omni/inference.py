"""From files and a question to a streamed answer: what `infer.py`, the demo and the server share (paper section 2).

load -> open_media -> user_message -> encode -> media_budget (known before any tower runs) -> stream_answer, which gives
("reasoning", text) and ("answer", text) pieces and at last ("end", result).
"""

import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import set_seed
from transformers.generation.streamers import BaseStreamer

from .configuration_omni import MODEL_TYPE, OmniConfig, resolve_checkpoint
from .conversation import ConversationCache, Interrupted, end_tokens, generate_inputs
from .degrade import fit_request
from .feature_extraction_omni import clip_token_count
from .limits import is_out_of_memory
from .media import MediaLimits, OmniInputError, load_audio, load_image, load_video
from .modeling_omni import OmniForConditionalGeneration
from .processing_omni import OmniProcessor
from .reasoning_budget import ReasoningBudget, reasoning_limits

KINDS = ("image", "video", "audio")  # by mm_token_type_ids 1, 2, 3
MEDIA_TOKENS = ("<image>", "<img>", "</img>", "<so_embedding>", "<so_start>", "<so_end>")
MAX_NEW_TOKENS = 512  # for a checkpoint whose generation_config.json names no max_new_tokens
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name: str = "nano", dtype: str = "auto", device: str = "auto", attn: str | None = None
) -> tuple[OmniForConditionalGeneration, OmniProcessor]:
    """Model (eval mode) and processor of a checkpoint.

    Args:
        name: "nano" (shipped with this package), a checkpoint folder, or a Hugging Face id.
        dtype: "auto" (as stored; nano on a CPU runs in float32, which is faster there) or a key of DTYPES.
        device: "auto" (all GPUs if there are several, else the GPU, else the CPU), "cpu", "cuda:1", ...
        attn: "eager", "sdpa", "flash_attention_2", ...; None lets transformers choose.

    Raises:
        OmniInputError: no such checkpoint, one of another architecture, or a device or kernel that is not there.
    """
    folder = os.path.expanduser(resolve_checkpoint(str(name)))
    path_like = folder.startswith((".", os.sep)) or folder.count("/") > 1
    if not os.path.isdir(folder) and (path_like or os.path.exists(folder)):
        raise OmniInputError(f"model {name}: no such folder; give a checkpoint folder, a Hugging Face id or 'nano'")
    if (Path(folder) / "adapter_config.json").is_file() and not (Path(folder) / "config.json").is_file():
        raise OmniInputError(
            f"model {name}: this is a LoRA adapter, no whole checkpoint; merge it into its base first: "
            f"python infer.py merge --adapter {name} --out MERGED"
        )
    if name == "nano" and not (Path(folder) / "model.safetensors").is_file():
        raise OmniInputError("model nano: this installation has no weights for it; give a checkpoint folder instead")
    if dtype != "auto" and dtype not in DTYPES:
        raise OmniInputError(f"dtype {dtype!r} is unknown; give auto, {', '.join(DTYPES)}")
    place = _device_map(device)
    if dtype == "auto" and name == "nano" and place == "cpu":
        dtype = "float32"
    options = {} if place == "cpu" else {"device_map": place}
    if attn is not None:
        options["attn_implementation"] = attn
    try:
        model_type = OmniConfig.get_config_dict(folder)[0].get("model_type")
        if model_type not in (MODEL_TYPE, "nemotron_h_omni"):
            raise OmniInputError(f"its config.json says model_type {model_type!r}; this code runs {MODEL_TYPE}")
        processor = OmniProcessor.from_pretrained(folder)
        model = OmniForConditionalGeneration.from_pretrained(
            folder, dtype=DTYPES.get(dtype, dtype), use_safetensors=True, **options
        )
    except Exception as error:  # of any type, from json, tokenizers, safetensors and transformers
        if is_out_of_memory(error):
            raise
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split())[:400]
        raise OmniInputError(f"model {name}: cannot be loaded: {kind}{reason}") from error
    return model.eval(), processor


def _device_map(device: str) -> str:
    if device == "auto":
        return "auto" if torch.cuda.device_count() > 1 else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OmniInputError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def open_media(
    kind: str,
    source,
    frames: int | None = None,
    fps: float | None = None,
    audio_from_video: str = "auto",
    limits: MediaLimits | None = None,
) -> dict:
    """Decodes one item, once for all turns that hold it, into a message part that remembers its name.

    Args:
        kind: "image", "video" or "audio".
        source: path, bytes, data: URL (http(s) when `limits` allow), or what `load_image`, `load_video`, `load_audio`
            take otherwise.
        frames, fps: at most so many frames of a video, and so many a second (2 a second, at most 256, by default).
        audio_from_video: "auto" (its sound, where it has any), "on" (it must have sound) or "off".

    Raises:
        OmniInputError: it cannot be read.
    """
    is_file = isinstance(source, (str, os.PathLike)) and not str(source)[:5].lower() == "data:"
    part = {"type": kind, "name": os.path.basename(os.fspath(source)) if is_file else kind}
    if kind == "image":
        part["image"] = load_image(source, limits)
    elif kind == "audio":
        part["audio"] = (load_audio(source, limits=limits), 16000)
    else:
        part["video"] = load_video(source, num_frames=frames, fps=fps, audio=audio_from_video, limits=limits)
    return part


def user_message(text: str, media: Iterable[dict] = ()) -> dict:
    """A user's turn: the media parts in their order, then the text. A spoken question needs no text."""
    media = list(media)
    heard = any(p["type"] == "audio" or p["type"] == "video" and p["video"].audio is not None for p in media)
    if not text.strip() and not heard:
        raise OmniInputError("there is no question: give text, or audio (or a video with sound) that asks it")
    return {"role": "user", "content": media + [{"type": "text", "text": text}] * bool(text) if media else text}


def default_thinking(model) -> bool:
    """Whether the model thinks unless told: `enable_thinking` of generation_config.json, else yes, as the template."""
    return bool(getattr(model.generation_config, "enable_thinking", True))


def encode(
    model,
    processor: OmniProcessor,
    messages: list[dict],
    thinking: bool | None = None,
    video_pruning_rate: float | None = None,
    max_media_tokens: int | None = None,
    device: torch.device | str | None = None,
    **options,
) -> dict[str, torch.Tensor]:
    """Messages that end with a user's turn -> model inputs on the model's device.

    Args:
        thinking: None takes `default_thinking`.
        video_pruning_rate: share of video tokens that EVS drops (paper 4.6); None takes the processor's.
        max_media_tokens: budget of the request's media; resolution gives way to it, sound and text do not.
        device: None takes the model's.
        options: further ones of `OmniProcessor.apply_chat_template`.
    """
    thinking = default_thinking(model) if thinking is None else thinking
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        enable_thinking=thinking,
        tokenize=True,
        return_tensors="pt",
        video_pruning_rate=video_pruning_rate,
        max_media_tokens=max_media_tokens,
        **options,
    )
    return {name: value.to(model.device if device is None else device) for name, value in inputs.items()}


def encode_fitting(
    model,
    processor: OmniProcessor,
    messages: list[dict],
    max_prompt_tokens: int,
    thinking: bool | None = None,
    target: int | None = None,
    device: torch.device | str | None = None,
    **options,
) -> tuple[dict[str, torch.Tensor], list[dict], list[str]]:
    """`encode`, but a prompt of more than `max_prompt_tokens` loses frames and pixels by rule (see `fit_request`).

    Returns:
        inputs; the messages, their media decoded and lowered as far as needed; what was lowered, one line an item.

    Raises:
        PromptTooLong: text and sound, which are never cut, do not fit.
    """
    thinking = default_thinking(model) if thinking is None else thinking
    messages, notes = fit_request(processor, messages, max_prompt_tokens, target, enable_thinking=thinking, **options)
    return encode(model, processor, messages, thinking, device=device, **options), messages, notes


def token_counts(inputs: dict) -> dict[str, int]:
    """Prompt tokens by modality: {"text", "image", "video", "audio"}. Marks around media count as text."""
    total, types = inputs["input_ids"].numel(), inputs.get("mm_token_type_ids")
    counts = {kind: 0 if types is None else int((types == i + 1).sum()) for i, kind in enumerate(KINDS)}
    return {"text": total - sum(counts.values()), **counts}


def media_budget(processor: OmniProcessor, messages: list[dict], inputs: dict) -> dict:
    """What a request costs, before any tower runs.

    Args:
        messages: with media parts from `open_media`.
        inputs: what `encode` made of them (one conversation).

    Returns:
        {"tokens": {"text", "image", "video", "audio"}, "items": [{"kind", "name", "size", "tokens"}]}; the sound of a
        video is an item of its own, behind the video. Frame labels and marks around media count as text.
    """
    merge = processor.image_processor.merge_size**2
    image_grids = iter(inputs["image_grid_thw"].tolist() if "image_grid_thw" in inputs else ())
    video_grids = iter(inputs["video_grid_thw"].tolist() if "video_grid_thw" in inputs else ())
    kept = iter(inputs["video_keep_tokens"].tolist() if "video_keep_tokens" in inputs else ())
    clips = iter(())
    if "input_features_mask" in inputs:
        tokens = clip_token_count(inputs["input_features_mask"].sum(-1)).cpu()
        clips = iter(tokens.split(inputs["audio_clip_counts"].tolist()))
    items = []

    def add(kind, name, size, tokens):
        items.append({"kind": kind, "name": name, "size": size, "tokens": tokens})

    def add_sound(name, samples, rate):
        own = next(clips)
        pieces = f" -> {len(own)} clips" if len(own) > 1 else ""
        add("audio", name, f"{samples / rate:.2f} s{pieces}", int(own.sum()))

    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image":
                _, h, w = next(image_grids)
                height, width = part["image"].shape[:2]
                add("image", part["name"], f"{width}x{height} -> {w}x{h} patches", h * w // merge)
            elif part["type"] == "audio":
                add_sound(part["name"], len(part["audio"][0]), part["audio"][1])
            elif part["type"] == "video":
                t, h, w = next(video_grids)
                clip = part["video"]
                frames, height, width = clip.frames.shape[:3]
                seconds = "" if clip.duration is None else f", {clip.duration:.2f} s"
                full = t * h * w // merge
                tokens = next(kept, full)
                pruned = f" -> EVS keeps {tokens} of {full}" if tokens < full else ""
                size = f"{frames} frames {width}x{height}{seconds} -> {t} tubelets of {w}x{h} patches{pruned}"
                add("video", part["name"], size, tokens)
                if clip.audio is not None:
                    add_sound(f"sound of {part['name']}", len(clip.audio), 16000)
    return {"tokens": token_counts(inputs), "items": items}


def budget_lines(budget: dict) -> list[str]:
    """`media_budget` as lines to print: the sum, then one line per item."""
    tokens = budget["tokens"]
    parts = " + ".join(f"{count} {kind}" for kind, count in tokens.items() if count or kind == "text")
    lines = [f"tokens: {sum(tokens.values())} = {parts}"]
    return lines + [f"  {i['kind']} {i['name']}: {i['size']} -> {i['tokens']} tokens" for i in budget["items"]]


def suppressed_tokens(model, processor: OmniProcessor) -> list[int]:
    """Ids that are never generated: media marks and places, ids without a token, and the checkpoint's own list."""
    special_ids = processor.codec.special_ids
    ids = {special_ids[token] for token in MEDIA_TOKENS if token in special_ids}
    ids |= set(range(len(processor.tokenizer), model.config.get_text_config().vocab_size))
    return sorted(ids | set(model.generation_config.suppress_tokens or ()))


def default_max_new_tokens(model) -> int:
    """Of generation_config.json, else MAX_NEW_TOKENS."""
    return model.generation_config.max_new_tokens or MAX_NEW_TOKENS


def generation_options(
    model,
    processor: OmniProcessor,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    prefill_chunk_size: int | None = None,
    prompt_ids: torch.Tensor | None = None,
    reasoning_budget: int | None = None,
    reasoning_grace: int | None = None,
    mtp_drafts: int | None = None,
) -> dict:
    """Keyword arguments of `generate`; what is None comes from the checkpoint's generation_config.json.

    A temperature of 0 is greedy; any other temperature, or top_p, samples.

    Args:
        prompt_ids: [B, S], the prompts; needed for a reasoning budget (see `reasoning_limits`).
    """
    options = {"suppress_tokens": suppressed_tokens(model, processor)}
    options["max_new_tokens"] = max_new_tokens or default_max_new_tokens(model)
    if temperature is not None or top_p is not None:
        options["do_sample"] = temperature != 0
    if temperature:
        options["temperature"] = temperature
    if top_p is not None and options["do_sample"]:
        options["top_p"] = top_p
    if prefill_chunk_size is not None:
        options["prefill_chunk_size"] = prefill_chunk_size
    if mtp_drafts is not None:
        options["mtp_drafts"] = mtp_drafts
    if prompt_ids is not None:
        limits = reasoning_limits(model, options["max_new_tokens"], reasoning_budget, reasoning_grace)
        if limits[0] is not None:
            options["logits_processor"] = [ReasoningBudget(processor, prompt_ids, *limits[:2])]
    return options


def opens_thought(processor: OmniProcessor, input_ids: torch.Tensor) -> bool:
    """Whether a prompt [1, S] ends inside `<think>`."""
    ids = processor.codec.special_ids
    marks = [i for i in input_ids[0].tolist() if i in (ids.get("<think>"), ids.get("</think>"))]
    return bool(marks) and marks[-1] == ids.get("<think>")


class AnswerSplitter:
    """Generated ids, one at a time, -> (section, text) pieces without blanks at either end of a section.

    Sections are "reasoning" and "answer", told apart by the ids of the thinking marks, never by spelling. Special
    tokens are left out, but for the marks of tool calls.

    Args:
        thinking: the prompt has opened `<think>`.
        tool_calls: a tool call is a section of its own, given as one piece when it is complete; else it is answer text.
    """

    def __init__(self, processor: OmniProcessor, thinking: bool, tool_calls: bool = False):
        ids = processor.codec.special_ids
        names = ("<think>", "</think>", "<tool_call>", "</tool_call>")
        self.opens, self.closes, self.call, self.call_end = (ids.get(name) for name in names)
        self.hidden = set(ids.values()) - ({None} if tool_calls else {self.call, self.call_end})
        self.decode, self.tool_calls = processor.decode, tool_calls and self.call is not None
        self._begin("reasoning" if thinking else "answer")

    def _begin(self, section: str) -> None:
        self.section, self.pending, self.blank, self.started = section, [], "", False

    def _text(self) -> list[tuple[str, str]]:
        text = self.blank + self.decode(self.pending)
        self.pending = []
        text = text if self.started else text.lstrip()
        kept = text.rstrip()
        self.blank, self.started = text[len(kept) :], self.started or bool(kept)
        return [(self.section, kept)] if kept else []

    def push(self, token: int) -> list[tuple[str, str]]:
        """The pieces that this id completes: mostly one, or none."""
        if self.section == "tool_call":
            if token == self.call_end:
                text, (self.section, self.blank, self.started) = self.decode(self.pending), self.outer
                self.pending = []
                return [("tool_call", text)]
            if token not in self.hidden:
                self.pending.append(token)
            return []
        opens = token == self.opens and self.section == "answer" and not self.started
        if opens or (token == self.closes and self.section == "reasoning"):
            pieces = self._text() if self.pending else []
            self._begin("reasoning" if opens else "answer")
            return pieces
        if self.tool_calls and token == self.call and self.section == "answer":
            pieces = self._text() if self.pending else []
            self.outer = self.section, self.blank, self.started
            self.section = "tool_call"
            return pieces
        if token in self.hidden:
            return []
        self.pending.append(token)
        # half a character: wait for the rest, which is at most four bytes and so four tokens
        if len(self.pending) < 4 and self.decode(self.pending).endswith("\ufffd"):
            return []
        return self._text()

    def finish(self) -> list[tuple[str, str]]:
        """What is left at the end. A tool call that was cut off becomes answer text."""
        if self.section == "tool_call":
            pending = self.pending
            self.section, self.blank, self.started = self.outer
            self.pending = [self.call, *pending]
        return self._text() if self.pending else []


def split_tokens(processor: OmniProcessor, tokens: Iterable[int], thinking: bool) -> Iterator[tuple[str, str]]:
    """Generated ids -> ("reasoning" | "answer", text) pieces as they come (see `AnswerSplitter`)."""
    splitter = AnswerSplitter(processor, thinking)
    for token in tokens:
        yield from splitter.push(token)
    yield from splitter.finish()


class TokenQueue(BaseStreamer):
    """Hands every generated id to another thread; the prompt, which `generate` puts first, is left out."""

    def __init__(self):
        self.queue, self.is_prompt = queue.SimpleQueue(), True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_prompt:
            for token in value.flatten().tolist():
                self.queue.put(token)
        self.is_prompt = False

    def end(self) -> None:
        pass


def stream_answer(
    model,
    processor: OmniProcessor,
    inputs: dict,
    stop: threading.Event | None = None,
    seed: int | None = None,
    conversation: ConversationCache | None = None,
    **options,
) -> Iterator[tuple[str, str | dict]]:
    """Generates in a thread of its own and yields text as it comes.

    Args:
        inputs: from `encode` or `apply_chat_template`, one conversation.
        stop: set it, from anywhere, to end the generation at the next token. Closing the iterator does the same.
        seed: of the sampling.
        conversation: goes on from what is known of earlier prompts, and keeps this one.
        options: of `generation_options`.

    Yields:
        ("reasoning", text) and ("answer", text) pieces, then once ("end", result) with "answer", "reasoning" (all the
        pieces), "generated_tokens", "seconds" (towers, prefill and decoding), "first_token_seconds" (None without a
        token) and "finish_reason": "stop" (the model ended), "length" (max_new_tokens) or "interrupted". With a
        reasoning budget also "reasoning_budget" and "thought_cut": whether it ended the thought. With a conversation
        also "cached_tokens": of the prompt, that were not read again.
    """
    thinking = opens_thought(processor, inputs["input_ids"])
    stop = stop or threading.Event()
    options = generation_options(model, processor, prompt_ids=inputs["input_ids"], **options)
    budgets = options.get("logits_processor", ())
    streamer, generated, times, cached = TokenQueue(), [], [], []
    started = time.monotonic()

    def stop_asked(input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), stop.is_set(), dtype=torch.bool, device=input_ids.device)

    def run():
        try:
            if seed is not None:
                set_seed(seed)
            prompt, ready = inputs, None
            if conversation is not None:
                chunk = options.get("prefill_chunk_size")
                ready = conversation.prefill(model, inputs, chunk, stopped=stop.is_set)
                cached.append(ready.cached)
                prompt = generate_inputs([ready], model.device)
            ids = model.generate(**prompt, **options, streamer=streamer, stopping_criteria=[stop_asked])
            if ready is not None:
                conversation.finish(ready, ids[0])
            streamer.queue.put(None)
        except Interrupted:
            streamer.queue.put(None)
        except BaseException as error:  # raised again in the caller's thread
            streamer.queue.put(error)

    def tokens():
        while (token := streamer.queue.get()) is not None:
            if isinstance(token, BaseException):
                raise token
            generated.append(token)
            times.append(time.monotonic() - started)
            yield token

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    texts = {"answer": "", "reasoning": ""}
    try:
        for section, text in split_tokens(processor, tokens(), thinking):
            texts[section] += text
            yield section, text
        ends = sorted(end_tokens(model))
        reason = "length" if len(generated) >= options["max_new_tokens"] else "interrupted"
        for budget in budgets:
            ids = torch.cat([inputs["input_ids"].cpu(), torch.tensor([generated], dtype=torch.long)], 1)
            cut = bool(budget.forced_mask(ids.to(inputs["input_ids"].device), ends).any())
            texts |= {"reasoning_budget": int(budget.budget_B[0]), "thought_cut": cut}
        if conversation is not None:
            texts["cached_tokens"] = cached[0] if cached else 0
        yield (
            "end",
            texts
            | {
                "generated_tokens": len(generated),
                "seconds": time.monotonic() - started,
                "first_token_seconds": times[0] if times else None,
                "finish_reason": "stop" if generated and generated[-1] in ends else reason,
            },
        )
    finally:
        stop.set()
        worker.join()


__all__ = [
    "AnswerSplitter",
    "budget_lines",
    "default_max_new_tokens",
    "default_thinking",
    "encode",
    "encode_fitting",
    "generation_options",
    "load",
    "media_budget",
    "open_media",
    "opens_thought",
    "split_tokens",
    "stream_answer",
    "suppressed_tokens",
    "token_counts",
    "user_message",
]
