"""An exported folder is an ordinary Hugging Face folder that gives the run's validation loss."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from s2t2_dist import artifacts, cli
from s2t2_dist.config import METHODS, load_recipe
from s2t2_dist.data.evaluate import Evaluation
from s2t2_dist.data.order import row_at
from s2t2_dist.data.shards import ShardReader
from s2t2_dist.errors import ArtifactError, DataError, S2T2Error
from s2t2_dist.lm.inputs import is_from_hub
from s2t2_dist.lm.result import write_model
from s2t2_dist.report.contents import UNTRAINED
from s2t2_dist.report.export import copy_weights, release, untrained_ids
from s2t2_dist.report.verify import verify_model
from tests.conftest import make_source_model
from tests.report import runs
from tests.report.runs import evaluate_folder, make_exportable_run

# What a user without this package does. It reads rows that the test wrote as JSON.
STRANGER = """
import sys
sys.modules["s2t2_dist"] = None  # importing it now fails
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, rows = sys.argv[1], json.load(open(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
nats = tokens = 0
for row in rows:
    ids = torch.tensor([row])
    with torch.no_grad():
        nats += float(model(ids, labels=ids).loss) * (len(row) - 1)
    tokens += len(row) - 1
text = tokenizer.decode(tokenizer.encode("MKVLAAGRW"))
end = model.generation_config.eos_token_id
print(json.dumps({"loss": nats / tokens, "text": text, "end": end}))
"""


@pytest.fixture(scope="module", params=[True, False], ids=["finetuned", "translated"])
def run_dir(request, source_model, protein_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    return make_exportable_run(folder, source_model, protein_data, finetuned=request.param)


@pytest.fixture
def exported(run_dir, tmp_path):
    release(run_dir, tmp_path / "exports" / "proteins")
    return tmp_path / "exports" / "proteins"


@pytest.mark.slow
def test_loads_where_this_package_cannot_be_imported(exported, protein_data, tmp_path):
    reader = ShardReader(protein_data, "validation")
    rows = [reader[i][: reader.length(i)].tolist() for i in range(len(reader))]
    (tmp_path / "rows.json").write_text(json.dumps([row for row in rows if len(row) > 1]))
    (tmp_path / "stranger.py").write_text(STRANGER)
    command = [sys.executable, "-I", "stranger.py", exported, "rows.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    evaluation = artifacts.read_manifest(exported)["evaluation"]
    # The same float32 weights, row by row instead of in batches: rounding only.
    assert found["loss"] == pytest.approx(evaluation["nats"] / evaluation["tokens"], rel=1e-5)
    assert found["text"] == "MKVLAAGRW"
    assert found["end"] == 0


def test_is_untied_verified_and_described(exported):
    config = AutoConfig.from_pretrained(exported)
    assert (config.vocab_size, config.tie_word_embeddings) == (64, False)
    assert all(check.passed for check in verify_model(exported))
    card = (exported / "README.md").read_text()
    bits = evaluate_bits(exported)
    for expected in ("# proteins", f"| {bits:.4f} |", "proteins.fasta", "licences\nof both apply"):
        assert expected in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    assert f"transport plan, {METHODS['dykstra']};" in card, "the name that the comparison uses"


def test_weights_that_cannot_be_read_are_refused_by_evaluate(exported, protein_data, capsys):
    path = exported / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code = cli.run(["evaluate", str(exported), str(protein_data)])
    assert code == cli.USER_ERROR
    assert f"{path} is truncated or damaged" in capsys.readouterr().err


def evaluate_bits(folder):
    manifest = artifacts.read_manifest(folder)
    return evaluate_folder(folder, manifest["recipe"]["data"]["path"]).bits_per_byte


def test_shards_hold_the_same_model(run_dir, exported, tmp_path):
    release(run_dir, tmp_path / "sharded", "20KB")
    files = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(files) > 2
    one, many = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (exported, tmp_path / "sharded")
    )
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_sharding_a_tied_model_keeps_every_byte(source_model, tmp_path):
    copy_weights(source_model, tmp_path, "30KB")
    merged = {}
    for path in tmp_path.glob("*.safetensors"):
        merged |= load_file(path)
    original = load_file(source_model / "model.safetensors")
    assert merged.keys() == original.keys()
    assert all(torch.equal(merged[name], original[name]) for name in merged)


def test_untrained_tokens_are_those_of_no_visited_row(run_dir, protein_data):
    recipe, reader = load_recipe(run_dir / "config.yaml"), ShardReader(protein_data, "train")
    few = untrained_ids(recipe, reader)
    long = recipe.stages[0].model_copy(update={"max_steps": 10_000})
    every = untrained_ids(recipe.model_copy(update={"stages": [long]}), reader)
    seen = {int(i) for row in range(len(reader)) for i in reader[row][: reader.length(row)]}
    assert every == sorted(set(range(64)) - seen)
    assert {1, 2} <= set(every) <= set(few)


def test_stages_visit_rows_one_after_the_other(source_model, protein_data, tmp_path):
    """Two stages of one row each saw the first two rows of the order."""
    one_row = {"max_steps": 1, "train_batch_size": 1, "per_device_train_batch_size": 1}
    stages = [{**runs.TRANSLATE, **one_row}, {**runs.FINETUNE, **one_row}]
    recipe = runs.make_recipe(tmp_path / "run", source_model, protein_data, stages)
    reader = ShardReader(protein_data, "train")
    rows = [row_at(position, len(reader), recipe.seed) for position in (0, 1)]
    seen = {int(i) for row in rows for i in reader[row][: reader.length(row)]}
    first = {int(i) for i in reader[rows[0]][: reader.length(rows[0])]}
    assert first < seen, "the second row must add tokens for this test to mean something"
    assert untrained_ids(recipe, reader) == sorted(set(range(64)) - seen)


@pytest.mark.parametrize("size", ["foo", "5", "infGB", ""])
def test_a_size_that_is_none_is_refused_at_once(tmp_path, capsys, size):
    command = ["export", str(tmp_path / "absent"), "--out", str(tmp_path / "out")]
    code = cli.run([*command, "--max-shard-size", size])
    assert code == cli.USER_ERROR
    message = capsys.readouterr().err
    assert message.startswith(f"error: max_shard_size: {size!r} is not a size")
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_equal_rows_of_trained_tokens_are_refused(run_dir, source_model, protein_data, tmp_path):
    """A uniform plan gives every token the same row."""
    stages = [runs.TRANSLATE]
    recipe = runs.make_recipe(tmp_path / "run", source_model, protein_data, stages)
    runs.write_run(recipe, [])
    uniform = torch.full((400, 64), 1 / (400 * 64))
    runs.write_plan(recipe, uniform, runs.Evaluation(1.0, 1, 1))
    with pytest.raises(ArtifactError, match="'duplicate rows': embedding rows that are equal"):
        release(tmp_path / "run", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_an_unfinished_run_is_refused(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    last = "model" if (run_dir / "model").exists() else "translation"
    (tmp_path / "run" / last / "COMPLETE").unlink()
    with pytest.raises(ArtifactError, match=f"not finished .{last}/ is not complete"):
        release(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_altered_run_is_refused(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    last = "model" if (run_dir / "model").exists() else "translation"
    path = next((tmp_path / "run" / last).glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="was altered"):
        release(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(run_dir, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    code = cli.run(["export", str(run_dir), "--out", str(tmp_path / "out")])
    assert code == cli.USER_ERROR
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'out'} exists")
    assert not list((tmp_path / "out").iterdir())


def test_data_of_another_tokenizer_are_refused(run_dir, source_data, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["data"]["path"] = str(source_data)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(DataError, match="tokenizer"):
        release(tmp_path / "run", tmp_path / "out")


def test_config_tells_the_dtype_of_the_weights(source_tokenizer, source_data, tmp_path):
    """Training in bfloat16 from a float32 base leaves bfloat16 weights."""
    base = make_source_model(tmp_path / "base", source_tokenizer, tied=False)
    weights = {k: v.bfloat16() for k, v in load_file(base / "model.safetensors").items()}
    ids = {"eos_token_id": 0, "pad_token_id": 1}
    write_model(tmp_path / "model", weights, base, source_data, ids, {})
    checks = {check.name: check for check in verify_model(tmp_path / "model", untrained=[])}
    assert checks["dtype"].passed, checks["dtype"].found
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token_id == 0


def test_manifest_records_origin(exported, run_dir):
    manifest = artifacts.verify(exported)
    assert manifest["kind"] == "model"
    assert manifest["recipe"]["output_dir"] == str(run_dir)
    assert {1, 2} <= set(manifest[UNTRAINED])


# What the run stood on, and where it is now


@pytest.fixture
def project(request, source_tokenizer, protein_data, tmp_path, monkeypatch):
    """A working directory with a model, data and a run whose recipe names them relative to it."""
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.chdir(root)
    make_source_model(root / "model", source_tokenizer)
    shutil.copytree(protein_data, root / "data")
    finetuned = getattr(request, "param", False)
    make_exportable_run(Path("runs/x"), Path("model"), Path("data"), finetuned=finetuned)
    return root


def _flip_weights(folder):
    """Other weights in a file of the same size."""
    path = folder / "model.safetensors"
    weights = {k: -v for k, v in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def test_a_base_that_changed_since_is_refused(project):
    """A translate-only run folds into it."""
    release(project / "runs/x", project / "before")
    _flip_weights(project / "model")
    with pytest.raises(ArtifactError, match=r"model changed after .*runs/x was trained .*model.sa"):
        release(project / "runs/x", project / "out")
    assert not (project / "out").exists() and not list(project.glob(".*"))


def test_data_that_changed_since_are_refused(project, source_data):
    shutil.rmtree(project / "data")
    shutil.copytree(source_data, project / "data")
    with pytest.raises(DataError, match="tokenizer"):
        release(project / "runs/x", project / "out")


@pytest.mark.parametrize("project", [True, False], indirect=True, ids=["finetuned", "translated"])
def test_the_inputs_are_found_from_another_folder_and_after_a_move(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    release(project / "runs/x", tmp_path / "elsewhere")
    card = (tmp_path / "elsewhere/README.md").read_text()
    assert "`model`, moved to another domain" in card and "base_model" not in card
    moved = project.rename(tmp_path / "renamed")
    release(moved / "runs/x", tmp_path / "after")
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("elsewhere", "after"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    shutil.move(moved / "runs/x", tmp_path / "alone")  # its inputs stay where they were not
    with pytest.raises(S2T2Error, match="data"):
        release(tmp_path / "alone", tmp_path / "out")


def test_another_number_than_the_cards_is_refused(project):
    """The plan's record says what the run measured; here it is wrong."""
    shutil.rmtree(project / "runs/x/translation")
    recipe, plan = load_recipe(project / "runs/x/config.yaml"), runs.random_plan(400, 64)
    runs.write_plan(recipe, plan, Evaluation(nats=123.0, tokens=100, bytes=200))
    with pytest.raises(ArtifactError, match=r"bits per byte, but the run had 0\.8873"):
        release(project / "runs/x", project / "out")
    assert not (project / "out").exists()
    release(project / "runs/x", project / "unseen", evaluation=False)
    assert (project / "unseen" / "COMPLETE").exists()


def test_what_a_killed_export_left_is_removed_and_what_another_writes_is_not(project):
    left = [project / ".out.tmp-123", project / ".out.fold-abc", project / ".out.tmp-1-aa"]
    for path in left:
        path.mkdir()
        (path / "x").touch()
    with artifacts.scratch_directory(project / "out") as held:
        release(project / "runs/x", project / "out", evaluation=False)
        assert held.is_dir()
    assert not list(project.glob(".*"))


@pytest.mark.parametrize(
    ("out", "named"),
    [
        ("file/x", "a folder above it is a file"),
        ("file", "file exists; choose another folder"),
        ("link", "link exists; choose another folder"),
        ("n" * 256, "a name is too long"),
        ("d/" + "n" * 256 + "/x", "a name is too long"),
        ("n" * 255, None),
        ("ä" * 127, None),
    ],
)
def test_a_target_that_cannot_be_is_one_line(out, named, project, capsys):
    (project / "file").write_text("x")
    (project / "link").symlink_to(project / "nowhere")
    code = cli.run(["export", "runs/x", "--out", out, "--no-evaluate"])
    told = capsys.readouterr()
    if named is None:
        assert code == 0 and (project / out / "COMPLETE").exists(), told.err
        return
    assert code == 2 and named in told.err and told.err.count("\n") == 1


@pytest.mark.slow
def test_a_full_disk_is_one_line(project, capsys):
    """safetensors reports it as an error of its own."""
    (project / "small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", project / "small"]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        assert cli.run(["export", "runs/x", "--out", "small/out"]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and told.count("\n") == 1
        assert "No space left" in told or "no space left" in told
        assert not list((project / "small").iterdir())
    finally:
        subprocess.run(["umount", project / "small"], check=True)


@pytest.mark.parametrize("size", ["-1GB", "0GB", "0", "5", "GB", "nanGB", "infGB", "5 XB"])
def test_a_shard_size_that_is_none_is_refused(size, project, capsys):
    assert cli.run(["export", "runs/x", "--out", "out", "--max-shard-size", size]) == 2
    assert "max_shard_size" in capsys.readouterr().err


def test_the_card_names_a_base_of_the_hub(project):
    """Its folder is the hub's snapshot of that name; a folder that is spelled like one is none."""
    path = project / "runs/x/inputs.json"
    for folder, hub in (("models--a--b/snapshots/1", True), ("a/b", False)):
        record = json.loads(path.read_text())
        record["inputs"]["model"] |= {"given": "a/b", "path": f"/somewhere/{folder}"}
        record.pop("sha256")
        record["sha256"] = artifacts.sha256_json(record)
        path.write_text(json.dumps(record))
        assert is_from_hub(project / "runs/x") == hub
