"""Training: `python train.py <command> --config configs/<scale>/<stage>.yaml [--key value ...]`.

Commands:
    sft     one supervised stage (paper 3.1); with --check-data it only reads the data and reports on them
    tower   pre-training of nano's vision or audio tower on dense labels
    report  what every skill scored after every stage, as a table and a plot
    plan    memory, batches and steps of stages on given GPUs; computes, trains nothing

Several processes: `accelerate launch --config_file configs/accelerate/<name>.yaml train.py sft --config ...`.
"""

import sys


def main() -> None:
    command, argv = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if command == "sft" and "--check-data" in argv:
        from modeling_omni.data_check import check_command

        check_command(argv)
    elif command == "sft":
        from modeling_omni.training import SFTArguments, load_arguments, train_sft

        train_sft(load_arguments(SFTArguments, argv))
    elif command == "tower":
        from modeling_omni.pretraining import TowerArguments, pretrain_tower
        from modeling_omni.training import load_arguments

        pretrain_tower(load_arguments(TowerArguments, argv))
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
