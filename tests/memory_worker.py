"""A server with little memory left: a plain request, one that needs far more than there is, and a plain one again."""

import json
import resource
import threading
import time
from pathlib import Path

from modeling_omni.fuzzing import post
from modeling_omni.inference import load
from modeling_omni.limits import ServerLimits
from modeling_omni.serving import Server, bind, uvicorn_server

HEADROOM = 400 * 1024**2


def body(text: str) -> bytes:
    return json.dumps({"model": "nano", "messages": [{"role": "user", "content": text}], "max_tokens": 2}).encode()


def main() -> None:
    model, processor = load("nano")
    server = Server(model, processor, "nano", ServerLimits(context=10**6))
    listener = bind("127.0.0.1", 0, None)
    port, uvicorn = listener.getsockname()[1], uvicorn_server(server)
    threading.Thread(target=uvicorn.run, kwargs={"sockets": [listener]}, daemon=True).start()
    while not uvicorn.started:
        time.sleep(0.01)
    answers = [post(port, body("Copy: a"))]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))
    answers += [post(port, body("word " * 150_000)), post(port, body("Copy: a"))]
    print(json.dumps([[status, json.loads(answer)] for status, answer in answers]), flush=True)


if __name__ == "__main__":
    main()
