"""The parts of `tests.bench.gpu` that run the program: OLMo-1B's shape with random weights.

The paper's batch: 16 rows of 512 tokens. Stages run by the user's command.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHRUNK = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SHRUNK |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512}
VOCABULARY = 512
START = 3  # steps that are left out: compilation, the allocator's first blocks


def sizes(bench) -> dict[str, int]:
    """Context, rows of a batch and steps."""
    if bench.small:
        return {"context": 64, "rows": 4, "steps": 4}
    return {"context": 512, "rows": 16, "steps": 15}


def call(bench, *words: object) -> str:
    """Run a command of this project or a module of the tests; its output."""
    settings = ROOT / "ds_configs" / ("zero3.json" if bench.device.type == "cuda" else "cpu.json")
    words = [str(settings) if word == "SETTINGS" else str(word) for word in words]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[:3])}: {(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def inputs(bench) -> None:
    """The protein sample as data, and a folder of random weights; how long each took."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    start, proteins = time.perf_counter(), "launch/assets/proteins.fasta.gz"
    tokenizer, size = bench.work / "tokenizer", sizes(bench)
    cli = "s2t2_dist.cli"
    if not tokenizer.exists():
        words = ("tokenizer", "train", proteins, "--vocab-size", VOCABULARY, "--out", tokenizer)
        call(bench, cli, *words)
    if not (bench.work / "data").exists():
        split = ("--context", size["context"], "--validation-fraction", 0.02)
        words = ("data", "build", proteins, "--tokenizer", tokenizer, *split)
        call(bench, cli, *words, "--out", bench.work / "data")
    built = time.perf_counter()
    values = json.loads((ROOT / "tests/configs/olmo-1b/config.json").read_text())
    kind = values.pop("model_type")
    if bench.small:
        values |= SHRUNK | {"eos_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, **values)
    with torch.device(bench.device):
        lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = sum(parameter.numel() for parameter in lm.parameters())
    lm.save_pretrained(bench.work / "model")
    words = {f"w{i}" if i else "<eos>": i for i in range(config.vocab_size)}
    made = Tokenizer(models.BPE(words, []))
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>").save_pretrained(
        bench.work / "model"
    )
    bench.note(weights=weights, data=built - start, model=time.perf_counter() - built)


def write_recipe(bench, name: str, stage: dict) -> Path:
    size = sizes(bench)
    stage |= {"max_steps": size["steps"], "train_batch_size": size["rows"]}
    stage |= {"per_device_train_batch_size": size["rows"], "per_device_eval_batch_size": 16}
    stage |= {"save_steps": size["steps"]}
    settings = "zero3.json" if bench.device.type == "cuda" else "cpu.json"
    values = {
        "output_dir": str(bench.work / name),
        "model": {"model_name_or_path": str(bench.work / "model"), "dtype": "bfloat16"},
        "data": {"path": str(bench.work / "data")},
        "deepspeed": str(ROOT / "ds_configs" / settings),
        "stages": [stage],
        "tracking": {"enabled": False},
        "save_total_limit": 1,
    }
    path = bench.work / f"{name}.yaml"
    path.write_text(json.dumps(values))
    return path


def stage(bench) -> None:
    """Steps of a stage by `s2t2 train`, beside what `s2t2 plan` says that it needs."""
    choices = {"translate": {"learning_rate": 1e-3}}
    choices["finetune"] = {"init": "truncate", "learning_rate": 1e-4}
    recipe = write_recipe(bench, bench.name, {"kind": bench.name, **choices[bench.name]})
    start = time.perf_counter()
    call(bench, "s2t2_dist.cli", "train", recipe)
    seconds, run = time.perf_counter() - start, bench.work / bench.name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_seconds" in line][START:]
    keys = ("step_seconds", "tokens_per_second", "model_tflops", "mfu", "translator_seconds")
    found = {k: statistics.median(s[k] for s in steps) for k in keys if k in steps[0]}
    found["peak_gib"] = max(step["peak_memory_gib"] for step in steps)
    words = ("plan", recipe, "--gpus", 1, "--gpu-memory", 80, "--json")
    planned = json.loads(call(bench, "s2t2_dist.cli", *words))
    bench.note(run_seconds=seconds, **found, planned_gib=planned_peak(planned))


def planned_peak(report: dict) -> float:
    """GiB of the largest phase under zero3.json, from the command's JSON."""
    plain = [f for f in report["files"] if not f["gradient_checkpointing"]]
    (file,) = [f for f in plain if Path(f["file"]).name == "zero3.json"]
    return file["stages"][0]["peak"] / (1 << 30)


def plain(bench) -> None:
    """The same finetuning by a plain loop of Hugging Face and DeepSpeed."""
    size = sizes(bench)
    words = (bench.work / "model", bench.work / "data", "SETTINGS", size["steps"], size["rows"])
    printed = call(bench, "tests.bench.plain_loop", *words, VOCABULARY)
    told = json.loads(printed.splitlines()[-1])
    seconds = statistics.median(told["seconds"][START:])
    tokens = size["rows"] * size["context"] / seconds
    bench.note(
        step_seconds=seconds, tokens_per_second=tokens, peak_gib=told["peak_bytes"] / (1 << 30)
    )


def checkpoint(bench) -> None:
    """Save, verify and load the finetune stage's checkpoint, by the program's own functions."""
    from s2t2_dist import artifacts
    from s2t2_dist.config import load_recipe
    from s2t2_dist.lm import engine
    from s2t2_dist.run import checkpoint as checkpoints
    from s2t2_dist.training import start
    from s2t2_dist.training.finetune import make_stage

    recipe = load_recipe(bench.work / "finetune.yaml", [])
    device = engine.init_distributed(recipe.collective_timeout)
    context = start._open_inputs(recipe, start.comm.world_comm(), device)
    runner = make_stage(context, recipe.stages[0])
    position = checkpoints.Position(0, "finetune", 1, 1, 0)
    room, laps = bench.work / "saved", [time.perf_counter()]
    checkpoints.save(room, position, runner.save, context.comm, 1, None)
    laps.append(time.perf_counter())
    found, _ = checkpoints.find(room, context.comm)
    laps.append(time.perf_counter())
    runner.load(found, 1)
    bench.drain()
    laps.append(time.perf_counter())
    files = [path for path in found.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    assert artifacts.is_complete(found)
    save, verify, load = (b - a for a, b in itertools.pairwise(laps))
    bench.note(bytes=size, save=save, verify=verify, load=load)
    sys.stdout.flush()
    os._exit(0)  # as the command does: gloo's and NCCL's threads live on


def loader(bench) -> None:
    """Tokens per second of one reading thread, beside what the stages eat."""
    import numpy as np

    from s2t2_dist.data.batches import load_batch
    from s2t2_dist.data.order import rows_at
    from s2t2_dist.data.shards import ShardReader

    reader, size = ShardReader(bench.work / "data", "train"), sizes(bench)
    batches, start = 20 if bench.small else 400, time.perf_counter()
    for step in range(batches):
        positions = np.arange(step * size["rows"], (step + 1) * size["rows"])
        load_batch(reader, rows_at(positions, len(reader), 17), False)
    seconds = time.perf_counter() - start
    bench.note(tokens_per_second=batches * size["rows"] * reader.context / seconds)


PARTS = {
    "inputs": inputs,
    "translate": stage,
    "finetune": stage,
    "plain": plain,
    "checkpoint": checkpoint,
    "loader": loader,
}
