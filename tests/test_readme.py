"""Every runnable block of the README, run as it stands. The two set-up blocks are run by .ci/run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(<!-- setup: \w+ -->\n)?```(bash|python)\n(.*?)```", README, re.DOTALL)
RUNNABLE = [(language, code) for setup, language, code in BLOCKS if not setup]


def run(language: str, code: str, cwd=ROOT) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", code]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_there_are_two_set_up_commands():
    setups = [setup for setup, _, _ in BLOCKS if setup]
    assert setups == ["<!-- setup: main -->\n", "<!-- setup: tests -->\n"]


@pytest.mark.parametrize("number", range(len(RUNNABLE)))
def test_block_runs(number, tmp_path):
    language, code = RUNNABLE[number]
    shown = run(language, code.replace("runs/", f"{tmp_path}/"))
    if "train.py plan" in code:  # the table below it is its output
        assert all(line in README for line in shown.splitlines() if line.startswith("|"))


def test_files_of_the_tree_exist():
    tree = re.search(r"## Files\n\n```text\n(.*?)```", README, re.DOTALL).group(1)
    names = re.findall(r"[\w/]+\.(?:py|jinja)\b|\w+/\w*/?", tree)
    assert len(names) > 15
    for name in names:
        found = (ROOT / name).exists() or (ROOT / "modeling_omni" / name).exists()
        assert found, name
