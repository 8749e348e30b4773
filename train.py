"""Training: `python train.py <command> --config configs/<scale>/<stage>.yaml [--key value ...]`.

Commands:
    sft     one supervised stage (paper 3.1)
    tower   pre-training of nano's vision or audio tower on dense labels
"""

import sys


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "sft":
        from modeling_omni.training import SFTArguments, load_arguments, train_sft

        train_sft(load_arguments(SFTArguments, sys.argv[2:]))
    elif command == "tower":
        from modeling_omni.pretraining import TowerArguments, pretrain_tower
        from modeling_omni.training import load_arguments

        pretrain_tower(load_arguments(TowerArguments, sys.argv[2:]))
    else:
        print(__doc__)
        sys.exit(0 if command in ("-h", "--help") else f"unknown command {command!r}" if command else 2)


if __name__ == "__main__":
    main()
