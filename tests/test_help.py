"""`--help` of every command: it works, and says something about every option."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAIN = ("sft", "mpo", "gspo", "distill", "qad", "filter", "pairs", "tower", "recipe", "rl", "report", "plan")
INFER = ("ask", "chat", "batch", "serve", "eval", "compare", "merge", "export")
RUNNABLE = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for path in ROOT.glob("modeling_omni/**/*.py")
    if '\nif __name__ == "__main__":' in path.read_text()
)
COMMANDS = [("train.py",), ("infer.py",)]
COMMANDS += [("train.py", name) for name in TRAIN] + [("infer.py", name) for name in INFER]
COMMANDS += [(name,) for name in RUNNABLE]


def shown(command: tuple[str, ...], monkeypatch, capsys) -> str:
    script, *rest = command
    monkeypatch.setattr(sys, "argv", [script, *rest, "--help"])
    with pytest.raises(SystemExit) as ended:
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__")
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_says_what_every_option_is(command, monkeypatch, capsys):
    text = shown(command, monkeypatch, capsys)
    assert len(text) > 200
    lines = text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""]):
        if re.match(r"  -", line) and "-h, --help" not in line:
            said = re.search(r"\S  +\S", line) or re.match(r" {10,}\S", following)
            assert said, f"{' '.join(command)}: nothing is said of {line.strip()}"


def test_the_lists_above_are_complete(monkeypatch, capsys):
    listed = re.search(r"ask \| .*", shown(("infer.py",), monkeypatch, capsys))[0]
    assert tuple(listed.split(" | ")) == INFER
    text = shown(("train.py",), monkeypatch, capsys)
    assert tuple(re.findall(r"^    (\w+) ", text, re.MULTILINE)) == TRAIN
    assert "modeling_omni.fuzzing" in RUNNABLE and "modeling_omni.nano_data" in RUNNABLE
