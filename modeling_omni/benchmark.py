"""Speed and memory of every phase, ours beside transformers' native classes and llama.cpp: one table.

    python -m modeling_omni.benchmark [--phases prefill,decode] [--threads 1,2] [--device cuda] [--out FILE.json]

Rules: peers take turns in one process; shown are the minimum and the median of the repetitions; dtype, threads,
allocator settings and the load of the machine stand above the table; shares are of what this machine was measured to do
just before (square GEMM of the dtype, or reading memory, for decoding); peak memory is what one call needs beyond
weights and inputs, measured in a process of its own. A peer that is not installed, or fails, is named in the row.

All rows on all cores come first, then memory, then the short rows on one thread. A run on two cores takes under ten
minutes: what would start too late is left out and says so (`--minutes`).

Sizes: "mid", a random hybrid of 228 million parameters (benchmark_peers.py), and "nano". The language model stands
alone in prefill, decode and train; towers have their own phases.
"""

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch

from .benchmark_phases import DTYPES, PHASES, Case, Options, models, towers

SLOW = 15.0  # seconds of a first round after which there is no second


# ---- measuring ----


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(call: Callable, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    own = call()
    synchronize(device)
    return own if isinstance(own, float) else time.perf_counter() - start


def take_turns(case: Case, options: Options) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every call, one call of each in turn until the time is up; and what failed.

    The first round warms up, and counts only where its calls together take longer than `SLOW`.
    """
    calls = case.calls
    times, failed = {name: [] for name in calls}, {}
    spent, rounds = 0.0, 0
    while rounds < (2 if options.quick else 8) and spent <= options.seconds * len(calls):
        start = time.perf_counter()
        for name in [name for name in calls if name not in failed]:
            try:
                with torch.set_grad_enabled(case.grad):
                    times[name].append(timed(calls[name], options.device))
            except Exception as error:  # a peer that cannot is a result
                failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        rounds += 1
        if rounds > 1:
            spent += time.perf_counter() - start
        elif sum(map(sum, times.values())) > SLOW:
            break
    times = {name: seconds[1:] or seconds for name, seconds in times.items() if name not in failed}
    return times, failed


def machine_peaks(device: str, dtypes: list[str], quick: bool) -> dict[str, float]:
    """{"bf16": FLOP/s of a square product, ..., "memory": bytes/s of reading}, at the current number of threads."""
    sizes = [256] if quick else [8192] if device.startswith("cuda") else [1024, 2048]
    peaks = dict.fromkeys(dtypes, 0.0)
    for name, size in itertools.product(dtypes, sizes):
        a, b = (torch.randn(size, size, device=device, dtype=DTYPES[name]) for _ in range(2))
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        fastest = min(timed(product, device) for _ in range(3 if quick else 8))
        peaks[name] = max(peaks[name], 2 * size**3 / fastest)
    values = torch.ones(2**20 if quick else 2**27, device=device)
    peaks["memory"] = 4 * len(values) / min(timed(values.sum, device) for _ in range(4))
    return peaks


def peak_memory(call: Callable, device: str) -> float:
    """Bytes that a call needs at its height beyond what is there before it."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    call()
    return max(0, status("VmHWM") - before)


# ---- the run ----


def opponent(peer: str, times: dict[str, list[float]]) -> str | None:
    """Which of our calls a peer is held against: the fastest; another way of our own: the plain one."""
    own = [name for name in times if name.split(",")[0] == "ours"]
    if peer.split(",")[0] == "ours":
        return "ours" if peer != "ours" and "ours" in own else None
    return min(own, key=lambda name: min(times[name]), default=None)


def run_case(phase: str, case: Case, threads: int, peaks: dict, options: Options) -> dict:
    times, failed = take_turns(case, options)
    row = {"phase": phase, "size": case.size, "dtype": case.dtype, "threads": threads, "calls": {}}
    for name in (*case.calls, *case.missing):
        entry = row["calls"][name] = {"note": failed.get(name) or case.missing.get(name)}
        if name in times:
            fastest = min(times[name])
            entry |= {"min": fastest, "median": statistics.median(times[name]), "runs": len(times[name])}
            entry |= {"against": opponent(name, times)}
            if case.flops:
                entry |= {"share": case.flops / fastest / peaks[case.dtype], "of": "GEMM"}
            elif case.moved:
                entry |= {"share": case.moved / fastest / peaks["memory"], "of": "memory"}
    return row


def run_phases(phases: list[str], threads: list[int], peaks: dict, options: Options, deadline: float):
    """-> rows in the order of the phases; {phase: seconds that it took, what it is made of included}."""
    rows, seconds = [], dict.fromkeys([*phases, "memory"], 0.0)
    memory, counts = {}, dict.fromkeys(phases)  # rows by "PHASE:NUMBER"; how many cases of a phase to make
    for threads_now in reversed(threads):
        first, alone = threads_now == threads[-1], dict.fromkeys(phases, 0)
        torch.set_num_threads(threads_now)
        for phase in phases:
            start = time.monotonic()
            for number, case in enumerate(itertools.islice(PHASES[phase](options), counts[phase])):
                if case.alone:
                    alone[phase] = number + 1
                elif not first:
                    continue
                if time.monotonic() < deadline:
                    rows.append(run_case(phase, case, threads_now, peaks[threads_now], options))
                    print(markdown(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
                    if case.memory and first:
                        memory[f"{phase}:{number}"] = rows[-1]
                else:
                    row = {"phase": phase, "size": case.size, "dtype": case.dtype, "threads": threads_now}
                    rows.append(row | {"skipped": "left out: the time is over (--minutes)"})
            seconds[phase] += time.monotonic() - start
        counts, start = alone, time.monotonic()
        if first and memory and start < deadline:
            for name, measured in memory_elsewhere(list(memory), threads_now, options).items():
                for peer, peak in measured.items():
                    memory[name]["calls"][peer]["memory"] = peak
            seconds["memory"] = time.monotonic() - start
    return sorted(rows, key=lambda row: phases.index(row["phase"])), seconds


def operators(case: Case, options: Options, most: int = 8) -> str:
    """Where our time goes: the operators with the most time of their own, in percent of all of them, by PyTorch's
    profiler (what is compiled counts as one)."""
    call = case.calls["ours, compiled" if "ours, compiled" in case.calls else "ours"]
    with torch.set_grad_enabled(case.grad):
        call()
        with torch.profiler.profile() as profile:
            call()
    on_gpu = options.device.startswith("cuda")
    spent = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in profile.key_averages()}
    largest = sorted(spent, key=spent.get, reverse=True)[:most]
    shares = [
        f"{name.split('::')[-1].split(' f')[0].strip('# ')} {spent[name] / sum(spent.values()):.0%}" for name in largest
    ]
    return ", ".join(shares)


def memory_elsewhere(wanted: list[str], threads: int, options: Options) -> dict[str, dict[str, float]]:
    """Peak memory of the cases "PHASE:NUMBER", {"PHASE:NUMBER": {"ours": bytes, "native": bytes}}: none where a call
    fails. One process makes the models, and every call runs in a copy of it."""
    command = [sys.executable, "-m", "modeling_omni.benchmark", "--memory-of", ",".join(wanted)]
    command += ["--threads", str(threads), "--device", options.device, "--dtypes", ",".join(options.dtypes)]
    result = subprocess.run(command + ["--quick"] * options.quick, stdout=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return {name: measured for line in lines for name, measured in line.items()}


def print_memory(wanted: list[str], threads: int, options: Options) -> None:
    """What `memory_elsewhere` reads. Nothing is computed on more than one thread before a process is copied: a copy
    has none of the threads that OpenMP then believes to have."""
    torch.set_num_threads(1)
    for phase in dict.fromkeys(name.split(":")[0] for name in wanted):
        numbers = [int(name.split(":")[1]) for name in wanted if name.startswith(phase + ":")]
        for number, case in enumerate(itertools.islice(PHASES[phase](options), max(numbers) + 1)):
            if number in numbers:
                measured = {peer: in_copy(case, peer, threads, options) for peer in ("ours", "native")}
                measured = {peer: peak for peer, peak in measured.items() if peak is not None}
                print(json.dumps({f"{phase}:{number}": measured}), flush=True)


def in_copy(case: Case, peer: str, threads: int, options: Options) -> float | None:
    def measure() -> float:
        torch.set_num_threads(threads)
        with torch.set_grad_enabled(case.grad):
            return peak_memory(case.calls[peer], options.device)

    if options.device.startswith("cuda"):  # no copy has a GPU; what was used before does not count there
        return measure()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    copy = context.Process(target=lambda: sender.send(measure()))
    copy.start()
    sender.close()  # so that a copy that dies ends the waiting
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        copy.join()


def settings(options: Options, peaks: dict[int, dict]) -> dict:
    """What a reader must know of the machine and the run."""
    from transformers import __version__ as transformers_version

    allocator = {name: os.environ[name] for name in sorted(os.environ) if name.startswith("MALLOC_")}
    chip = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        chip = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), chip)
    if options.device.startswith("cuda"):
        chip = torch.cuda.get_device_name()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "machine": f"{chip}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "transformers": transformers_version,
        "allocator": allocator or "MALLOC_* not set",
        "load": [round(value, 1) for value in os.getloadavg()],
        "peaks": {
            threads: {
                name: f"{value / 1e9:.0f} {'GB/s' if name == 'memory' else 'GFLOP/s'}" for name, value in own.items()
            }
            for threads, own in peaks.items()
        },
    }


def cell(entry: dict) -> str:
    if "min" not in entry:
        return entry.get("note") or "-"
    unit, scale = ("s", 1) if entry["min"] >= 1 else ("ms", 1e3)
    return f"{entry['min'] * scale:.3g} ({entry['median'] * scale:.3g}) {unit}"


def markdown(rows: list[dict]) -> str:
    """A line per peer; times are minimum (median) of a call, or of a step when decoding; ratio: peer / ours."""
    lines = [
        "| phase | size | dtype | threads | ours | peer | its time | ratio | our share of peak | memory: ours, peer |"
    ]
    lines.append("|---|---|---|--:|--:|---|--:|--:|--:|--:|")
    for row in rows:
        first = f"| {row['phase']} | {row['size']} | {row['dtype']} | {row['threads']} | "
        if "skipped" in row:
            lines.append(first + f"{row['skipped']} | | | | | |")
            continue
        calls = row["calls"]
        for name, entry in list(calls.items())[1:]:
            against = entry.get("against") or "ours"
            own = calls[against]
            both = "min" in own and "min" in entry
            ratio = f"{entry['min'] / own['min']:.2f}" if both else ""
            share = f"{100 * own['share']:.0f} % of {own['of']}" if "share" in own else ""
            held = [own.get("memory"), entry.get("memory")]
            memory = ", ".join("-" if m is None else f"{m / 2**20:.0f} MB" for m in held) if any(held) else ""
            how = against.removeprefix("ours, ") + ": " if against != "ours" else ""
            lines.append(first + f"{how}{cell(own)} | {name} | {cell(entry)} | {ratio} | {share} | {memory} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(prog="python -m modeling_omni.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--phases", default=",".join(PHASES), help="comma-separated (default: all)")
    parser.add_argument("--threads", default=f"1,{cores}" if cores > 1 else "1",
                        help="short cases run at all of these numbers, others at the largest")  # fmt: skip
    parser.add_argument("--dtypes", default="bf16,fp32", help="comma-separated (default: bf16,fp32)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda where there is one, else cpu")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=9, help="cases that would start later are left out")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--profile", action="store_true", help="instead: in which operators our time is spent")
    parser.add_argument("--out", help="also write settings and all numbers as JSON")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # see `memory_elsewhere`
    given = parser.parse_args(argv)
    phases, dtypes = given.phases.split(","), given.dtypes.split(",")
    if unknown := [f for f in phases if f not in PHASES] + [d for d in dtypes if d not in DTYPES]:
        parser.error(f"unknown: {', '.join(unknown)}; phases: {', '.join(PHASES)}; dtypes: {', '.join(DTYPES)}")
    options = Options(given.device, dtypes, given.quick, 0.2 if given.quick else 1.0)
    threads = sorted({int(number) for number in given.threads.split(",")})
    if given.memory_of:
        print_memory(given.memory_of.split(","), threads[-1], options)
        return 0
    torch.set_num_threads(threads[-1])
    if given.profile:
        for phase in phases:
            for case in PHASES[phase](options):
                print(f"{phase}, {case.size}, {case.dtype}: {operators(case, options)}", flush=True)
            models.cache_clear(), towers.cache_clear(), gc.collect()
        return 0
    start = time.monotonic()
    peaks = {}
    for count in threads:
        torch.set_num_threads(count)
        peaks[count] = machine_peaks(options.device, dtypes, given.quick)
    about = settings(options, peaks)
    for name, value in about.items():
        print(f"{name}: {value}", flush=True)
    rows, seconds = run_phases(phases, threads, peaks, options, start + 60 * given.minutes)
    print("\n" + markdown(rows))
    about["load after"] = [round(value, 1) for value in os.getloadavg()]
    seconds["all"] = time.monotonic() - start
    about["seconds"] = {name: round(value) for name, value in seconds.items()}
    print(f"\nload after: {about['load after']}\nseconds: {about['seconds']}")
    if given.out:
        Path(given.out).write_text(json.dumps(about | {"rows": rows}, indent=1, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
