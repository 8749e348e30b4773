"""Files around the nano data.

python -m modeling_omni.nano_data speech --out DIR      the spoken words, once before training or evaluation with sound
python -m modeling_omni.nano_data tokenizer --out DIR   tokenizer.json and its two companions
python -m modeling_omni.nano_data examples --out DIR    the README's example media
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


if __name__ == "__main__":
    main()
