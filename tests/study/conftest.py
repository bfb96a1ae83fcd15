"""A study file over recipes that nothing runs."""

import pytest
import yaml

STAGES = [
    {"kind": "translate", "max_steps": 4, "learning_rate": 0.01},
    {"kind": "finetune", "max_steps": 2, "learning_rate": 0.001},
]
RECIPE = {
    "output_dir": "elsewhere",
    "model": {"model_name_or_path": "base"},
    "data": {"path": "data"},
    "deepspeed": "ds.json",
    "stages": STAGES,
}
RATE = "stages.finetune.learning_rate"


@pytest.fixture
def write(tmp_path):
    """Writes a study file; `changes` replace its top-level keys."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    truncated = {**RECIPE, "stages": [{**STAGES[1], "init": "truncate"}]}
    (tmp_path / "truncated.yaml").write_text(yaml.safe_dump(truncated))

    def make(**changes):
        values = {
            "output_dir": str(tmp_path / "out"),
            "base": str(tmp_path / "recipe.yaml"),
            "seeds": [17, 18],
            "rates": {RATE: [1e-3, 0.003]},
            "variants": {
                "s2t2": {"label": "S2T2", "overrides": {"stages.translate.max_steps": 8}},
                "truncated": {"base": str(tmp_path / "truncated.yaml")},
            },
            **changes,
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
        return path

    return make
