"""Training: `python train.py <command> --config configs/<scale>/<stage>.yaml [--key value ...]`.

Commands:
    sft     one supervised stage (paper 3.1); with --check-data it only reads the data and reports on them
    mpo     one stage of preference optimization on pairs of answers (paper 3.2.1)
    gspo    one stage of reinforcement learning with verifiable rewards (paper 3.2.2 to 3.2.5)
    distill one stage of on-policy distillation from a teacher per domain
    qad     quantisation-aware distillation: a student in FP8 or NVFP4 from its own teacher (paper 4.7)
    filter  keeps the prompts whose pass rate under a stage's initial policy is right (paper 3.2.3, 3.2.4)
    pairs   preference pairs by rejection sampling, for `mpo`
    tower   pre-training of nano's vision or audio tower on dense labels
    recipe  configs of any of these, one after the other: `train.py recipe CONFIG... [--launch ACCELERATE_YAML]`
    rl      the same
    report  what every skill scored after every stage, as a table and a plot
    plan    memory, batches and steps of stages on given GPUs; computes, trains nothing

Several processes: `accelerate launch --config_file configs/accelerate/<name>.yaml train.py sft --config ...`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

# what a stage of a recipe may be -> the file of its output_dir that is written last
FINISHED = {
    "sft": "final/README.md",
    "mpo": "final/README.md",
    "gspo": "final/README.md",
    "distill": "final/README.md",
    "qad": "packed/config.json",
    "filter": "prompts.jsonl",
    "pairs": "pairs.jsonl",
    "tower": "step-{steps}",
}


def made_from(settings: dict) -> dict[str, str]:
    """The config of a stage; sizes and times of the weights it starts from, and of its teachers, if they are there."""
    from modeling_omni.configuration_omni import resolve_checkpoint

    made = {"config": json.dumps(settings, sort_keys=True, default=str)}
    names = [settings.get("model")]
    for key in ("towers", "teachers"):
        names += (settings.get(key) or {}).values()
    for name in filter(None, names):
        path = Path(resolve_checkpoint(name))
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if files:
            stamps = [(file.name, file.stat().st_size, int(file.stat().st_mtime)) for file in files]
            made[f"weights of {name}"] = json.dumps(stamps)
    return made


def recipe(argv: list[str]) -> None:
    """Runs every config that has not finished yet, in order, with the command that its key `stage` names (without one:
    `tower` where it has that key, else `sft`); killed, the same command goes on where it was. What has finished stays,
    with a warning where its config or the weights that it starts from are others by now. After every stage: what the
    held-out skills scored and how rewards rose."""
    import yaml

    from modeling_omni.reporting import report_stages

    parser = argparse.ArgumentParser(prog="train.py recipe", description=recipe.__doc__)
    parser.add_argument("configs", nargs="+", type=Path, help=f"YAML files of stages: {', '.join(FINISHED)}")
    parser.add_argument("--launch", help="accelerate config for the stages (towers train in one process)")
    parser.add_argument("--plot", help="draw the held-out accuracy after every stage into this file")
    parser.add_argument("--before", nargs="+", default=[], metavar="RUN", help="results to show in front: output "
                        "folders, or JSON files of `infer.py eval --out`")  # fmt: skip
    options = parser.parse_args(argv)
    stages = []
    for path in options.configs:  # all of them before the first one runs
        settings = yaml.safe_load(path.read_text())
        command = settings.get("stage") or ("tower" if "tower" in settings else "sft")
        if command not in FINISHED:
            sys.exit(f"{path}: stage is {command!r}; known: {', '.join(FINISHED)}")
        folder = Path(settings["output_dir"])
        finished = folder / FINISHED[command].format(steps=settings.get("steps"))
        stages.append((path, settings, command, folder, finished))
    shown = list(options.before)
    for path, settings, command, folder, finished in stages:
        record = folder / "recipe.json"
        if command not in ("tower", "filter", "pairs"):
            shown.append(str(folder))
        if finished.exists():
            print(f"{path}: {finished} exists, nothing to do", flush=True)
            if record.exists():  # not of a stage that was run by its own command
                before, now = json.loads(record.read_text()), made_from(settings)
                if changed := [name for name in before if now.get(name, before[name]) != before[name]]:
                    print(f"WARNING: {folder} was made before a change of {', '.join(changed)}; delete it to run the "
                          "stage again", flush=True)  # fmt: skip
            continue
        launch = [sys.executable]
        if options.launch and command != "tower":
            launch += ["-m", "accelerate.commands.launch", "--config_file", options.launch]
        line = [*launch, __file__, command, "--config", str(path)]
        print(" ".join(line), flush=True)
        before = made_from(settings)
        if subprocess.run(line).returncode != 0:
            sys.exit(f"{path} failed; mend it and run the same command again, finished stages are kept")
        record.write_text(json.dumps(before, indent=1))
        if shown[-1:] == [str(folder)] and path != stages[-1][0]:
            report_stages(shown, options.plot)
    report_stages(shown, options.plot)


def main() -> None:
    command, argv = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if command == "sft" and "--check-data" in argv:
        from modeling_omni.data_check import check_command

        check_command(argv)
    elif command == "sft":
        from modeling_omni.training import SFTArguments, load_arguments, train_sft

        train_sft(load_arguments(SFTArguments, argv))
    elif command == "mpo":
        from modeling_omni.mpo import MPOArguments, train_mpo
        from modeling_omni.training import load_arguments

        train_mpo(load_arguments(MPOArguments, argv))
    elif command == "gspo":
        from modeling_omni.gspo import GSPOArguments, train_gspo
        from modeling_omni.training import load_arguments

        train_gspo(load_arguments(GSPOArguments, argv))
    elif command == "distill":
        from modeling_omni.distillation import DistillArguments, train_distill
        from modeling_omni.training import load_arguments

        train_distill(load_arguments(DistillArguments, argv))
    elif command == "qad":
        from modeling_omni.qad import QADArguments, train_qad
        from modeling_omni.training import load_arguments

        train_qad(load_arguments(QADArguments, argv))
    elif command == "filter":
        from modeling_omni.rollouts import FilterArguments, filter_prompts
        from modeling_omni.training import load_arguments

        print(filter_prompts(load_arguments(FilterArguments, argv)) or "", flush=True)
    elif command == "pairs":
        from modeling_omni.pairs import PairsArguments, make_pairs
        from modeling_omni.training import load_arguments

        print(make_pairs(load_arguments(PairsArguments, argv)) or "", flush=True)
    elif command == "tower":
        from modeling_omni.pretraining import TowerArguments, pretrain_tower
        from modeling_omni.training import load_arguments

        pretrain_tower(load_arguments(TowerArguments, argv))
    elif command in ("recipe", "rl"):
        recipe(argv)
    elif command == "report":
        from modeling_omni.reporting import report_command

        report_command(argv)
    elif command == "plan":
        from modeling_omni.planning import plan_command

        plan_command(argv)
    else:
        print(__doc__)
        sys.exit(0 if command in ("-h", "--help") else f"unknown command {command!r}" if command else 2)


if __name__ == "__main__":
    main()
