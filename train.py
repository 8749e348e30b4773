"""Training: `python train.py <command> --config configs/<scale>/<stage>.yaml [--key value ...]`.

Commands:
    sft     one supervised stage (paper 3.1); with --check-data it only reads the data and reports on them
    mpo     one stage of preference optimization on pairs of answers (paper 3.2.1)
    gspo    one stage of reinforcement learning with verifiable rewards (paper 3.2.2 to 3.2.5)
    tower   pre-training of nano's vision or audio tower on dense labels
    recipe  several configs, one after the other, and the report: `train.py recipe CONFIG... [--launch ACCELERATE_YAML]`
    report  what every skill scored after every stage, as a table and a plot
    plan    memory, batches and steps of stages on given GPUs; computes, trains nothing

Several processes: `accelerate launch --config_file configs/accelerate/<name>.yaml train.py sft --config ...`.
"""

import argparse
import subprocess
import sys
from pathlib import Path


def recipe(argv: list[str]) -> None:
    """Trains every config that has not finished yet, in order; killed, the same command goes on where it was."""
    import yaml

    from modeling_omni.reporting import report_command

    parser = argparse.ArgumentParser(prog="train.py recipe", description=recipe.__doc__)
    parser.add_argument("configs", nargs="+", type=Path, help="YAML files of `sft` stages and of `tower`s")
    parser.add_argument("--launch", help="accelerate config for the stages (towers train in one process)")
    parser.add_argument("--plot", help="draw the held-out accuracy after every stage into this file")
    options = parser.parse_args(argv)
    stages = []
    for path in options.configs:
        settings = yaml.safe_load(path.read_text())
        folder, is_tower = Path(settings["output_dir"]), "tower" in settings
        finished = folder / (f"step-{settings['steps']}" if is_tower else "final/config.json")
        if not is_tower:
            stages.append(str(folder))
        if finished.exists():
            print(f"{path}: {finished} exists, nothing to do", flush=True)
            continue
        launch = [sys.executable]
        if options.launch and not is_tower:
            launch += ["-m", "accelerate.commands.launch", "--config_file", options.launch]
        command = [*launch, __file__, "tower" if is_tower else "sft", "--config", str(path)]
        print(" ".join(command), flush=True)
        if subprocess.run(command).returncode != 0:
            sys.exit(f"{path} failed; mend it and run the same command again, finished stages are kept")
    report_command([*stages, *(["--plot", options.plot] if options.plot else [])])


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
    elif command == "tower":
        from modeling_omni.pretraining import TowerArguments, pretrain_tower
        from modeling_omni.training import load_arguments

        pretrain_tower(load_arguments(TowerArguments, argv))
    elif command == "recipe":
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
