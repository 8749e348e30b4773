"""The demo without its page: sessions and limits; answers on their way are in demo_answers.py (`app.py` shows both).

One `Demo` holds the model behind a fair queue (serving_queue.py). Every browser tab has a `Session` of its own: what
was said, its files, its part of the store of conversations. Sessions know nothing of each other; when one ends, its
files and all that the model kept of it are deleted. Nothing here imports gradio.
"""

import contextlib
import logging
import mimetypes
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .chat import Chat
from .conversation import media_of
from .degrade import prompt_limit
from .demo_answers import NO_MEMORY, Running, Settings, check_settings, statistics_line
from .inference import default_max_new_tokens, default_thinking, encode, open_media
from .inference import user_message as checked_message
from .limits import DemoLimits, OmniInputError, is_out_of_memory
from .media_source import _printable
from .serving_queue import ServingQueue

logger = logging.getLogger(__name__)

EXAMPLES = Path(__file__).parent / "nano" / "examples"
MORE_KINDS = {".webp": "image", ".avif": "image", ".mkv": "video", ".webm": "video", ".flac": "audio", ".opus": "audio"}
PREFILL_CHUNK = 2048  # tokens of a prompt between two looks at the stop button


# ------------------------------------------------------------------------------------------------------ media


def media_kind(path: str) -> str:
    """ "image", "video" or "audio", by the name of a file; decoding tells whether that is true.

    Raises:
        OmniInputError: none of them.
    """
    kind = MORE_KINDS.get(Path(path).suffix.lower())
    kind = kind or (mimetypes.guess_type(path, strict=False)[0] or "").partition("/")[0]
    if kind not in ("image", "video", "audio"):
        name = os.path.basename(path)
        raise OmniInputError(
            f"{name[:80]}: not a picture, video or sound by its name; give a file like .png, .mp4, .wav"
        )
    return kind


def part_bytes(part: dict) -> int:
    """Memory of a decoded message part."""
    if part["type"] == "video":
        clip = part["video"]
        return clip.frames.nbytes + (0 if clip.audio is None else clip.audio.nbytes)
    return part["image"].nbytes if part["type"] == "image" else part["audio"][0].nbytes if "audio" in part else 0


# ------------------------------------------------------------------------------------------------------ sessions


@dataclass
class Exchange:
    """A message and its answer, as they are shown."""

    text: str
    files: list[str]
    running: Running | None = None  # None: it waits for its media to be decoded
    note: str = ""

    def shown(self) -> list[dict]:
        """Messages of a gradio Chatbot: every file, the text, the thought, the answer."""
        found = [{"role": "user", "content": {"path": path, "alt_text": os.path.basename(path)}} for path in self.files]
        found += [{"role": "user", "content": self.text}] * bool(self.text)
        if self.running is None:
            return found
        thought, answer = self.running.texts["reasoning"], self.running.texts["answer"]
        if thought or self.running.thinking:
            about = {"title": "Thinking", "status": "pending" if self.running.thinking else "done"}
            if self.running.thought_seconds is not None:
                about["duration"] = round(self.running.thought_seconds, 2)
            found.append({"role": "assistant", "content": thought, "metadata": about})
        if answer or self.running.finish_reason is not None:
            found.append({"role": "assistant", "content": answer or "(no answer)"})
        return found


class Session:
    """One conversation of one browser tab.

    Attributes:
        exchanges: what was said. draft: {"text", "files"} of a message that got no answer, to be given back.
        problem: why, or None.
    """

    def __init__(self, demo: "Demo", key: str):
        self.demo, self.key, self.touched = demo, key, time.monotonic()
        self.chat = Chat(demo.model, demo.processor, cache=demo.queue.conversations)
        self.exchanges: list[Exchange] = []
        self.opened: dict[tuple, dict] = {}  # (path, frames, sound) -> decoded part of the message being written
        self.files: set[str] = set()
        self.running: Running | None = None
        self.busy = threading.Lock()  # held while a message is answered
        self.halted = threading.Event()  # somebody has pressed stop, maybe before the model was reached
        self.draft, self.problem, self.closed = None, None, False
        self.last: tuple[list[dict], Settings, dict[bytes, torch.Tensor]] | None = None  # what the model read last

    # ---------------------------------------------------------------------------------------- the page

    def shown(self) -> list[dict]:
        return [message for exchange in self.exchanges for message in exchange.shown()]

    @property
    def note(self) -> str:
        """What is to be said about the last message."""
        if self.draft is not None:
            return "Stopped before the first word; the message was not sent."
        return self.exchanges[-1].note if self.exchanges else ""

    def exchange_of(self, index: int) -> int:
        """Number of the exchange that the message at `index` of `shown` belongs to."""
        for number, exchange in enumerate(self.exchanges):
            index -= len(exchange.shown())
            if index < 0:
                return number
        raise OmniInputError("that message is not there any more")

    # ---------------------------------------------------------------------------------------- messages

    def message(self, text: str, files: list[str], settings: Settings, question: bool = True) -> dict:
        """A user's turn with its media decoded, each file once while it stays attached.

        Args:
            question: whether it must ask something.
        """
        limits, files = self.demo.limits, [self.demo.own_file(self, path) for path in files]  # all are known, and go
        check_settings(settings, limits)
        if len(text) > limits.characters:
            raise OmniInputError(f"the text has {len(text):,} characters; the limit is {limits.characters:,}")
        if len(files) > limits.files:
            raise OmniInputError(f"{len(files)} files are attached; the limit is {limits.files} a message")
        parts, opened = [], {}
        for path in files:
            key = (path, settings.frames, settings.sound)
            part = opened[key] = opened.get(key) or self.opened.get(key) or self.open(*key)
            if sum(map(part_bytes, opened.values())) > limits.media.max_decoded_bytes:
                limit = f"{limits.media.max_decoded_bytes:,} bytes (MediaLimits.max_decoded_bytes)"
                raise OmniInputError(f"the media of this message are too large when decoded; limit {limit}; send fewer")
            held = self.decoded_bytes(opened) + sum(other.decoded_bytes() for other in self.demo.others(self))
            if held > limits.decoded_bytes:
                limit = f"{limits.decoded_bytes:,} bytes (DemoLimits.decoded_bytes)"
                raise OmniInputError(f"all that is open here holds too much media; limit {limit}; send fewer, or later")
            capped = settings.max_patches is not None and part["type"] != "audio"
            parts.append(part | ({"max_patches": settings.max_patches} if capped else {}))
        self.opened = opened
        if question:
            return checked_message(text, parts)
        return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}

    def decoded_bytes(self, opened: dict[tuple, dict] | None = None) -> int:
        """Memory of what was said and of the message being written, or of other parts in its place."""
        said = [part for message in self.chat.messages for part in message["content"] if isinstance(part, dict)]
        return sum(map(part_bytes, [*said, *(self.opened if opened is None else opened).values()]))

    def open(self, path: str, frames: int | None, sound: bool) -> dict:
        """A decoded file as a part of a message."""
        media = self.demo.limits.media
        try:
            with self.demo.decoding:
                return open_media(media_kind(path), path, frames, None, "auto" if sound else "off", media)
        except OmniInputError as error:  # nobody needs to know where files lie
            raise OmniInputError(str(error).replace(_printable(path), os.path.basename(path)[:80])) from error

    def count(self, text: str, files: list[str], settings: Settings) -> dict[str, int]:
        """Tokens that a message would cost: {"text", "image", "video", "audio", "total"} of its own, "prompt" with all
        that was said before, and "limit" of the prompt."""
        before = [{"role": "system", "content": settings.system}] * bool(settings.system) + self.chat.messages
        message = self.message(text, files, settings, question=False)
        options = self.demo.options(settings)
        options |= {"enable_thinking": settings.thinking, "add_generation_prompt": True}
        after = self.demo.processor.count_tokens([*before, message], **options)
        empty = self.demo.processor.count_tokens([*before, {"role": "user", "content": ""}], **options)
        own = {kind: after[kind] - empty[kind] for kind in after}
        return own | {"prompt": after["total"], "limit": prompt_limit(self.demo.model, settings.max_new_tokens)}

    def ask(self, text: str, files: list[str], settings: Settings, at: int | None = None) -> Iterator[None]:
        """Answers a message, in place of the exchanges from number `at` on; yields whenever there is more to show.

        A message that gets no token of an answer leaves the conversation as it was; it is then in `draft`.
        """
        self.hold()
        text = text.encode("utf-8", "replace").decode()  # half a character could not be sent back to the page
        kept, said = self.exchanges, self.chat.messages
        at = len(kept) if at is None else at
        exchange, done = Exchange(text, list(files)), False
        try:
            self.draft = self.problem = None
            if at >= self.demo.limits.turns:
                raise OmniInputError(f"this conversation has {at} messages, which is the limit; clear it to go on")
            self.exchanges = [*kept[:at], exchange]
            yield
            message = self.message(text, files, settings)
            turn = self.prepare([*said[: 2 * at], message], settings)
            exchange.running = self.running = self.start(turn.inputs, settings, self.key)
            lowered = "".join(f"\n{note}" for note in turn.notes if note.startswith("lowered"))
            exchange.note = lowered.strip()
            for _ in self.running.wait():
                yield
            done = self.running.tokens > 0
            if done:
                self.chat.messages = said[: 2 * at]
                numbers = self.running.statistics()
                result = {"generated_tokens": numbers["tokens"], "seconds": 0.0, **numbers, **self.running.texts}
                self.chat.answered(turn, result)
                exchange.note = statistics_line(numbers) + lowered
                if self.running.note:
                    exchange.note += f"\n{self.running.note}"
                self.last = turn.messages, settings, self.kept_tokens(turn.inputs)
        except OmniInputError as error:
            self.problem = str(error)
        except Exception as error:
            logger.exception("a message failed")
            self.problem = NO_MEMORY if is_out_of_memory(error) else "something went wrong; see the demo's terminal"
        finally:
            if self.running is not None:
                self.running.stop()
            if not done:
                self.exchanges, self.chat.messages = kept, said
                self.draft = {"text": text, "files": list(files)}
            self.running, self.opened = None, {}
            self.busy.release()
        yield

    def start(self, inputs: dict, settings: Settings, scope: str) -> Running:
        running = Running(self.demo, inputs, settings, scope)
        if self.halted.is_set():
            running.stop()
        return running

    def prepare(self, messages: list[dict], settings: Settings):
        """`Chat.prepare` with these settings."""
        chat = self.chat
        chat.system, chat.thinking = settings.system or None, settings.thinking
        chat.max_new_tokens, chat.prompt = settings.max_new_tokens, self.demo.options(settings)
        with self.demo.decoding:
            return chat.prepare(messages)

    def kept_tokens(self, inputs: dict) -> dict[bytes, torch.Tensor]:
        """Which tokens EVS has kept, by content of the video."""
        features, found = self.demo.queue.conversations.features, {}
        for medium in media_of(inputs, self.demo.model.config.merge_size) if "video_keep_tokens" in inputs else ():
            known = features.get((self.key, medium.digest))
            if known is not None and known[1] is not None:
                found[medium.digest] = known[1]
        return found

    def seen(self) -> tuple[list[dict], dict, dict[bytes, torch.Tensor]] | None:
        """Messages, model inputs and kept tokens of the last answered prompt; the inputs are made anew."""
        if self.last is None:
            return None
        messages, settings, kept = self.last
        with self.demo.decoding:
            options = self.demo.options(settings)
            inputs = encode(self.demo.model, self.demo.processor, messages, settings.thinking, device="cpu", **options)
        return messages, inputs, kept

    def retry(self, index: int, settings: Settings) -> Iterator[None]:
        number = self.exchange_of(index)
        exchange = self.exchanges[number]
        return self.ask(exchange.text, exchange.files, settings, number)

    def edit(self, index: int, text: str, settings: Settings) -> Iterator[None]:
        """Asks another text in place of the one at `index`; its files stay, what came after it goes."""
        number = self.exchange_of(index)
        return self.ask(text, self.exchanges[number].files, settings, number)

    def undo(self, index: int) -> dict:
        """Takes the message at `index` and all after it back; {"text", "files"} of it."""
        self.hold()
        try:
            number = self.exchange_of(index)
            taken, self.problem = self.exchanges[number], None
            self.exchanges, self.chat.messages = self.exchanges[:number], self.chat.messages[: 2 * number]
        finally:
            self.busy.release()
        return {"text": taken.text, "files": taken.files}

    def stop(self) -> None:
        self.halted.set()
        if self.running is not None:
            self.running.stop()

    def hold(self) -> None:
        """Takes `busy`, once the answer that runs has stopped.

        Raises:
            OmniInputError: it does not stop.
        """
        self.stop()
        if not self.busy.acquire(timeout=30):
            raise OmniInputError("the last answer has not stopped yet; try again")
        self.halted.clear()

    def clear(self) -> None:
        """Forgets what was said and deletes the files of it; those that wait in the text box stay."""
        self.hold()
        try:
            self.exchanges, self.chat.messages, self.last = [], [], None
            self.draft = self.problem = None
            self.demo.release(self, {path for path, *_ in self.opened})
            self.demo.queue.forget(self.key)
        finally:
            self.busy.release()


class Demo:
    """A model and those who talk to it.

    Args:
        name: of the model, as shown. uploads: the folder in which the page's files lie.
    """

    def __init__(
        self, model, processor, name: str = "nano", uploads: str | None = None, limits: DemoLimits | None = None
    ):
        self.model, self.processor, self.name = model, processor, name
        self.limits = limits or DemoLimits()
        self.uploads = Path(uploads).resolve() if uploads else None
        self.queue = ServingQueue(
            model, processor, self.limits.batch, max_waiting=self.limits.waiting, prefill_chunk_size=PREFILL_CHUNK,
            cache_bytes=self.limits.cache_bytes,
        )  # fmt: skip
        self.decoding = threading.Semaphore(self.limits.decoders)
        self.sessions: OrderedDict[str, Session] = OrderedDict()
        self.lock = threading.RLock()

    @property
    def defaults(self) -> Settings:
        """What the checkpoint says."""
        config = self.model.generation_config
        budget = getattr(config, "reasoning_budget", None)
        sampled = bool(config.do_sample)
        return Settings(
            thinking=default_thinking(self.model),
            reasoning_budget=-1 if budget is None else min(budget, self.limits.new_tokens),
            max_new_tokens=min(default_max_new_tokens(self.model), self.limits.new_tokens),
            temperature=float(config.temperature or 1.0) if sampled else 0.0,
            top_p=float(config.top_p or 1.0) if sampled else 1.0,
            pruning_rate=self.processor.video_pruning_rate,
        )

    def options(self, settings: Settings) -> dict:
        """Options of `encode`."""
        return {"video_pruning_rate": settings.pruning_rate, "media_limits": self.limits.media}

    def session(self, key: str) -> Session:
        """The session of that name, new if it is not there; others that are idle or too many go.

        Raises:
            OmniInputError: all sessions are busy.
        """
        with self.lock:
            now, found = time.monotonic(), self.sessions.get(key)
            for other in list(self.sessions.values()):
                full = found is None and len(self.sessions) >= self.limits.sessions
                if other is not found and not other.busy.locked():
                    if full or now - other.touched > self.limits.idle_seconds:
                        self.close_session(other.key)
            if found is None:
                if len(self.sessions) >= self.limits.sessions:
                    raise OmniInputError("too many people are here; try again in a minute")
                found = self.sessions[key] = Session(self, key)
            found.touched = now
            self.sessions.move_to_end(key)
            return found

    def others(self, session: Session) -> list[Session]:
        with self.lock:
            return [other for other in self.sessions.values() if other is not session]

    def close_session(self, key: str) -> None:
        """Ends a session: its answer stops, its files and what the model kept of it are deleted."""
        with self.lock:
            session = self.sessions.pop(key, None)
            if session is None:
                return
            session.closed = True
            session.stop()
            self.release(session)
            self.queue.forget(key)

    def own_file(self, session: Session, path: str) -> str:
        """A path that a message may name: a file that was uploaded, or a shipped example."""
        real = Path(path).resolve()
        roots = [EXAMPLES.resolve()] + ([self.uploads] if self.uploads else [])
        if not any(real.is_relative_to(root) for root in roots) or not real.is_file():
            raise OmniInputError(f"{os.path.basename(path)[:80]}: this file is not here any more; attach it again")
        with self.lock:
            if self.uploads and real.is_relative_to(self.uploads) and not session.closed:
                session.files.add(str(real))
        return str(real)

    def release(self, session: Session, kept: frozenset | set = frozenset()) -> None:
        """Deletes the files of a session, but for `kept` and those that another has too (equal files share a path)."""
        with self.lock:
            files, session.files = session.files, session.files & kept
            for path in files - kept:
                if not any(path in other.files for other in self.others(session)):
                    with contextlib.suppress(OSError):
                        os.unlink(path)
                    with contextlib.suppress(OSError):
                        os.rmdir(os.path.dirname(path))

    def compare(
        self, session: Session, text: str, files: list[str], choices: tuple[Settings, Settings]
    ) -> Iterator[list[Exchange]]:
        """One question under two settings, one after the other so that times can be compared, without what was said
        before; yields both sides whenever there is more to show.

        Raises:
            OmniInputError: the question cannot be asked.
        """
        session.hold()
        sides = [Exchange("", []), Exchange("", [])]
        scopes = [f"{session.key}/{side}" for side in "ab"]
        try:
            for side, settings, scope in zip(sides, choices, scopes):
                message = session.message(text, files, settings)
                turn = session.prepare([message], settings)
                side.running = session.running = session.start(turn.inputs, settings, scope)
                for _ in side.running.wait():
                    yield sides
                side.note = statistics_line(side.running.statistics())
                if side.running.asked_to_stop:
                    break
            yield sides
        finally:
            if session.running is not None:
                session.running.stop()
            session.running, session.opened = None, {}
            session.busy.release()
            for scope in scopes:
                self.queue.forget(scope)

    def close(self) -> None:
        for key in list(self.sessions):
            self.close_session(key)
        self.queue.close()


def count_line(counts: dict[str, int]) -> str:
    """`Session.count` for people."""
    kinds = " + ".join(f"{counts[kind]:,} {kind}" for kind in ("text", "image", "video", "audio") if counts[kind])
    line = f"This message: {counts['total']:,} tokens" + (f" = {kinds}" if " + " in kinds else "")
    line += f". Prompt: {counts['prompt']:,} of {counts['limit']:,}."
    if counts["prompt"] > counts["limit"]:
        line += " Too long: videos lose frames and pictures pixels to fit."
    return line


__all__ = ["Demo", "Exchange", "Running", "Session", "Settings", "count_line", "statistics_line"]
