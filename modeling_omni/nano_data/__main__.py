"""Files around the nano data.

python -m modeling_omni.nano_data speech --out DIR      the spoken words, once before training or evaluation with sound
python -m modeling_omni.nano_data tokenizer --out DIR   tokenizer.json and its two companions
python -m modeling_omni.nano_data examples --out DIR    the README's example media
python -m modeling_omni.nano_data prompts --out DIR     prompts for reinforcement learning with their media (prompts.py)
"""

import argparse
import logging


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m modeling_omni.nano_data", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("tokenizer", help="write the tokenizer's files")
    command.add_argument("--out", required=True, help="folder")
    command = commands.add_parser("speech", help="speak the words of all voices into a cache")
    command.add_argument("--out", required=True, help="folder (set OMNI_NANO_SPEECH to it, or use the default one)")
    command = commands.add_parser("examples", help="make the README's example media from the held-out split")
    command.add_argument("--out", required=True, help="folder")
    command = commands.add_parser("prompts", help="write RL prompts of the training split, with their media")
    command.add_argument("--out", required=True, help="folder")
    command.add_argument("--skills", required=True, nargs="+", metavar="SKILL", help="nano skills, or all")
    command.add_argument("--count", type=int, default=100, help="prompts of every skill (default: 100)")
    command.add_argument("--first-seed", type=int, default=0, help="number of the first sample (default: 0)")
    command.add_argument("--split", choices=("train", "heldout"), default="train", help="default: train")
    command.add_argument("--mismatched", type=float, default=0.0, help="share of unanswerable prompts to add")
    command.add_argument("--think", action=argparse.BooleanOptionalAction, help="default: for text_math only")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if options.command == "tokenizer":
        from .tokenizer import save_tokenizer

        names = save_tokenizer(options.out)
        print(f"wrote {', '.join(names)} to {options.out}")
    elif options.command == "speech":
        from .speech import build_cache

        for split, facts in build_cache(options.out).items():
            print(f"{split}: {facts['voices']} voices, {facts['clips']} words, {facts['seconds'] / 60:.1f} minutes")
    elif options.command == "examples":
        from .examples import save_examples

        rows = save_examples(options.out)
        print(f"wrote {len(rows)} examples to {options.out}")
    elif options.command == "prompts":
        from . import SKILLS
        from .prompts import save_prompts

        skills = list(SKILLS) if options.skills == ["all"] else options.skills
        rows = save_prompts(
            options.out, skills, options.count, options.split, options.first_seed, options.mismatched, options.think
        )  # fmt: skip
        print(f"wrote {len(rows)} prompts to {options.out}")


if __name__ == "__main__":
    main()
