"""Fuzzing: hostile and mutated media, prompts, rows and checkpoints through library, batch, server, demo and training.

    python -m modeling_omni.fuzzing --minutes 3 --seed 0

Every case is a function of (seed, number). A process of its own runs them on nano under a limit on memory; the parent
ends it when a case takes too long, notes what it died of, and starts it again behind that case. What counts as a
finding: any exception but `OmniInputError`, an answer of the server with status 500 or above, a row of a batch without
its line, placeholders that do not equal features, a case over its time, a process that dies. Findings are listed and
make the exit code 1; `--case NUMBER` runs one again.
"""

import argparse
import base64
import http.client
import json
import logging
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from queue import Empty, Queue

import numpy as np

from .fuzzing_corpus import (
    CHECKPOINTS,
    MEDIA,
    hostile_messages,
    hostile_parts,
    lying_rows,
    mutate,
    picture,
    sound,
)
from .limits import DemoLimits, MediaLimits, OmniInputError, ServerLimits, server_media_limits

PATHS = ("media", "prompt", "batch", "server", "checkpoint", "demo", "training")
SHARES = (0.58, 0.12, 0.06, 0.08, 0.02, 0.08, 0.06)  # of the cases
ENDINGS = {"image": ".png", "audio": ".wav", "video": ".mp4"}
KINDS = ("image", "audio", "video")


class Finding(Exception):
    """What must not happen has happened."""


class World:
    """Nano, its processor, a server on a free port, and the corpus."""

    def __init__(self, folder: Path, paths: tuple[str, ...] = PATHS):
        from .inference import load
        from .serving import Server, bind, uvicorn_server

        self.model, self.processor = load("nano")
        self.folder = folder
        self.limits = server_media_limits()
        self.limits.timeout = self.limits.total_timeout = 10.0
        self.limits_of_files = replace(self.limits, allow_paths=True)
        self.media = [
            (kind, name, data) for kind in KINDS for name, (data, _) in MEDIA[kind]().items() if len(data) < 200_000
        ]
        self.messages, self.rows = hostile_messages(), lying_rows()
        self.parts = [part for kind in KINDS for part in hostile_parts(kind)]
        (folder / "whole.png").write_bytes(picture())
        (folder / "sound.wav").write_bytes(sound())
        self.port = self.demo = None
        if "demo" in paths:
            from .demo import Demo

            (folder / "uploads").mkdir()
            limits = DemoLimits(media=self.limits_of_files)
            self.demo = Demo(self.model, self.processor, uploads=str(folder / "uploads"), limits=limits)
        if "server" in paths:
            limits = ServerLimits(max_new_tokens=4, max_body_bytes=4 * 1024**2, media=self.limits)
            self.server = Server(self.model, self.processor, "nano", limits)
            listener = bind("127.0.0.1", 0, None)
            self.port = listener.getsockname()[1]
            self.uvicorn = uvicorn_server(self.server)
            self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [listener]}, daemon=True)
            self.thread.start()
            while self.thread.is_alive() and not self.uvicorn.started:
                time.sleep(0.01)

    def close(self) -> None:
        if self.port is not None:
            self.uvicorn.should_exit = self.uvicorn.force_exit = True
            self.thread.join(30)
            self.server.close()
        if self.demo is not None:
            self.demo.close()


def draw(seed: int, number: int, paths: tuple[str, ...]) -> tuple[np.random.Generator, str]:
    """The generator of a case, and the path that it takes."""
    rng = np.random.default_rng([seed, number])
    shares = np.array([SHARES[PATHS.index(path)] for path in paths])
    return rng, paths[int(rng.choice(len(paths), p=shares / shares.sum()))]


def medium(world: World, rng: np.random.Generator) -> tuple[str, str, bytes]:
    """(kind it is read as, name, bytes): of the corpus, mostly mutated, now and then read as another kind."""
    kind, name, data = world.media[int(rng.integers(len(world.media)))]
    if rng.random() < 0.9:
        data = mutate(data, rng)
    if rng.random() < 0.1:
        kind = KINDS[int(rng.integers(3))]
    return kind, name, data


def media_case(world: World, rng: np.random.Generator) -> None:
    """One to three items and text around them, encoded under a budget: refused, or as many placeholders as features."""
    items = [medium(world, rng) for _ in range(int(rng.choice((1, 1, 1, 2, 3))))]
    parts = [{"type": kind, "bytes": data} for kind, _, data in items] + [{"type": "text", "text": "what?"}]
    budget = (None, 60, 400)[int(rng.integers(3))]
    rate = (0.0, 0.5)[int(rng.integers(2))]
    inputs = world.processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=True, return_tensors="pt", media_limits=world.limits,
        max_media_tokens=budget, video_pruning_rate=rate, num_frames=4,
    )  # fmt: skip
    check_inputs(world.processor, inputs, budget)


def check_inputs(processor, inputs: dict, budget: int | None = None) -> None:
    """Raises `Finding` where placeholders of any kind are not as many as the features that the towers make."""
    from .feature_extraction_omni import clip_token_count

    types = inputs["mm_token_type_ids"]
    merge = processor.image_processor.merge_size**2
    found = [int((types == kind).sum()) for kind in (1, 2, 3)]
    due = [int(inputs["image_grid_thw"].prod(-1).sum()) // merge if "image_grid_thw" in inputs else 0]
    if "video_keep_tokens" in inputs:
        due.append(int(inputs["video_keep_tokens"].sum()))
    else:
        due.append(int(inputs["video_grid_thw"].prod(-1).sum()) // merge if "video_grid_thw" in inputs else 0)
    masks = inputs.get("input_features_mask")
    due.append(0 if masks is None else int(clip_token_count(masks.sum(-1)).sum()))
    if found != due:
        raise Finding(f"placeholders {found}, features {due}")
    for name in ("pixel_values", "pixel_values_videos", "input_features"):
        if name in inputs and not bool(inputs[name].isfinite().all()):
            raise Finding(f"{name} is not finite")
    if budget is not None and sum(found) > max(budget, 0):
        raise Finding(f"{sum(found)} media tokens, budget {budget}")


def hostile_conversation(world: World, rng: np.random.Generator) -> list:
    messages = world.messages[int(rng.integers(len(world.messages)))]
    if rng.random() < 0.5:
        part = world.parts[int(rng.integers(len(world.parts)))]
        if rng.random() < 0.5:
            part = {"path": str(world.folder / "whole.png")} | part
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "a"}]}]
    return messages


def prompt_case(world: World, rng: np.random.Generator) -> None:
    """Encoding: the structure of a well-formed conversation does not depend on its text."""
    messages = hostile_conversation(world, rng)
    inputs = world.processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, enable_thinking=False, media_limits=MediaLimits(timeout=10)
    )
    opened = inputs["input_ids"][0].count(world.processor.codec.special_ids["<|im_start|>"])
    system = messages[0].get("role") in ("system", "developer")
    if opened != len(messages) + 1 + (not system):
        raise Finding(f"{opened} turns from {len(messages)} messages")


def batch_case(world: World, rng: np.random.Generator) -> None:
    """A file of rows: one line each, an answer or an input error."""
    from .batch_inference import run_batch

    rows: list = []
    for _ in range(4):
        kind, _, data = medium(world, rng)
        url = "data:;base64," + base64.b64encode(data).decode()
        content = [{"type": kind, "url": url}, {"type": "text", "text": "?"}]
        lying = {"messages": hostile_conversation(world, rng)}
        rows.append((lying, {"prompt": "?", kind: url}, {"messages": [{"role": "user", "content": content}]})[int(rng.integers(3))])  # fmt: skip # noqa: E501
    rows.append(world.rows[int(rng.integers(len(world.rows)))])
    source, out = world.folder / "rows.jsonl", world.folder / "out.jsonl"
    out.unlink(missing_ok=True)
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"media_limits": world.limits, "num_frames": 4, "max_media_tokens": 400}
    run_batch(world.model, world.processor, str(source), str(out), max_new_tokens=2, encode_options=options)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    if len(lines) != len(rows):
        raise Finding(f"{len(lines)} lines for {len(rows)} rows")
    strange = [line["error"] for line in lines if "error" in line and line["error"]["type"] != "input"]
    if strange:
        raise Finding(f"a row fails with {strange[0]}")


def server_case(world: World, rng: np.random.Generator) -> None:
    """A request: 200, or a status of 400 to 499 with a message; and the next plain one is answered."""
    content: list = [{"type": "text", "text": "?"}]
    for _ in range(int(rng.integers(0, 3))):
        kind, _, data = medium(world, rng)
        url = "data:;base64," + base64.b64encode(data).decode()
        content.insert(0, {"type": f"{kind}_url", f"{kind}_url": {"url": url}})
    body: object = {"model": "nano", "messages": [{"role": "user", "content": content}], "max_tokens": 2}
    if rng.random() < 0.4:
        body |= {"messages": hostile_conversation(world, rng)}
    if rng.random() < 0.2:
        body |= {"tools": world.rows[int(rng.integers(len(world.rows)))]}
    data = json.dumps(body).encode()
    if rng.random() < 0.3:
        data = mutate(data, rng)
    for sent, plain in ((data, False), (PLAIN, True)):
        status, answer = post(world.port, sent)
        if status >= 500 or (plain and status != 200):
            raise Finding(f"status {status}: {answer[:200]!r}")


PLAIN = json.dumps({"model": "nano", "messages": [{"role": "user", "content": "Copy: a"}], "max_tokens": 1}).encode()


def post(port: int, body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def checkpoint_case(world: World, rng: np.random.Generator) -> None:
    """A copy of nano, broken or mutated: refused, or a model."""
    from .configuration_omni import resolve_checkpoint
    from .inference import load

    folder = world.folder / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(resolve_checkpoint("nano"), folder, ignore=shutil.ignore_patterns("examples", "*.png"))
    names = sorted(path.name for path in folder.iterdir())
    if rng.random() < 0.5:
        path = folder / names[int(rng.integers(len(names)))]
        data = path.read_bytes()
        head = data[: 8 + int.from_bytes(data[:8], "little")] if path.suffix == ".safetensors" else data
        path.write_bytes(mutate(head, rng) + data[len(head) :])
        load(str(folder))
        return
    name = list(CHECKPOINTS)[int(rng.integers(len(CHECKPOINTS)))]
    CHECKPOINTS[name](folder)
    load(str(folder))
    raise Finding(f"{name} was loaded")


def demo_case(world: World, rng: np.random.Generator) -> None:
    """A message with uploaded files: an answer, or a problem that says neither nothing nor where the files lie."""
    files, text = [], ("?", "Copy: a", "")[int(rng.integers(3))]
    (world.demo.uploads / "0").mkdir(parents=True)
    for number in range(int(rng.integers(1, 4))):
        kind, _, data = medium(world, rng)
        files.append(world.demo.uploads / "0" / f"{number}{ENDINGS[kind]}")
        files[-1].write_bytes(data)
    settings = replace(
        world.demo.defaults, max_new_tokens=2, frames=(None, 4)[int(rng.integers(2))],
        max_patches=(None, 16)[int(rng.integers(2))], pruning_rate=(0.0, 0.5)[int(rng.integers(2))],
    )  # fmt: skip
    session = world.demo.session("fuzz")
    for _ in session.ask(text, [str(file) for file in files], settings):
        pass
    problem, answered = session.problem, session.last is not None
    session.clear()
    if problem is None and not answered:
        raise Finding("no answer and no problem")
    if (world.demo.uploads / "0").exists():
        raise Finding("files are left behind")
    if problem is not None and ("terminal" in problem or str(world.folder) in problem):
        raise Finding(f"the demo says {problem}")
    if problem is not None:
        raise OmniInputError(problem)


def training_case(world: World, rng: np.random.Generator) -> None:
    """A row of training data with its files: encoded, or left out."""
    from .data import Source, encode_row

    kind, _, data = medium(world, rng)
    (world.folder / "media").write_bytes(data)
    question = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": "?"}]}
    row = {"messages": [question, {"role": "assistant", "content": "a"}], f"{kind}s": ["media"]}
    if rng.random() < 0.3:
        row = world.rows[int(rng.integers(len(world.rows)))]
    (world.folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    source = Source({"path": str(world.folder / "train.jsonl")})
    sample = encode_row(source[0], world.processor, row_tokens=2000, media_limits=world.limits_of_files, num_frames=4)
    check_inputs(world.processor, sample)


CASES = {
    "media": media_case, "prompt": prompt_case, "batch": batch_case, "server": server_case,
    "checkpoint": checkpoint_case, "demo": demo_case, "training": training_case,
}  # fmt: skip


def run_case(world: World, seed: int, number: int, paths: tuple[str, ...] = PATHS) -> tuple[str, str, str | None]:
    """(path, "read" or "refused", what was found)."""
    rng, path = draw(seed, number, paths)
    try:
        CASES[path](world, rng)
        return path, "read", None
    except OmniInputError:
        return path, "refused", None
    except Finding as error:
        return path, "read", str(error)
    except Exception as error:
        import traceback

        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return path, "read", f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:300]}"


def work(options) -> None:
    """The process that runs cases: a line of JSON before each of them and one behind it."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    paths = tuple(options.paths.split(","))
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), paths)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if _has_proc() else 0
        most = used + int(options.memory_gb * 1024**3)
        if used:
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
        number = options.start
        while True:
            say({"begin": number, "path": draw(options.seed, number, paths)[1]})
            path, outcome, found = run_case(world, options.seed, number, paths)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            say({"end": number, "path": path, "outcome": outcome, "found": found, "peak_mb": peak})
            if options.case is not None:
                return
            number += 1


def _has_proc() -> bool:
    return Path("/proc/self/statm").exists()


def say(record: dict) -> None:
    sys.__stdout__.write(json.dumps(record) + "\n")
    sys.__stdout__.flush()


def fuzz(options) -> dict:
    """Runs cases until the time is over.

    Returns:
        {"cases", "outcomes": {"path outcome": count}, "slowest", "peak_mb", "findings": [{"number", "path", "what"}]}.
    """
    until = time.monotonic() + options.minutes * 60
    summary = {"cases": 0, "outcomes": Counter(), "slowest": (0.0, None), "peak_mb": 0, "findings": []}
    number = options.start if options.case is None else options.case
    while time.monotonic() < until:
        command = [sys.executable, "-m", "modeling_omni.fuzzing", "--worker", "--seed", str(options.seed)]
        command += ["--start", str(number), "--memory-gb", str(options.memory_gb), "--paths", options.paths]
        command += [] if options.case is None else ["--case", str(options.case)]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        lines: Queue = Queue()
        reader = threading.Thread(target=lambda w=worker, q=lines: ([q.put(line) for line in w.stdout], q.put(None)))
        reader.start()
        running, began = None, time.monotonic()
        try:
            while True:
                allowed = options.case_seconds if running else 600  # it has to load the model first
                try:
                    line = lines.get(timeout=max(0.05, began + allowed - time.monotonic()))
                except Empty:
                    if running:
                        summary["findings"].append(running | {"what": f"takes over {options.case_seconds:g} s"})
                    break
                if line is None:
                    if running or summary["cases"] == 0:
                        what = f"the process died (exit code {worker.wait()})"
                        summary["findings"].append((running or {"number": number, "path": "start"}) | {"what": what})
                    break
                record = json.loads(line)
                if "begin" in record:
                    running, began = {"number": record["begin"], "path": record["path"]}, time.monotonic()
                    continue
                summary["cases"] += 1
                summary["outcomes"][f"{record['path']} {record['outcome']}"] += 1
                summary["slowest"] = max(summary["slowest"], (round(time.monotonic() - began, 2), record["end"]))
                summary["peak_mb"] = max(summary["peak_mb"], record["peak_mb"])
                if record["found"]:
                    summary["findings"].append(running | {"what": record["found"]})
                number, running = record["end"] + 1, None
                if time.monotonic() > until or options.case is not None:
                    break
        finally:
            worker.kill()
            worker.wait()
            reader.join()
        if running:
            number = running["number"] + 1
        if options.case is not None or (summary["cases"] == 0 and summary["findings"]):
            break
    return summary


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_omni.fuzzing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="how long (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default: 0)")
    parser.add_argument("--start", type=int, default=0, help="number of the first case (default: 0)")
    parser.add_argument("--case", type=int, help="run this case alone")
    parser.add_argument("--paths", default=",".join(PATHS), help=f"any of {', '.join(PATHS)}, by commas (default: all)")
    parser.add_argument("--case-seconds", type=float, default=120.0, help="time of a case, at most (default: 120)")
    parser.add_argument("--memory-gb", type=float, default=6.0,
                        help="address space for cases beyond what the model takes (default: 6)")  # fmt: skip
    parser.add_argument("--out", help="JSON file for what was found")
    parser.add_argument("--worker", action="store_true", help="run cases in this process (the command starts it)")
    options = parser.parse_args(argv)
    unknown = set(options.paths.split(",")) - set(PATHS)
    if unknown:
        parser.error(f"unknown paths {', '.join(sorted(unknown))}; known: {', '.join(PATHS)}")
    if options.worker:
        options.start = options.start if options.case is None else options.case
        work(options)
        return 0
    summary = fuzz(options)
    text = json.dumps(summary | {"seed": options.seed}, indent=2)
    print(text)
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(text + "\n")
    return 1 if summary["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
