"""The device under test, and the demo model's data for it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import runs


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory) -> Path:
    """The protein sample in 512 tokens and rows of 128, a small part of it in validation."""
    folder = tmp_path_factory.mktemp("demo")
    proteins, tokenizer = runs.ROOT / "launch/assets/proteins.fasta.gz", folder / "tokenizer"
    split = ("--context", "128", "--validation-fraction", "0.005")
    for words in (
        ("tokenizer", "train", proteins, "--vocab-size", "512", "--out", tokenizer),
        ("data", "build", proteins, "--tokenizer", tokenizer, *split, "--out", folder / "data"),
    ):
        command = [sys.executable, "-m", "s2t2_dist.cli", *map(str, words)]
        subprocess.run(command, check=True, cwd=folder, env=runs.environment(folder, "cpu"))
    return folder / "data"


@pytest.fixture(scope="session")
def uninterrupted(device, demo_data, tmp_path_factory) -> Path:
    """The run directory of both stages, by the script of a user."""
    recipe = runs.write_recipe(tmp_path_factory.mktemp("whole"), demo_data, device.type)
    assert runs.train(recipe, device.type) == 0, runs.output(recipe)
    return recipe.parent / "run"
