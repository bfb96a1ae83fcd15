"""`evaluate --marginal` on real shards: every piece against an enumeration, and the command."""

import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from data_prep.build import BuildOptions, build_shards
from data_prep.readers import RESIDUES
from data_prep.tokenizer import load_tokenizer, train_tokenizer
from s2t2_dist import cli
from s2t2_dist.data.evaluate import Evaluation
from s2t2_dist.data.shards import ShardReader
from s2t2_dist.errors import ArtifactError, DataError
from s2t2_dist.report.marginal import (
    ODDS,
    MarginalEvaluation,
    read_rows,
    report_marginal,
    score_marginal,
)
from tests.conftest import make_source_model, write_fasta
from tests.lm.tokenizations import Oracle

ALL = 10_000  # a beam that keeps every tokenization of these texts


@pytest.fixture(scope="module")
def protein_model(protein_tokenizer, tmp_path_factory):
    """A random model of 400 rows with the tokenizer of 64 tokens, as a base model may have."""
    return make_source_model(tmp_path_factory.mktemp("protein-model") / "m", protein_tokenizer)


@pytest.fixture(scope="module")
def short_data(protein_fasta, protein_tokenizer, tmp_path_factory):
    """Rows of 16 tokens: proteins of 1 to 12 residues, some cut at row ends."""
    folder = tmp_path_factory.mktemp("short")
    lines = protein_fasta.read_text().split()
    texts = [line[: 1 + i % 12] for i, line in enumerate(lines[1 : 2 * 24 : 2])]
    write_fasta(folder / "short.fasta", {f"s{i}": text for i, text in enumerate(texts)})
    build_shards([folder / "short.fasta"], protein_tokenizer, folder / "d", BuildOptions(16, 0.4))
    return folder / "d"


def read(data):
    return ShardReader(data, "validation"), load_tokenizer(data / "tokenizer")


def by_enumeration(lm, reader, tokenizer):
    """Marginal nats of every row, text by text, from the rows' tokens alone."""
    nats, texts = 0.0, []
    for row in range(len(reader)):
        ids = reader[row][: reader.length(row)].tolist()
        place = 1
        while place < len(ids):
            rest = ids[place:]
            ends = tokenizer.eos_token_id in rest
            own = rest[: rest.index(tokenizer.eos_token_id)] if ends else rest
            text = b"".join(tokenizer.token_texts[i] for i in own)
            oracle = Oracle(lm, ids[:place], tokenizer.token_texts, tokenizer.eos_token_id)
            nats -= oracle.document(text) if ends else oracle.beginning(text)
            texts.append((text, ends))
            place += len(own) + ends
    return nats, texts


def test_equals_an_enumeration_of_every_text(protein_model, short_data):
    lm = AutoModelForCausalLM.from_pretrained(protein_model).double().eval().requires_grad_(False)
    with torch.no_grad():
        for weight in lm.parameters():
            weight.mul_(2)
    reader, tokenizer = read(short_data)
    found = score_marginal(lm, reader, tokenizer, 3, ALL)
    nats, texts = by_enumeration(lm, reader, tokenizer)
    assert found.nats_at_most == found.nats_estimate == pytest.approx(nats, rel=1e-10)
    assert found.exact == found.pieces == len(texts) > 5
    assert not all(ends for _, ends in texts), "no document is cut"
    assert 0 < found.whole < sum(ends for _, ends in texts)
    assert found.evaluation.bytes == sum(len(text) for text, _ in texts)
    assert found.nats_at_most < found.nats_rows - 1
    bounded = score_marginal(lm, reader, tokenizer, 3, 2)
    assert nats < bounded.nats_at_most < found.evaluation.nats
    assert bounded.nats_estimate < bounded.nats_at_most
    assert nats < bounded.nats_likely


@pytest.mark.parametrize(
    "data", ["short_data", pytest.param("protein_data", marks=pytest.mark.slow)]
)
def test_the_rows_own_tokens_give_what_evaluate_finds(data, protein_model, request):
    """The texts are those that `evaluate` counts, end tokens included; its sums are in float32."""
    lm = AutoModelForCausalLM.from_pretrained(protein_model).eval()
    found = score_marginal(lm, *read(request.getfixturevalue(data)), 16, 1)
    assert found.nats_rows == pytest.approx(found.evaluation.nats, rel=1e-6)
    # Only a text that its row cuts has more: the longer tokens that the row's end could be.
    assert found.nats_at_most <= found.nats_rows
    assert found.nats_at_most == pytest.approx(found.nats_rows, rel=0.01)


def test_the_command_prints_both_figures(protein_model, short_data, capsys):
    arguments = ["evaluate", str(protein_model), str(short_data)]
    assert cli.run(arguments) == 0
    plain = capsys.readouterr().out
    assert cli.run([*arguments, "--marginal", "--beam", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(plain)
    lm = AutoModelForCausalLM.from_pretrained(protein_model).eval()
    found = score_marginal(lm, *read(short_data), 16, 2)
    estimate = found.bits_per_byte(found.nats_estimate)
    assert f"bits per byte    {estimate:.6f} estimated" in out
    assert f"{found.bits_per_byte(found.nats_at_most):.6f} at most, for certain" in out
    assert f"overstated by    {found.evaluation.bits_per_byte - estimate:.6f} bits" in out


def test_a_model_of_single_characters_has_one_tokenization(tmp_path, protein_model):
    """29 tokens: letters and special tokens. Nothing to sum, so the figures are the same."""
    texts = {f"s{i}": RESIDUES[i:] + RESIDUES[:i] for i in range(12)}
    write_fasta(tmp_path / "all.fasta", texts)
    train_tokenizer([tmp_path / "all.fasta"], tmp_path / "t", 29)
    build_shards([tmp_path / "all.fasta"], tmp_path / "t", tmp_path / "d", BuildOptions(32, 0.5))
    model = make_source_model(tmp_path / "m", tmp_path / "t")
    lm = AutoModelForCausalLM.from_pretrained(model).eval()
    found = score_marginal(lm, *read(tmp_path / "d"), 4, 2)
    assert found.exact == found.pieces > 0
    assert found.nats_at_most == pytest.approx(found.evaluation.nats, rel=1e-6)
    lines = report_marginal(found).splitlines()
    assert lines[-2] == f"bits per byte    {found.bits_per_byte(found.nats_rows):.6f}, exact"
    assert lines[-1].split()[2] == "0.000000"


def test_the_likely_bound_pays_for_its_confidence_once():
    """10 bits for all texts together, and never more than the bound for certain."""
    evaluation = Evaluation(100.0, 10, 20)
    found = MarginalEvaluation(evaluation, 8, 100.0, 99.0, 50.0, 1, 1, 0)
    assert found.nats_likely == pytest.approx(50 + math.log(ODDS))
    assert MarginalEvaluation(evaluation, 8, 100.0, 99.0, 98.0, 1, 1, 0).nats_likely == 99.0


def test_an_architecture_that_cannot_share_rows_is_refused():
    sizes = {"vocab_size": 30, "hidden_size": 16, "n_layer": 2, "n_head": 2}
    lm = BloomForCausalLM(BloomConfig(**sizes)).eval()
    with pytest.raises(ArtifactError, match="BloomForCausalLM cannot read paths"):
        read_rows(lm, torch.arange(8)[None])


def test_a_window_shorter_than_the_row_is_refused():
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    lm = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=8)).eval()
    with torch.no_grad():
        for weight in lm.parameters():
            weight.mul_(5)
    assert read_rows(lm, torch.arange(8)[None]) is not None
    with pytest.raises(ArtifactError, match="gives other logits where paths share a row"):
        read_rows(lm, torch.arange(24)[None])


def test_a_tokenizer_of_other_texts_is_refused(protein_model, short_data):
    reader, tokenizer = read(short_data)
    tokenizer.token_texts[5] = b"AA"
    lm = AutoModelForCausalLM.from_pretrained(protein_model).eval()
    with pytest.raises(DataError, match="spells other bytes than its token_bytes"):
        score_marginal(lm, reader, tokenizer, 4, 2)
