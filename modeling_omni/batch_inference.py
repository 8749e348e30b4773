"""Many prompts from a JSONL file, answers into another: any mix of media, batched by tokens, resumable.

Every row of the input gets exactly one line of output, a result or an error. A line is written and synced to the disk
before the next batch begins, so a kill costs the batch that ran; started again, the tool goes on behind it. A batch
that fails (too little memory, say) is tried again in halves.

Rows: {"messages": [...]} as everywhere in this project, or {"prompt": "...", "image": ..., "video": ..., "audio": ...}
with a path, a data: URL or a list of them, in the prompt in the order of the keys and before its text. Optional: "id"
(text or a number; else the row's number, counted from 0), "tools", and "meta", which is handed through. Paths start at
the folder of the file.
"""

import contextlib
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from .data import JsonlRows
from .data_adapters import adapt_row
from .degrade import prompt_limit
from .generation_rows import Row, generate_or_split, row_settings, row_text
from .inference import KINDS, default_max_new_tokens, encode_fitting, token_counts
from .media import OmniInputError

BATCH_TOKENS = 32_768
BATCH_SIZE = 32
KEYS = ("id", "messages", "prompt", "tools", "meta", *KINDS, *(f"{kind}s" for kind in KINDS))


@dataclass(eq=False)
class Prepared:
    """A row of the file on its way: either `row` or `error`."""

    key: str
    about: dict  # "id", "meta" where the row has it, "degraded" where media were lowered
    row: Row | None = None
    tokens: dict | None = None
    error: Exception | None = None


def row_key(value) -> str:
    """What an id is known by: 3 and "3" are two ids."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise OmniInputError(f"'id' must be text or a whole number, not {value!r:.60}")
    return json.dumps(value)


def row_keys(rows: JsonlRows) -> list[str]:
    """The key of every row; rows that cannot be read are known by their number.

    Raises:
        OmniInputError: two rows with one id, which could not be told apart in the results.
    """
    keys, seen = [], {}
    for number in range(len(rows)):
        try:
            row = rows[number]
            key = row_key(row["id"] if isinstance(row, dict) and row.get("id") is not None else number)
        except (OmniInputError, RecursionError):
            key = row_key(number)
        if key in seen:
            raise OmniInputError(f"{rows.path}: rows {seen[key]} and {number} (from 0) have the same id {key}")
        seen[key] = number
        keys.append(key)
    return keys


def read_results(path: str) -> tuple[int, dict[str, bool]]:
    """Bytes of the whole lines of a results file, and for every id in it whether it is a result (else an error).

    A last line that a kill has torn does not count.

    Raises:
        OmniInputError: it holds something else.
    """
    whole, found = 0, {}
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            try:
                record = json.loads(line)
                key = row_key(record["id"])
                if "error" not in record and "answer" not in record:
                    raise KeyError("answer")
            except (ValueError, KeyError, TypeError):
                if not line.endswith(b"\n"):
                    break  # it can only be the last
                raise OmniInputError(
                    f"{path}: line {number + 1} is no result of this tool; give another --out"
                ) from None
            if not line.endswith(b"\n"):
                break  # whole, but for its end: generated again rather than trusted
            whole += len(line)
            found[key] = "error" not in record
    return whole, found


class Results:
    """The output file: one process at a time, appended to, synced after every batch."""

    def __init__(self, path: str, retry_errors: bool = False):
        self.path = path
        if os.path.exists(path) and not os.path.isfile(path):
            raise OmniInputError(f"--out {path}: is not a regular file; give the path of a .jsonl file")
        try:
            self._open()
            whole, found = read_results(path)
            self.file.truncate(whole)
            if retry_errors and not all(found.values()):
                self._without_errors()
                whole, found = read_results(path)
            self.file.seek(0, os.SEEK_END)
        except OSError as error:
            raise OmniInputError(f"--out {path}: cannot be written ({error.strerror})") from error
        self.done = found

    def _open(self) -> None:
        self.file = open(self.path, "ab")
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise OmniInputError(f"--out {self.path}: another process is writing it") from None

    def _without_errors(self) -> None:
        kept = f"{self.path}.kept"
        with open(self.path, "rb") as old, open(kept, "wb") as new:
            new.writelines(line for line in old if "error" not in json.loads(line))
            new.flush()
            os.fsync(new.fileno())
        os.replace(kept, self.path)
        self.file.close()
        self._open()

    def write(self, records: list[dict]) -> None:
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        try:
            self.file.write("".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace"))
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise OmniInputError(
                f"--out {self.path}: cannot be written ({error.strerror or error}); free the disk and start the same "
                "command again: it goes on behind the last whole line"
            ) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a full disk, which `write` has told
            self.file.close()


def request_of(
    row: dict, folder: Path, system: str | None = None, video_sound: str = "auto"
) -> tuple[list[dict], list | None]:
    """Messages and tools of a row of the input file, paths resolved.

    Args:
        video_sound: "auto", "on" or "off", for video parts that do not say it under "audio".

    Raises:
        OmniInputError: keys that are not known, no prompt, a conversation that ends with an answer.
    """
    if not isinstance(row, dict):
        raise OmniInputError(f"a JSON object is needed, not {type(row).__name__}")
    unknown = [key for key in row if key not in KEYS]
    if unknown:
        raise OmniInputError(f"unknown keys {', '.join(map(repr, unknown[:5]))}; known: {', '.join(KEYS)}; "
                             "what belongs to the row but not to the prompt goes under 'meta'")  # fmt: skip
    if ("prompt" in row) == ("messages" in row):
        raise OmniInputError("a row needs either 'messages' or 'prompt'")
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise OmniInputError(f"'prompt' must be text, not {type(row['prompt']).__name__}")
        parts = []
        for key, value in row.items():
            kind = key.removesuffix("s")
            if kind in KINDS and value is not None:
                parts += [{"type": kind, kind: item} for item in (value if isinstance(value, list) else [value])]
        parts += [{"type": "text", "text": row["prompt"]}] * bool(row["prompt"])
        if not parts:
            raise OmniInputError("'prompt' is empty and there are no media")
        row = {"messages": [{"role": "user", "content": parts}], "tools": row.get("tools")}
    request = adapt_row(row, "messages", folder=folder)
    messages = request["messages"]
    if not messages:
        raise OmniInputError("'messages' is empty")
    if messages[-1].get("role") == "assistant":
        raise OmniInputError("the messages end with the assistant's; end them with the question")
    for message in messages:
        for part in message["content"] if isinstance(message.get("content"), list) else ():
            if isinstance(part, dict) and str(part.get("type")).removesuffix("_url") == "video":
                part.setdefault("audio", video_sound)
    if system and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages, request.get("tools")


def batches_of(rows: list[Prepared], batch_tokens: int, batch_size: int) -> Iterator[list[Prepared]]:
    """Rows of like length together: rows x (longest prompt + longest answer) <= batch_tokens, or one row alone."""
    batch, longest, new = [], 0, 0
    for item in sorted(rows, key=lambda item: item.row.prompt_tokens, reverse=True):
        longest_now = max(longest, item.row.prompt_tokens)
        new_now = max(new, item.row.max_new_tokens)
        if batch and (len(batch) == batch_size or (len(batch) + 1) * (longest_now + new_now) > batch_tokens):
            yield batch
            batch, longest_now, new_now = [], item.row.prompt_tokens, item.row.max_new_tokens
        batch.append(item)
        longest, new = longest_now, new_now
    if batch:
        yield batch


def seed_of(seed: int | None, key: str) -> int | None:
    """Each row's own seed, so that a sampled answer does not depend on the batch nor on a restart."""
    return None if seed is None else int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:7], "big")


def run_batch(
    model,
    processor,
    source: str,
    out: str,
    batch_tokens: int = BATCH_TOKENS,
    batch_size: int = BATCH_SIZE,
    workers: int = 2,
    retry_errors: bool = False,
    progress: bool = False,
    system: str | None = None,
    thinking: bool | None = None,
    seed: int | None = None,
    max_new_tokens: int | None = None,
    prefill_chunk_size: int | None = None,
    video_sound: str = "auto",
    max_prompt_tokens: int | None = None,
    encode_options: dict | None = None,
    request: Callable[..., tuple[list[dict], list | None]] = request_of,
    describe: Callable[[dict], dict] | None = None,
    numbers: list[int] | None = None,
    **settings,
) -> dict:
    """Answers every row of `source` that has no line in `out` yet.

    Args:
        source, out: JSONL files, see above. `out` may exist: it is appended to.
        batch_tokens: prompt and new tokens of a batch, padding included, at most; one row alone may have more.
        workers: threads that decode media and encode prompts ahead of the model.
        retry_errors: rows with an error so far are tried again, and their old lines removed.
        thinking: None takes the checkpoint's default. system: for rows without a system message.
        video_sound: of `request_of`.
        max_prompt_tokens: of `prompt_limit`; pictures and videos of longer prompts are lowered, which the row's result
            tells under "degraded".
        encode_options: of `encode` and `apply_chat_template`. settings: of `row_settings`.
        request: what reads a row, in place of `request_of`, with its arguments and its result.
        describe: encoded inputs -> what else the row's line says.
        numbers: the rows to answer, by number; None: all.

    Returns:
        {"rows", "done_before", "answered", "errors", "batches", "prompt_tokens", "generated_tokens", "seconds"}.

    Raises:
        OmniInputError: files that cannot be read or written, rows with the same id, a file of something else.
    """
    started = time.monotonic()
    try:
        rows = JsonlRows(source)
    except OSError as error:
        raise OmniInputError(f"--in {source}: cannot be read ({error.strerror})") from error
    keys = row_keys(rows)
    if os.path.exists(out) and os.path.samefile(source, out):
        raise OmniInputError("--in and --out are the same file")
    limit = max_new_tokens or default_max_new_tokens(model)
    folder = Path(source).absolute().parent

    def prepare(number: int) -> Prepared:
        item = Prepared(keys[number], {"id": json.loads(keys[number])})
        try:
            try:
                content = rows[number]
            except RecursionError:
                raise OmniInputError("not JSON (nested too deeply)") from None
            if isinstance(content, dict) and "meta" in content:
                item.about["meta"] = content["meta"]
            if isinstance(content, dict) and content.get("id") is not None:
                row_key(content["id"])  # an id that cannot be one is not replaced silently
            messages, tools = request(content, folder, system, video_sound)
            inputs, _, lowered = encode_fitting(
                model, processor, messages, prompt_limit(model, limit, max_prompt_tokens), thinking, device="cpu",
                tools=tools, **(encode_options or {}),
            )  # fmt: skip
            item.about |= {"degraded": lowered} if lowered else {}
            if describe is not None:
                item.about |= describe(inputs)
            own = row_settings(model, limit, seed=seed_of(seed, item.key), **settings)[0]
            item.row = Row(inputs, **own)
            item.tokens = token_counts(inputs)
        except Exception as error:  # whatever it is, it is this row's
            item.error = error
        return item

    results = Results(out, retry_errors)
    asked = range(len(keys)) if numbers is None else numbers
    pending = deque(number for number in asked if keys[number] not in results.done)
    summary = {"rows": len(asked), "done_before": len(asked) - len(pending), "answered": 0, "errors": 0, "batches": 0}
    summary |= {"prompt_tokens": 0, "generated_tokens": 0}

    def finish(items: list[Prepared], bar) -> None:
        records = []
        for item in items:
            error = item.error or item.row.error
            if error is not None:
                kind = "input" if isinstance(error, OmniInputError) else type(error).__name__
                records.append(item.about | {"error": {"type": kind, "message": " ".join(str(error).split())[:2000]}})
                summary["errors"] += 1
                continue
            record = item.about | row_text(processor, item.row) | {"finish_reason": item.row.finish_reason}
            if item.row.budget is not None:
                record["thought_cut"] = item.row.thought_cut
            records.append(record | {"tokens": item.tokens, "generated_tokens": len(item.row.tokens)})
            summary["answered"] += 1
            summary["prompt_tokens"] += item.row.prompt_tokens
            summary["generated_tokens"] += len(item.row.tokens)
        results.write(records)
        bar.update(len(records))

    bar = tqdm(total=len(asked), initial=summary["done_before"], unit="row", disable=not progress)
    pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="prepare")
    ahead: deque[Future] = deque()
    try:
        while pending or ahead:
            window, cost = [], 0
            while (pending or ahead) and len(window) < 2 * batch_size and cost < 2 * batch_tokens:
                while pending and len(ahead) < batch_size:
                    ahead.append(pool.submit(prepare, pending.popleft()))
                item = ahead.popleft().result()
                if item.error is not None:
                    finish([item], bar)
                    continue
                window.append(item)
                cost += item.row.prompt_tokens + item.row.max_new_tokens
            for batch in batches_of(window, batch_tokens, batch_size):
                generate_or_split(model, processor, [item.row for item in batch], prefill_chunk_size)
                summary["batches"] += 1
                finish(batch, bar)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        bar.close()
        results.close()
    return summary | {"seconds": round(time.monotonic() - started, 3)}


__all__ = ["run_batch"]
