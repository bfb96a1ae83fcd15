"""Every file of ds_configs/ loads, is explained, and trains on CPU ranks to the same weights."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoConfig

from s2t2_dist.config import Finetune, ModelConfig, Translate
from s2t2_dist.lm import engine
from s2t2_dist.lm.load import load_lm
from tests.bench.memory import as_launched
from tests.jobs.distributed import run_ranks

FOLDER = Path(__file__).parents[2] / "ds_configs"
FILES = sorted(FOLDER.glob("*.json"))
OFFLOAD = FOLDER / "zero3-offload.json"
HPZ = "zero_hpz_partition_size"
COUNTED = ("all_gather_into_tensor", "reduce_scatter_tensor")
PAYLOAD = Counter()


def test_the_folder_holds_json_and_its_readme():
    assert {path.suffix for path in FOLDER.iterdir()} == {".json", ".md"}
    assert {path.name for path in FILES} == {
        "cpu.json",
        "zero3.json",
        "zero3-offload.json",
        "zero3-hpz.json",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_holds_known_keys_and_is_in_the_readme(path):
    settings = engine.load_settings(path)
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["data_types"]["grad_accum_dtype"] == "fp32"
    assert f"`{path.name}`" in (FOLDER / "README.md").read_text()


def test_no_two_files_say_the_same():
    texts = [str(sorted(engine.load_settings(path).items())) for path in FILES]
    assert len(set(texts)) == len(texts)


def _counted(name: str):
    """A collective that adds the bytes of its larger tensor, the whole one, to PAYLOAD."""
    function = getattr(torch.distributed, name)

    def call(*args, **kwargs):
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        PAYLOAD[name] += max(tensor.nbytes for tensor in tensors)
        return function(*args, **kwargs)

    return call


def _train(comm, folder: Path, files: list[Path]) -> dict[str, dict]:
    """By file: a gradient through the frozen model, losses and bytes of finetuning steps.

    Bytes are those of the last step, for each weight.
    """
    as_launched(comm)
    for name in COUNTED:
        setattr(torch.distributed, name, _counted(name))
    lm = ModelConfig(model_name_or_path=str(folder), dtype="float32")
    results = {}
    for path in files:
        settings = engine.load_settings(path)
        if HPZ in settings["zero_optimization"]:
            settings["zero_optimization"][HPZ] = 2  # two "nodes" of two ranks
        results[path.name] = _frozen(comm, settings, lm) | _trained(comm, settings, lm)
    return results


def _frozen(comm, settings: dict, lm: ModelConfig) -> dict:
    stage = Translate(kind="translate", max_steps=1, train_batch_size=comm.size)
    full = engine.engine_settings(settings, lm, stage, comm.size)
    model = load_lm(Path(lm.model_name_or_path), lm, full)
    frozen = engine.FrozenLM(model, full, recompute=False)
    random = torch.manual_seed(1)
    embed, head = torch.randn(2, 30, model.config.hidden_size, generator=random).unbind()
    embed.requires_grad_()
    ids = torch.randint(30, (1, 8), generator=random)
    frozen.logits(ids, (embed, head, None)).square().sum().backward()
    holder = type(frozen.engine.optimizer).__name__
    frozen.close()
    return {"embed_grad": embed.grad, "frozen_holder": holder}


def _trained(comm, settings: dict, lm: ModelConfig) -> dict:
    batch = {"train_batch_size": 2 * comm.size, "per_device_train_batch_size": 1}
    stage = Finetune(kind="finetune", init="source", max_steps=2, **batch)
    full = engine.engine_settings(settings, lm, stage, comm.size)
    model = load_lm(Path(lm.model_name_or_path), lm, full)
    weights = sum(parameter.ds_numel for parameter in model.parameters())
    trained = engine.TrainedLM(model, full, stage)
    losses = []
    for step in range(2):
        PAYLOAD.clear()
        for micro in range(2):
            ids = torch.arange(16)[None] + comm.rank + micro
            logits = trained.logits(ids)
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
            trained.backward(loss / (2 * comm.size))
            losses.append(loss.item())
        losses.append(trained.step(1e-2 * (step + 1)))
    inner = type(trained.engine.optimizer.optimizer).__name__
    trained.close()
    sent = {name: PAYLOAD[name] / weights for name in COUNTED}
    return {"losses": losses, "optimizer": inner, **sent}


@pytest.mark.parametrize(
    "files",
    [
        pytest.param([p for p in FILES if p != OFFLOAD], id="on devices", marks=pytest.mark.slow),
        # DeepSpeed compiles its own AdamW at its first use: a minute or two.
        pytest.param([FOLDER / "cpu.json", OFFLOAD], id="offloaded", marks=pytest.mark.soak),
    ],
)
def test_every_file_trains_to_the_same_weights_on_four_ranks(files, tmp_path):
    """hpZ and offload included; only where tensors live may differ."""
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 4}
    ids = {"eos_token_id": 0, "pad_token_id": 1}
    torch.manual_seed(5)
    config = OlmoConfig(vocab_size=40, num_hidden_layers=2, **sizes, **ids)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path / "lm")
    ranks = run_ranks(_train, 4, tmp_path, tmp_path / "lm", files, timeout=300)
    for results in ranks:
        expected = results["cpu.json"]
        assert expected["losses"][-3] < expected["losses"][0]
        for name, found in results.items():
            # Without an optimizer DeepSpeed only partitions: no master weights, no moments.
            assert found["frozen_holder"] == "DeepSpeedZeRoOffload"
            assert found["optimizer"] == ("DeepSpeedCPUAdam" if "offload" in name else "AdamW")
            torch.testing.assert_close(found["embed_grad"], expected["embed_grad"])
            # float32 sums in another order, and another implementation of AdamW.
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
            # As planned: two passes reduce 4 bytes per weight each (weights that no size divides
            # are padded), and gather 4 at most twice each: once where they stay in between, and
            # once per step where all are below stage3_param_persistence_threshold.
            assert found["reduce_scatter_tensor"] == pytest.approx(2 * 4, rel=0.02), name
            least = 2 * 4 if name == "cpu.json" else 4
            assert 0.95 * least < found["all_gather_into_tensor"] < 1.05 * 2 * 2 * 4, name
