"""Two processes that train together, forked from this one because importing takes longest: once undisturbed, once with
one of them killed on the way, and then again from what is left. Prints what became of them."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

from modeling_omni.training import SFTArguments, load_arguments, train_sft


def train(rank: int, port: int, config: str) -> None:
    sys.stdout = sys.stderr
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    train_sft(load_arguments(SFTArguments, ["--config", config]))


def start(config: str) -> list:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=train, args=(rank, port, config)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    return ranks


def ended(ranks: list, seconds: float) -> list:
    """Exit codes; None for a process that still runs, which is then ended."""
    until = time.monotonic() + seconds
    codes = []
    for rank in ranks:
        rank.join(max(0.1, until - time.monotonic()))
        codes.append(rank.exitcode)
        if rank.exitcode is None:
            rank.kill()
    return codes


def main(whole: str, cut: str, folder: str) -> None:
    result = {"whole": ended(start(whole), 300)}
    ranks = start(cut)
    while not list(Path(folder).glob("step-*")) and all(rank.is_alive() for rank in ranks):
        time.sleep(0.01)
    os.kill(ranks[1].pid, signal.SIGKILL)
    result["lost"] = ended(ranks, 300)
    result["left"] = sorted(path.name for path in Path(folder).glob("step-*"))
    result["finished"] = (Path(folder) / "final").exists()
    result["again"] = ended(start(cut), 300)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
