"""A tiny policy on disk, media files and rows for tests of MPO and GSPO; training in processes that can be killed."""

import json
import multiprocessing
import os
import signal
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_model import tiny_model

from modeling_omni.modeling_audio import OmniAudioModel
from modeling_omni.modeling_vision import OmniVisionModel
from modeling_omni.processing_omni import OmniProcessor

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30)}
PARTS = {
    "image": [{"type": "image", "path": name} for name in ("red.png", "blue.png", "green.png")],
    "video": [{"type": "video", "path": name} for name in ("rise.mp4", "fall.mp4")],
    "audio": [{"type": "audio", "path": name} for name in ("low.wav", "high.wav")],
    "text": [{"type": "text", "text": text} for text in ("one", "two")],
}


def save_policy(folder: Path, **changes) -> Path:
    model = tiny_model(vocab_size=512, mels=80, **changes)
    model.save_pretrained(folder)
    OmniProcessor.from_pretrained("nano").save_pretrained(folder)
    return folder


def write_media(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        Image.fromarray(np.tile(np.uint8(colour), (64, 64, 1))).save(folder / f"{name}.png")
    for name, hertz in (("low", 200), ("high", 3000)):
        wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(8000) / 16000) + 0.01 * rng.normal(size=8000)
        soundfile.write(folder / f"{name}.wav", wave.astype(np.float32), 16000)
    for name, levels in (("rise", range(0, 240, 60)), ("fall", range(240, 0, -60))):
        with av.open(str(folder / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=2)
            stream.width = stream.height = 64
            stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 2)
            for level in levels:
                frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))


def stage_values(folder: Path, name: str, rows: str) -> dict:
    """Settings of a small stage from `folder/start` on a file of rows."""
    values = {"output_dir": str(folder / name), "model": str(folder / "start"), "data": [{"path": str(folder / rows)}]}
    return values | {"steps": 4, "save_every": 2, "learning_rate": 1e-3, "bf16": False}


def prompt(kind: str, number: int) -> list[dict]:
    parts = PARTS[kind]
    return [{"role": "user", "content": [parts[number % len(parts)], {"type": "text", "text": " What is it?"}]}]


def write_rows(file: Path, rows: list[dict]) -> list[dict]:
    """Writes the rows; returns `data`, the sources."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [{"path": str(file)}]


def log_lines(folder: Path, key: str = "loss") -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / "adapter_model.safetensors"
    return load_file(file if file.exists() else folder / "model.safetensors")


class TowerCalls:
    """Counts the passes of the towers: `with TowerCalls() as calls`, then calls.vision, calls.audio."""

    def __enter__(self):
        self.vision = self.audio = 0
        self.kept = OmniVisionModel.forward, OmniAudioModel.forward

        def counted(name, forward):
            def run(*args, **kwargs):
                setattr(self, name, getattr(self, name) + 1)
                return forward(*args, **kwargs)

            return run

        OmniVisionModel.forward, OmniAudioModel.forward = map(counted, ("vision", "audio"), self.kept)
        return self

    def __exit__(self, *_):
        OmniVisionModel.forward, OmniAudioModel.forward = self.kept


# processes that have the imports already, and no threads that a fork would break
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["modeling_omni.mpo", "modeling_omni.gspo", "torch.utils.tensorboard"])


def run(work, args: tuple, environment: dict[str, str], threads: int) -> None:
    os.environ.update(environment)
    torch.set_num_threads(threads)  # as here: sums of more threads differ in the last bit
    work(*args)


def started(work, *args, **environment: str):
    process = PROCESSES.Process(target=run, args=(work, args, environment, torch.get_num_threads()))
    process.start()
    return process


def kill_when(path: Path, work, *args) -> None:
    """Runs `work` in another process and SIGKILLs it as soon as the path is there."""
    process, deadline = started(work, *args), time.time() + 600
    while not path.exists():
        assert process.is_alive() and time.time() < deadline, "it never came there"
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def two_processes(work, *args) -> None:
    """Runs `work` in two gloo processes."""
    base = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [started(work, *args, RANK=str(rank), LOCAL_RANK=str(rank), **base) for rank in range(2)]
    for process in ranks:
        process.join(900)
        assert process.exitcode == 0


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
