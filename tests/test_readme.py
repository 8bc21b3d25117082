"""The README's code runs, and what it says of files and commands is true."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_readme_blocks_run_in_order():
    torch.manual_seed(0)
    namespace: dict = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["new"] == [3, 4]
    assert namespace["pool"].frozen_ids == (0, 1, 2)
    assert type(namespace["strategy"]).__name__ == "Naive"


def test_first_example_has_at_most_15_lines_of_code():
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert 10 <= len(lines) <= 15


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w/.]+)\)", README))))
def test_linked_files_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("config", sorted(set(re.findall(r"configs/[\w/]+\.yaml", README))))
def test_named_configs_exist(config):
    assert (ROOT / config).is_file()


def test_named_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake (\w+)", README))
    assert {"run", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
