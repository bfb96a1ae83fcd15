"""What a run's stages share, for tests that start none."""

import pytest
import torch

from s2t2_dist.comm import Comm
from s2t2_dist.data.shards import ShardReader
from s2t2_dist.lm import engine
from s2t2_dist.training.context import Context
from tests.jobs import launching
from tests.report import runs


@pytest.fixture
def context(source_model, protein_data, tmp_path) -> Context:
    """A translate and a finetune stage on one rank, with no run directory yet."""
    stages = [runs.TRANSLATE, runs.FINETUNE]
    recipe = runs.make_recipe(tmp_path / "disk" / "run", source_model, protein_data, stages)
    return Context(
        recipe=recipe,
        run_dir=recipe.output_dir,
        comm=Comm(),
        device=torch.device("cpu"),
        deepspeed=engine.load_settings(launching.CPU_SETTINGS),
        train=ShardReader(protein_data, "train"),
        validation=ShardReader(protein_data, "validation"),
    )
