"""Bits per byte against transformers' own loss, whatever the batch size and the number of ranks."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2t2_dist import cli
from s2t2_dist.data.batches import IGNORE_LABEL, load_batch
from s2t2_dist.data.evaluate import Evaluation, evaluate, sum_of_nats
from s2t2_dist.data.shards import ShardReader
from tests.jobs.distributed import run_ranks

# Float32 sums of some 5,000 nats in different orders: 1e-6 is 10 times what they differ by.
TOLERANCE = 1e-6


def evaluate_folder(comm, model_dir, data_dir, batch_size):
    lm = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    reader = ShardReader(data_dir, "validation")
    logits = lambda ids: lm(ids).logits  # noqa: E731
    return evaluate(logits, reader, batch_size, torch.device("cpu"), comm)


def evaluate_with(comm, model_dir, data_dir, batch_sizes):
    return [evaluate_folder(comm, model_dir, data_dir, size) for size in batch_sizes]


def by_transformers(model_dir, data_dir) -> Evaluation:
    """Row by row, with the model's own loss and the tokenizer's own text."""
    lm = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizer")
    reader = ShardReader(data_dir, "validation")
    nats = tokens = text = 0
    for row in range(len(reader)):
        ids = torch.tensor(reader[row][: reader.length(row)].astype("int64"))[None]
        if ids.shape[1] < 2:
            continue
        with torch.no_grad():
            loss = lm(ids, labels=ids).loss
        nats += float(loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
        pieces = [tokenizer.decode([i], skip_special_tokens=True) for i in ids[0, 1:].tolist()]
        text += sum(len(piece.encode()) for piece in pieces)
    return Evaluation(nats, tokens, text)


@pytest.fixture(scope="module")
def oracle(source_model, source_data):
    return by_transformers(source_model, source_data)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_equals_the_loss_of_transformers(batch_size, oracle, source_model, source_data):
    found = evaluate_folder(None, source_model, source_data, batch_size)
    assert (found.tokens, found.bytes) == (oracle.tokens, oracle.bytes)
    assert found.loss == pytest.approx(oracle.loss, rel=TOLERANCE)
    assert found.bits_per_byte == pytest.approx(
        oracle.nats / math.log(2) / oracle.bytes, rel=TOLERANCE
    )
    assert found.perplexity == pytest.approx(math.exp(oracle.nats / oracle.tokens), rel=1e-5)


@pytest.mark.slow
def test_is_exact_on_two_ranks(oracle, source_model, source_data, tmp_path):
    """200 rows: with 3 a rank the last pass is short; with 150 the second rank gets only 50."""
    ranks = run_ranks(evaluate_with, 2, tmp_path, source_model, source_data, (3, 150))
    assert ranks[0] == ranks[1]
    for found in ranks[0]:
        assert (found.tokens, found.bytes) == (oracle.tokens, oracle.bytes)
        assert found.nats == pytest.approx(oracle.nats, rel=TOLERANCE)


def test_padding_is_not_predicted(protein_data):
    reader = ShardReader(protein_data, "validation")
    last = len(reader) - 1
    batch = load_batch(reader, [last])
    assert reader.length(last) < reader.context, "the fixture's last row must be padded"
    uniform = torch.zeros(1, reader.context, 64)
    expected = (reader.length(last) - 1) * math.log(64)
    assert float(sum_of_nats(uniform, batch.labels)) == pytest.approx(expected, rel=TOLERANCE)
    assert (batch.labels == IGNORE_LABEL).any()


def test_command_prints_what_evaluate_finds(oracle, source_model, source_data, capsys):
    code = cli.run(["evaluate", str(source_model), str(source_data), "--batch-size", "32"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert code == 0
    assert float(lines["loss"].split()[0]) == pytest.approx(oracle.loss, abs=2e-6)  # as printed
    assert f"{oracle.tokens:,} tokens, {oracle.bytes:,} bytes" in lines["tokens"]


def test_command_refuses_data_of_another_tokenizer(source_model, protein_data, capsys):
    code = cli.run(["evaluate", str(source_model), str(protein_data)])
    assert code == cli.USER_ERROR
    assert "were made with the tokenizer" in capsys.readouterr().err


def test_command_refuses_a_folder_without_a_model(protein_tokenizer, protein_data, capsys):
    code = cli.run(["evaluate", str(protein_tokenizer), str(protein_data)])
    assert code == cli.USER_ERROR
    assert "is not a Hugging Face model folder" in capsys.readouterr().err


def test_document_mask_evaluates_each_document_by_itself(source_model, source_data):
    lm = AutoModelForCausalLM.from_pretrained(source_model).eval()
    reader = ShardReader(source_data, "validation")

    def logits(ids, positions):
        return lm(ids, position_ids=positions, use_cache=False).logits

    masked = evaluate(logits, reader, 7, torch.device("cpu"), document_mask=True)
    plain = evaluate(lambda ids: lm(ids).logits, reader, 7, torch.device("cpu"))
    nats = tokens = 0
    for row in range(len(reader)):
        ids = torch.tensor(reader[row][: reader.length(row)].astype("int64"))
        starts = [s for s in reader.document_starts(row).tolist() if s]
        for document in ids.tensor_split(starts):
            if len(document) < 2:
                continue
            with torch.no_grad():
                nats += lm(document[None], labels=document[None]).loss.item() * (len(document) - 1)
            tokens += len(document) - 1
    assert masked.tokens == tokens < plain.tokens
    assert masked.nats == pytest.approx(nats, rel=TOLERANCE)
    # With attention across documents the same sum would differ by 10 tolerances.
    across = evaluate(lambda ids, _: lm(ids).logits, reader, 7, torch.device("cpu"), None, True)
    assert abs(across.nats / masked.nats - 1) > 5 * TOLERANCE
