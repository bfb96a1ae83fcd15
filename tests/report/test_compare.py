"""The comparison's numbers against hand computation, on run directories made without training."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from data_prep.build import BuildOptions, build_shards
from s2t2_dist import cli, load_translation
from s2t2_dist.config import INITS
from s2t2_dist.data.evaluate import Evaluation
from s2t2_dist.errors import ArtifactError, DataError
from s2t2_dist.report.compare import compare, make_rows
from s2t2_dist.report.figure import drawable, in_blocks, sharpest_part, smooth
from s2t2_dist.report.runs import read_run, uniform_bits, unigram_bits
from s2t2_dist.report.translation import sharpest_columns, summarize, top_sources
from tests.conftest import make_source_model
from tests.report.runs import FINETUNE, TRANSLATE, make_recipe, metrics_line, write_plan, write_run

CONTEXT, BATCH = 32, 8


def evaluation(bits: float) -> Evaluation:
    """5,000 bytes in 2,500 tokens."""
    return Evaluation(nats=bits * math.log(2) * 5000, tokens=2500, bytes=5000)


def stage_lines(index: int, steps: int, first: float, last: float) -> list[dict]:
    """A stage that is evaluated at its start and end, to these bits per byte."""
    middle = [metrics_line(index, step, 4.0, None) for step in range(1, steps)]
    start = metrics_line(index, 0, None, evaluation(first))
    return [start, *middle, metrics_line(index, steps, 3.5, evaluation(last))]


@pytest.fixture(scope="module")
def plan():
    """(400, 64): source token 5 j of target token j, and everywhere in the last column."""
    plan = torch.zeros(400, 64)
    plan[torch.arange(64) * 5, torch.arange(64)] = 1.0
    plan[:, 63] = 0.01
    return plan / plan.sum()


@pytest.fixture(scope="module")
def runs(source_model, protein_data, source_data, plan, tmp_path_factory):
    """S2T2 with finetuning, the truncated new tokenizer, the source tokenizer; all done."""
    room = tmp_path_factory.mktemp("runs")
    s2t2 = make_recipe(room / "s2t2", source_model, protein_data, [TRANSLATE, FINETUNE])
    write_run(s2t2, stage_lines(0, 10, 6.0, 4.4) + stage_lines(1, 5, 4.4, 4.1))
    write_plan(s2t2, plan, evaluation(4.4))
    stages = [{**FINETUNE, "init": "truncate"}]
    truncated = make_recipe(room / "truncated", source_model, protein_data, stages)
    write_run(truncated, stage_lines(0, 5, 9.0, 4.3))
    stages = [{**FINETUNE, "init": "source"}]
    source = make_recipe(room / "source", source_model, source_data, stages)
    write_run(source, stage_lines(0, 5, 8.0, 4.0))
    return [room / name for name in ("s2t2", "truncated", "source")]


@pytest.fixture(scope="module")
def table(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "comparison"
    compare(runs, out)
    return json.loads((out / "table.json").read_text()), out


def test_rows_and_bits(table):
    found = [(row["label"], round(row["bits_per_byte"], 9)) for row in table[0]["rows"][2:]]
    assert found == [
        ("S2T2, translation only", 4.4),
        ("S2T2 + CFT", 4.1),
        ("New tokenizer, truncated, before CFT", 9.0),
        ("New tokenizer, truncated + CFT", 4.3),
        ("Source tokenizer (characters), before CFT", 8.0),
        ("Source tokenizer (characters) + CFT", 4.0),
    ]
    # The source tokenizer is better here, but is no use of the new one.
    assert table[0]["best_new_tokenizer"] == {"label": "S2T2 + CFT", "run": "s2t2"}


@pytest.mark.parametrize("init", INITS)
def test_every_start_has_a_name(init, source_model, protein_data, tmp_path):
    keys = {"alignment": "a.json"} if init == "alignment" else {}
    path = tmp_path / "a.json"
    path.write_text("{}")
    keys = {"alignment": path} if init == "alignment" else {}
    stages = [{**FINETUNE, "init": init, **keys}]
    recipe = make_recipe(tmp_path / "run", source_model, protein_data, stages)
    compare([write_run(recipe, stage_lines(0, 5, 9.0, 4.3))], tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    name = f"New tokenizer, {INITS[init]}"
    assert [row["label"] for row in rows[2:]] == [f"{name}, before CFT", f"{name} + CFT"]


def test_a_warm_start_is_in_the_name(source_model, protein_data, plan, tmp_path):
    """In its own run, and in one to which it is transferred."""
    warm = {**TRANSLATE, "warm_start": "subtoken_mean", "embed_scale": "convex"}
    recipe = make_recipe(tmp_path / "warm", source_model, protein_data, [warm, FINETUNE])
    lines = stage_lines(0, 10, 6.0, 4.4) + stage_lines(1, 5, 4.4, 4.1)
    first = write_run(recipe, lines)
    translation = write_plan(recipe, plan, evaluation(4.4))
    other = {**FINETUNE, "translation": translation}
    recipe = make_recipe(tmp_path / "transfer", source_model, protein_data, [other])
    second = write_run(recipe, stage_lines(0, 5, 4.5, 4.2))
    compare([first, second], tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    found = {row["label"] for row in rows[2:]}
    name = "S2T2 from mean of sub-tokens"
    assert {f"{name}, translation only", f"{name} + CFT"} < found
    assert {f"{name}, transferred, before CFT", f"{name}, transferred + CFT"} < found


def test_steps_tokens_and_perplexity(table, protein_data):
    rows = {row["label"]: row for row in table[0]["rows"]}
    cft = rows["S2T2 + CFT"]
    assert (cft["stage_steps"], cft["total_steps"]) == (5, 15)
    assert cft["tokens_seen"] == 15 * BATCH * CONTEXT
    assert rows["New tokenizer, truncated, before CFT"]["tokens_seen"] == 0
    assert cft["perplexity"] == pytest.approx(math.exp(4.1 * math.log(2) * 2), rel=1e-12)
    held = json.loads((protein_data / "manifest.json").read_text())["splits"]["validation"]
    assert cft["bytes_per_token"] == held["bytes"] / held["tokens"]
    assert cft["bytes_per_token"] > rows["Source tokenizer (characters) + CFT"]["bytes_per_token"]


def test_numbers_of_the_plan(table, plan):
    row = table[0]["rows"][2]
    nonzeros = 63 + 400  # the diagonal's 64th entry lies in the full column
    assert row["nonzeros_per_row"] == nonzeros / 400
    assert row["nonzeros_per_column"] == nonzeros / 64
    assert row["nonzero_share"] == nonzeros / (400 * 64)
    mass = 63 + 4.0
    entropy = -63 / mass * math.log(1 / mass) - 4 / mass * math.log(0.01 / mass)
    assert row["entropy"] == pytest.approx(entropy, rel=1e-6)  # P is stored in float32
    assert table[0]["rows"][3]["entropy"] is None


def test_marginal_errors(runs, plan):
    (summary,) = summarize(load_translation(runs[0] / "translation")).values()
    rows, columns = plan.double().sum(1) * 400, plan.double().sum(0) * 64
    assert summary.row_error == pytest.approx(float((rows - 1).abs().max()), rel=1e-6)
    assert summary.col_error == pytest.approx(float((columns - 1).abs().max()), rel=1e-6)


def test_guesses_without_a_model(table, protein_data):
    data = json.loads((protein_data / "manifest.json").read_text())
    counts = [data["splits"][split]["byte_counts"] for split in ("train", "validation")]
    total = sum(counts[0].values()) + 256
    nats = sum(-n * math.log((counts[0].get(b, 0) + 1) / total) for b, n in counts[1].items())
    uniform, unigram = table[0]["rows"][:2]
    assert uniform["label"] == "Uniform over the 20 amino acids"
    assert uniform["bits_per_byte"] == pytest.approx(4.321928, abs=1e-6)
    assert unigram["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(counts[1].values()))


def test_uniform_over_text_counts_its_bytes():
    splits = {"train": {"byte_counts": {"a": 5, "b": 1, "\n": 2, " ": 1}}}
    assert uniform_bits({"splits": splits}) == (2.0, "the 4 byte values of the train split")


def test_unigram_gives_unseen_bytes_one_count():
    splits = {"train": {"byte_counts": {"a": 254}}, "validation": {"byte_counts": {"a": 1, "z": 1}}}
    expected = (-math.log2(255 / 510) - math.log2(1 / 510)) / 2
    assert unigram_bits({"splits": splits}) == pytest.approx(expected)


def test_training_loss_in_bits(runs, protein_data):
    run = read_run(runs[0])
    held = json.loads((protein_data / "manifest.json").read_text())["splits"]["train"]
    expected = 4.0 / math.log(2) * held["tokens"] / held["bytes"]
    assert run.training_bits({"loss": 4.0}) == pytest.approx(expected)


def test_transferred_translation_is_told(runs, source_model, protein_data, tmp_path):
    stages = [{**FINETUNE, "translation": str(runs[0] / "translation")}]
    recipe = make_recipe(tmp_path / "transfer", source_model, protein_data, stages)
    run = read_run(write_run(recipe, stage_lines(0, 5, 4.5, 4.2)))
    assert [row.label for row in make_rows([run])[2:]] == [
        "S2T2, transferred, before CFT",
        "S2T2, transferred + CFT",
    ]


def test_written_files(table):
    _, out = table
    best = next(line for line in (out / "table.md").read_text().splitlines() if "**" in line)
    assert best.startswith("| **S2T2 + CFT** | **s2t2** | **4.100** |")
    image = matplotlib.image.imread(out / "figure.png")
    assert image.shape[1] > 1500
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50, "an empty picture"


def test_three_files_are_replaced_and_nothing_else(runs, tmp_path):
    out = tmp_path / "comparison"
    compare(runs[:1], out)
    (out / "notes.txt").write_text("mine")
    compare(runs[1:2], out)
    assert "truncated" in (out / "table.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["comparison"]
    made = {"table.md", "table.json", "figure.png"}
    assert {path.name for path in out.iterdir()} == {*made, "notes.txt"}
    assert (out / "notes.txt").read_text() == "mine"


def test_unfinished_run_is_named(runs, tmp_path, capsys):
    shutil.copytree(runs[1], tmp_path / "cut")
    (tmp_path / "cut" / "status.json").write_text('{"state": "preempted"}')
    arguments = ["compare", str(runs[0]), str(tmp_path / "cut"), "--out", str(tmp_path / "out")]
    code = cli.run(arguments)
    assert code == cli.USER_ERROR
    assert f"{tmp_path / 'cut'} is preempted, not done" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_text_is_refused(runs, source_model, protein_fasta, protein_tokenizer, tmp_path):
    build_shards([protein_fasta], protein_tokenizer, tmp_path / "data", BuildOptions(32, 0.4))
    stages = [{**FINETUNE, "init": "truncate"}]
    recipe = make_recipe(tmp_path / "other", source_model, tmp_path / "data", stages)
    write_run(recipe, stage_lines(0, 5, 9.0, 4.3))
    with pytest.raises(DataError, match="different text in train or validation"):
        compare([runs[0], tmp_path / "other"], tmp_path / "out")


def test_command_prints_the_table(runs, tmp_path, capsys, print_width):
    print_width(80)
    code = cli.run(["compare", *map(str, runs), "--out", str(tmp_path / "out")])
    assert code == 0
    printed = capsys.readouterr().out
    assert "* S2T2 + CFT" in printed
    assert "4.100" in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 80


def test_smoothing_keeps_the_mean_of_a_window():
    line = np.arange(45.0)  # a window of 3: the average of a straight line is the line
    assert smooth(line)[1:-1] == pytest.approx(line[1:-1])
    assert smooth(line)[0] == pytest.approx(0.5)
    assert smooth(np.ones(0)).size == 0


def test_sharpest_part_of_a_plan(runs, plan):
    translation = load_translation(runs[0] / "translation")
    part = sharpest_part(translation, 10)
    assert part.shape == (10, 10)
    assert part.max() == pytest.approx(float(plan.max()) * 400 * 64, rel=1e-6)
    ordered = in_blocks(part)
    assert sorted(ordered.flatten()) == sorted(part.flatten())


def test_show_names_the_sharpest_tokens(runs, source_model, protein_tokenizer, capsys):
    translation = load_translation(runs[0] / "translation")
    learned = translation.embed_plan
    assert sharpest_columns(learned, 63) == list(range(63))
    assert top_sources(translation, learned, 3, 5) == [(15, 1.0)]
    assert top_sources(translation, learned, 63, 2)[0][1] == pytest.approx(1 / 400, rel=1e-6)
    code = cli.run(["translation", "show", str(runs[0] / "translation"), "--top", "2"])
    assert code == 0
    printed = capsys.readouterr().out
    source = AutoTokenizer.from_pretrained(source_model).convert_ids_to_tokens(15)
    target = AutoTokenizer.from_pretrained(protein_tokenizer).convert_ids_to_tokens(3)
    line = next(line for line in printed.splitlines() if f"│ {target!r} " in line)
    assert f"{source!r} 100.0%" in line
    assert "463 (1.81%)" in printed


def test_separate_plans_are_both_reported(runs, plan, source_model, protein_data, tmp_path, capsys):
    """The table holds means of the two plans; `translation show` describes each."""
    stages = [{**TRANSLATE, "plans": "separate"}, FINETUNE]
    recipe = make_recipe(tmp_path / "two", source_model, protein_data, stages)
    write_run(recipe, stage_lines(0, 10, 6.0, 4.4) + stage_lines(1, 5, 4.4, 4.1))
    diagonal = plan.clone()
    diagonal[:, 63] = 0
    write_plan(recipe, plan, evaluation(4.4), diagonal / diagonal.sum())
    compare([runs[0], tmp_path / "two"], tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    labels = [row["label"] for row in rows[4:]]
    assert labels == [
        "S2T2 (P for E, P for L), translation only",
        "S2T2 (P for E, P for L) + CFT",
    ]
    assert rows[4]["nonzeros_per_row"] == (463 + 63) / 2 / 400
    given = {**FINETUNE, "translation": str(tmp_path / "two" / "translation")}
    transfer = make_recipe(tmp_path / "transfer", source_model, protein_data, [given])
    run = read_run(write_run(transfer, stage_lines(0, 5, 4.5, 4.2)))
    assert make_rows([run])[3].label == "S2T2 (P for E, P for L), transferred + CFT"
    assert cli.run(["translation", "show", str(tmp_path / "two" / "translation")]) == 0
    printed = capsys.readouterr().out
    assert "463 (1.81%)" in printed and "63 (0.25%)" in printed
    assert "target tokens (for E)" in printed and "target tokens (for L)" in printed


def test_show_refuses_another_tokenizer(runs, protein_tokenizer, capsys):
    path = str(runs[0] / "translation")
    code = cli.run(["translation", "show", path, "--source-tokenizer", str(protein_tokenizer)])
    assert code == cli.USER_ERROR
    assert "the translation was learned for" in capsys.readouterr().err


def test_the_same_run_twice_is_refused(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(runs[0].parent)
    with pytest.raises(DataError, match="is given twice"):
        compare([runs[0], runs[1], Path(runs[0].name)], tmp_path / "out")


def test_runs_with_one_name_and_names_with_any_character(runs, tmp_path):
    """Of two folders; with a Markdown mark, TeX's dollar, and a character that no font here has."""
    for name in ("a/x", "b/x", "c/p|q $x_1$ \u4f60 *"):
        shutil.copytree(runs[0], tmp_path / name)
    paths = [tmp_path / "a/x", tmp_path / "b/x", tmp_path / "c/p|q $x_1$ \u4f60 *"]
    compare(paths, tmp_path / "out")
    table = json.loads((tmp_path / "out/table.json").read_text())
    names = {row["run"] for row in table["rows"] if row["run"]}
    assert names == {"a/x", "b/x", "c/p|q $x_1$ \u4f60 *"}
    lines = (tmp_path / "out/table.md").read_text().splitlines()
    columns = {line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}
    assert len(columns) == 1
    assert drawable("p $x$ \u4f60") == "p \\$x\\$ U+4F60"


def test_the_base_model_is_not_needed(source_tokenizer, protein_data, tmp_path):
    """It may be on another machine by now."""
    model = make_source_model(tmp_path / "model", source_tokenizer)
    recipe = make_recipe(tmp_path / "run", model, protein_data, [{**TRANSLATE, "max_steps": 2}])
    write_run(recipe, stage_lines(0, 2, 5.0, 4.0))
    shutil.rmtree(model)
    assert read_run(tmp_path / "run").recipe.stages[0].max_steps == 2


@pytest.mark.parametrize(
    "change", [lambda t: t.replace('"loss": 3.5', '"loss": 3.4'), lambda t: t + t.splitlines()[-1]]
)
def test_metrics_that_were_altered_are_refused(change, source_model, protein_data, tmp_path):
    recipe = make_recipe(tmp_path / "run", source_model, protein_data, [TRANSLATE])
    lines = stage_lines(0, 10, 5.0, 4.0)
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    write_run(recipe, lines, metrics_sha256=hashlib.sha256(content).hexdigest())
    assert read_run(tmp_path / "run").lines(0) == lines
    path = tmp_path / "run/metrics.jsonl"
    path.write_text(change(path.read_text()))
    with pytest.raises(ArtifactError, match=r"metrics.jsonl was altered after it was written"):
        read_run(tmp_path / "run")
