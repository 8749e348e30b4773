"""The demo's answers on their way: what the controls say, and a row of the queue as it is written.

The model's thread puts tokens into a queue; the page's thread takes them up and shows them (`Running.look`).
"""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch

from .generation_rows import Row, row_settings
from .inference import AnswerSplitter, opens_thought
from .limits import DemoLimits, OmniInputError, is_out_of_memory
from .serving_queue import QueueFull

REFRESH = 0.1  # seconds between two looks at an answer that is being written
NO_MEMORY = "the model ran out of memory; send smaller media or fewer frames"


@dataclass(frozen=True)
class Settings:
    """What the controls say.

    Attributes:
        reasoning_budget: tokens of thought; negative: no limit. temperature: 0 is greedy.
        frames: of a video, at most. max_patches: of a picture or frame; None: as the model likes.
        pruning_rate: share of video tokens that EVS drops.
    """

    thinking: bool = False
    reasoning_budget: int = -1
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    frames: int | None = None
    max_patches: int | None = None
    pruning_rate: float = 0.0
    sound: bool = True
    system: str = ""


def check_settings(settings: Settings, limits: DemoLimits) -> None:
    """Raises OmniInputError for what no control can say, but a request can."""
    for name, fits in (
        ("reasoning_budget", lambda n: -1 <= n <= limits.new_tokens),
        ("max_new_tokens", lambda n: 1 <= n <= limits.new_tokens),
        ("temperature", lambda n: 0 <= n <= 2),
        ("top_p", lambda n: 0 < n <= 1),
        ("seed", lambda n: 0 <= n < 2**32),
        ("frames", lambda n: n is None or 1 <= n <= limits.media.max_video_frames),
        ("max_patches", lambda n: n is None or 16 <= n <= 2**16),
        ("pruning_rate", lambda n: 0 <= n < 1),
        ("system", lambda text: len(text) <= limits.characters),
    ):
        value = getattr(settings, name)
        if not fits(value):
            raise OmniInputError(f"{name} cannot be {value!r:.40}; move its control")


class Running:
    """One answer on its way; `look` takes up what has come since.

    Args:
        demo: the `Demo`. inputs: of `encode`. scope: the session's key.

    Attributes:
        reasoning, answer: as far as they are written. thinking: the thought is not over.
        thought_seconds: of the thought, once it is over.
        finish_reason: "stop", "length" or "interrupted"; None while it runs, or where `error` says why not.
    """

    def __init__(self, demo, inputs: dict, settings: Settings, scope: str):
        self.stopping, self.asked = threading.Event(), time.monotonic()
        self.deadline = self.asked + demo.limits.seconds
        self.begun = self.first = self.last = self.thought_seconds = None
        self.texts, self.tokens, self.dropped = {"reasoning": "", "answer": ""}, 0, False
        self.error, self.finish_reason, self.asked_to_stop = None, None, False
        self.arrived: queue.SimpleQueue = queue.SimpleQueue()
        self.splitter = AnswerSplitter(demo.processor, opens_thought(demo.processor, inputs["input_ids"]))
        self.thinking = self.splitter.section == "reasoning"
        options, self.note = row_settings(
            demo.model, settings.max_new_tokens, settings.temperature, settings.top_p if settings.temperature else None,
            settings.seed, settings.reasoning_budget if self.thinking else -1,
        )  # fmt: skip
        self.row = Row(inputs, **options, on_token=self._on_token, stopped=self._stopped, scope=scope)
        try:
            demo.queue.submit(scope, self.row, self._failed)
        except QueueFull:
            raise OmniInputError(f"{demo.limits.waiting} answers are waiting already; try again in a minute") from None

    # the next three run in the model's thread

    def _stopped(self) -> bool:
        over = self.stopping.is_set() or time.monotonic() > self.deadline
        if self.begun is None:
            self.begun, self.dropped = time.monotonic(), over
        return over

    def _on_token(self, token: int) -> None:
        self.arrived.put((token, time.monotonic()))

    def _failed(self, error: Exception) -> None:
        self.error = error

    def stop(self) -> None:
        """Ends the generation at its next token, and a prompt that is still read at its next piece."""
        self.stopping.set()

    @property
    def over(self) -> bool:
        waiting = self.begun is None or self.dropped
        ended = self.row.finish_reason is not None or self.error is not None
        return ended or waiting and (self.stopping.is_set() or time.monotonic() > self.deadline)

    def look(self) -> bool:
        """Whether anything new has come."""
        over, pieces, came = self.over, [], False  # `over` first: all tokens have come by then
        with contextlib.suppress(queue.Empty):
            while True:
                token, at = self.arrived.get_nowait()
                came, self.tokens, self.last = True, self.tokens + 1, at
                self.first = at if self.first is None else self.first
                pieces += self.splitter.push(token)
                if self.thinking and self.splitter.section != "reasoning":
                    self.thinking, self.thought_seconds = False, at - self.begun
        if over and self.finish_reason is None and self.error is None:
            pieces += self.splitter.finish()
            self.finish_reason = self.row.finish_reason or "interrupted"
            if self.thinking and self.first is not None:
                self.thinking, self.thought_seconds = False, self.last - self.begun
        for section, text in pieces:
            self.texts[section] += text
        return came or over

    def wait(self) -> Iterator[None]:
        """Yields after every change until the answer is over.

        Raises:
            OmniInputError: the model failed, or was never reached in time.
        """
        try:
            while True:
                if self.look():
                    yield
                if self.finish_reason is not None or self.error is not None:
                    break
                time.sleep(REFRESH)
        finally:
            self.asked_to_stop = self.stopping.is_set()
            self.stop()
        if self.error is not None:
            if isinstance(self.error, OmniInputError):
                raise self.error
            if is_out_of_memory(self.error):
                raise OmniInputError(NO_MEMORY)
            raise OmniInputError("the model failed on this message; see the terminal of the demo")
        if self.first is None and not self.asked_to_stop and time.monotonic() > self.deadline:
            raise OmniInputError("the model was busy for too long; try again")

    def statistics(self) -> dict:
        """Numbers of an answer that is over."""
        seconds = self.last - self.first if self.tokens > 1 else None
        return {
            "first_token_seconds": None if self.first is None else self.first - self.asked,
            "waited_seconds": None if self.begun is None else self.begun - self.asked,
            "tokens": self.tokens,
            "tokens_per_second": (self.tokens - 1) / seconds if seconds else None,
            "prompt_tokens": self.row.prompt_tokens,
            "cached_tokens": self.row.cached_tokens,
            "memory": memory(),
            "thought_cut": self.row.thought_cut,
            "finish_reason": self.finish_reason,
            "stopped": self.asked_to_stop,
        }


def memory() -> dict[str, int]:
    """Bytes that this process holds: {"process"} and, with a GPU, {"gpu", "gpu_peak"}."""
    held = {"process": psutil.Process().memory_info().rss}
    if torch.cuda.is_available():
        held |= {"gpu": torch.cuda.memory_allocated(), "gpu_peak": torch.cuda.max_memory_allocated()}
    return held


def statistics_line(numbers: dict) -> str:
    """`Running.statistics` for people."""
    first, speed = numbers["first_token_seconds"], numbers["tokens_per_second"]
    parts = [] if first is None else [f"first token {first:.2f} s"]
    if (numbers["waited_seconds"] or 0) > 0.5:
        parts[-1:] = [f"{part} ({numbers['waited_seconds']:.1f} s of it in the queue)" for part in parts[-1:]]
    parts += [] if speed is None else [f"{speed:.1f} tokens/s"]
    parts.append(f"{numbers['tokens']} tokens")
    known = f" ({numbers['cached_tokens']:,} known)" if numbers["cached_tokens"] else ""
    parts.append(f"prompt {numbers['prompt_tokens']:,}{known}")
    parts += [f"{name.replace('_', ' ')} memory {size / 2**30:.2f} GiB" for name, size in numbers["memory"].items()]
    ended = "stopped" if numbers["stopped"] else "out of time"
    ends = {"length": "cut off at the limit of new tokens", "interrupted": ended}
    parts += [ends[numbers["finish_reason"]]] if numbers["finish_reason"] in ends else []
    parts += ["the budget ended the thought"] if numbers["thought_cut"] else []
    return " \u00b7 ".join(parts)
