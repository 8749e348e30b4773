"""A conversation with a person: commands, what is attached, and what has been said (the state behind `infer.py chat`).

take(line) -> notes and, where the line asks for an answer, the messages to be answered -> prepare(messages) -> inputs
-> the answer -> answered(turn, result). Only `answered` changes what has been said: whatever stops a turn before it
leaves the conversation as it was.
"""

import os
from dataclasses import dataclass, field

import torch

from .conversation import ConversationCache
from .degrade import prompt_limit
from .inference import budget_lines, default_max_new_tokens, encode_fitting, media_budget, open_media, user_message
from .media import OmniInputError

COMMANDS = """/image PATH, /video PATH, /audio PATH   attach to the next message
/detach                                 forget what is attached
/think on|off                           reason before the answer, or do not
/budget N                               tokens of thought at most (-1: no limit)
/retry                                  answer the last message anew
/edit TEXT                              say TEXT instead of the last message, its media stay
/undo                                   take the last message and its answer back
/system TEXT                            system prompt from now on (without TEXT: none)
/clear                                  forget the conversation and what is attached
/help, /quit                            Ctrl-C stops an answer, end of input quits
An empty line sends attached audio as the question."""

HEADROOM = 8  # a prompt over its limit is lowered to leave an eighth of it to the next turns


@dataclass
class Turn:
    """A message on its way to its answer."""

    messages: list[dict]  # with the system message, media decoded and as far lowered as the prompt needs
    inputs: dict[str, torch.Tensor]
    notes: list[str]
    tokens: str  # of the prompt, by modality
    total: int


@dataclass
class Chat:
    """What a conversation knows between two lines.

    Attributes:
        thinking: None takes the checkpoint's default. reasoning_budget: None likewise.
        media: options of `open_media`. prompt: options of `encode_fitting`.
        max_prompt_tokens, max_new_tokens: see `prompt_limit`.
        messages: what was said, without the system message. attached: parts for the next message.
        turns: answers so far. over: the person has quit.
    """

    model: torch.nn.Module
    processor: object
    system: str | None = None
    thinking: bool | None = None
    reasoning_budget: int | None = None
    max_new_tokens: int | None = None
    max_prompt_tokens: int | None = None
    media: dict = field(default_factory=dict)
    prompt: dict = field(default_factory=dict)
    cache: ConversationCache | None = field(default_factory=ConversationCache)
    messages: list[dict] = field(default_factory=list)
    attached: list[dict] = field(default_factory=list)
    turns: int = 0
    over: bool = False

    def take(self, line: str) -> tuple[list[str], list[dict] | None]:
        """Notes to show, and the messages to be answered (None: nothing was asked).

        Raises:
            OmniInputError: a command that is unknown or wrong, a file that cannot be read.
        """
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command in ("/image", "/video", "/audio"):
            path = rest[1:-1] if len(rest) > 1 and rest[0] == rest[-1] and rest[0] in "'\"" else rest
            self.attached.append(open_media(command[1:], os.path.expanduser(path), **self.media))
            return [f"attached {command[1:]} {self.attached[-1]['name']}"], None
        if command == "/detach":
            self.attached = []
            return ["nothing is attached"], None
        if command == "/think":
            if rest not in ("on", "off"):
                raise OmniInputError("write /think on or /think off")
            self.thinking = rest == "on"
            return [f"thinking {rest}"], None
        if command == "/budget":
            try:
                self.reasoning_budget = int(rest)
            except ValueError:
                raise OmniInputError("write /budget and a number of tokens (-1: no limit)") from None
            return [f"reasoning budget {rest if self.reasoning_budget >= 0 else 'unlimited'}"], None
        if command in ("/retry", "/edit", "/undo"):
            return self._again(command, rest)
        if command == "/system":
            self.system = rest or None
            return ["system prompt set" if rest else "no system prompt"], None
        if command == "/clear":
            self.messages, self.attached = [], []
            if self.cache is not None:
                self.cache.clear()
            return ["conversation forgotten"], None
        if command == "/help":
            return [COMMANDS], None
        if command in ("/quit", "/exit"):
            self.over = True
            return [], None
        if command.startswith("/"):
            raise OmniInputError(f"unknown command {command}; /help lists them, a blank in front sends it as text")
        if not line.strip() and not self.attached:
            return [], None
        return [], [*self.messages, user_message(line.strip(), self.attached)]

    def _again(self, command: str, text: str) -> tuple[list[str], list[dict] | None]:
        """/retry, /edit and /undo: the last message once more, otherwise, or not at all."""
        if not self.messages:
            raise OmniInputError(f"nothing was said yet that {command} could take up")
        if command == "/undo":
            self.messages = self.messages[:-2]
            return ["the last message and its answer are taken back"], None
        asked = self.messages[-2]
        if command == "/edit":
            if not text:
                raise OmniInputError("write /edit and what the last message should have been")
            content = asked["content"] if isinstance(asked["content"], list) else []
            asked = user_message(text, [part for part in content if part["type"] != "text"])
        return [], [*self.messages[:-2], asked]

    def prepare(self, messages: list[dict]) -> Turn:
        """The prompt of a conversation, fitted into its limit, before any tower runs.

        Raises:
            OmniInputError: it does not fit.
        """
        prompt = [{"role": "system", "content": self.system}] * bool(self.system) + messages
        room = self.max_new_tokens or default_max_new_tokens(self.model)
        limit = prompt_limit(self.model, room, self.max_prompt_tokens)
        device = None if self.cache is None else "cpu"  # the cache moves what has to be read
        inputs, prompt, lowered = encode_fitting(
            self.model, self.processor, prompt, limit, self.thinking, limit - limit // HEADROOM, device, **self.prompt
        )
        budget = media_budget(self.processor, prompt, inputs)
        lines = budget_lines(budget)
        content = prompt[-1]["content"] if isinstance(prompt[-1]["content"], list) else []
        new = sum(1 + (p["type"] == "video" and p["video"].audio is not None) for p in content if p["type"] != "text")
        notes = [f"lowered to fit {limit} tokens: {line}" for line in lowered]
        notes += lines[len(lines) - new :]  # media of earlier turns are in the sum, but known
        return Turn(prompt, inputs, notes, lines[0].removeprefix("tokens: "), sum(budget["tokens"].values()))

    def answered(self, turn: Turn, result: dict) -> str:
        """Takes the answer (`stream_answer`'s result) into the conversation; a line about it."""
        stopped = result["finish_reason"] == "interrupted"
        if stopped and not result["generated_tokens"]:
            return "(stopped; this message was not sent)"
        said = turn.messages[1:] if self.system else turn.messages
        answer = {"role": "assistant", "content": result["answer"], "reasoning_content": result["reasoning"]}
        if len(said) > len(self.messages):  # not by /retry or /edit, which leave alone what waits for the next message
            self.attached = []
        self.messages, self.turns = [*said, answer], self.turns + 1
        known = f"; {result['cached_tokens']} known" if result.get("cached_tokens") else ""
        return (
            f"({'stopped; ' * stopped}prompt {turn.tokens}{known}; answer {result['generated_tokens']} tokens, "
            f"{result['seconds']:.1f} s)"
        )


__all__ = ["COMMANDS", "Chat", "Turn"]
