"""The halves of the validation documents: disjoint, covering, the same text for any tokenizer."""

import hashlib
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from data_prep.build import BuildOptions, build_shards
from s2t2_dist.data.evaluate import evaluate
from s2t2_dist.data.shards import ShardReader
from s2t2_dist.errors import DataError
from s2t2_dist.study.halves import Halves, evaluate_halves, half_of
from tests.conftest import write_fasta


@pytest.fixture(scope="module")
def reader(protein_data) -> ShardReader:
    return ShardReader(protein_data, "validation")


def logits_of(seed: int, vocabulary: int, context: int = 32):
    """A function of (position, token), with no model: random numbers."""
    table = torch.randn(context, vocabulary, vocabulary, generator=torch.manual_seed(seed))

    def logits(ids_BT, positions_BT=None):
        at = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
        return table[at if positions_BT is None else positions_BT, ids_BT]

    return logits


def documents(reader: ShardReader) -> list[list[int]]:
    """Token ids of each document, in order: cut where the reader says that one starts."""
    found: list[list[int]] = []
    for row in range(len(reader)):
        starts = set(reader.document_starts(row).tolist())
        for position, token in enumerate(reader[row][: reader.length(row)].tolist()):
            if position in starts:
                found.append([])
            found[-1].append(token)
    return found


def test_the_rule_is_the_stated_hash():
    for number in (0, 1, 7, 12345):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        assert half_of(number) == int(digest[1], 16) % 2  # of the first byte, the lower digit
    share = np.mean([half_of(number) for number in range(4000)])
    assert abs(share - 0.5) < 4 * 0.5 / 4000**0.5


def test_the_halves_are_disjoint_and_cover_every_token(reader):
    halves = Halves.of(reader)
    texts = documents(reader)
    assert len(texts) == halves.documents == sum(halves.counts) and min(halves.counts) > 0
    lengths = Counter()
    for row in range(len(reader)):
        lengths.update(halves.documents_of(row)[: reader.length(row)].tolist())
    assert [lengths[number] for number in range(len(texts))] == [len(text) for text in texts]
    assert halves.text_bytes.tolist() == [int(reader.token_bytes[text].sum()) for text in texts]
    assert halves.text_bytes.sum() == reader.metadata["splits"]["validation"]["bytes"]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_together_they_are_the_evaluation(reader, mask, seed):
    """Tokens and bytes exactly; nats to 1e-5: `evaluate` sums batches in float32."""
    halves, logits = Halves.of(reader), logits_of(seed, 64)
    device = torch.device("cpu")
    whole = evaluate(logits, reader, 7, device, document_mask=mask)
    parts = evaluate_halves(logits, halves, 5, device, mask)
    assert sum(part.tokens for part in parts) == whole.tokens
    assert sum(part.bytes for part in parts) == whole.bytes
    assert sum(part.nats for part in parts) == pytest.approx(whole.nats, rel=1e-5)


@pytest.mark.parametrize("mask", [False, True])
def test_each_half_is_the_sum_of_its_documents(reader, mask):
    """Token by token, without batches. 1e-5: float32 logits in another order of summation."""
    halves, logits = Halves.of(reader), logits_of(11, 64)
    nats, tokens = np.zeros(2), np.zeros(2, dtype=int)
    document = -1
    for row in range(len(reader)):
        ids, starts = reader[row].astype(np.int64), set(reader.document_starts(row).tolist())
        start = 0
        for t in range(reader.length(row)):
            if t in starts:
                document, start = document + 1, t
            if t == 0 or (mask and t in starts):
                continue
            place = torch.tensor([[t - 1 - start if mask else t - 1]])
            out = logits(torch.tensor([[int(ids[t - 1])]]), place)[0, 0].double()
            half = half_of(document)
            nats[half] += float(torch.logsumexp(out, 0) - out[int(ids[t])])
            tokens[half] += 1
    parts = evaluate_halves(logits, halves, 4, torch.device("cpu"), mask)
    assert [part.tokens for part in parts] == tokens.tolist()
    assert [part.nats for part in parts] == pytest.approx(nats.tolist(), rel=1e-5)


def test_two_tokenizers_of_one_text_have_the_same_halves(reader, source_data):
    characters = Halves.of(ShardReader(source_data, "validation"))
    merged = Halves.of(reader)
    assert len(characters.reader) > len(merged.reader)
    assert characters.text_sha256 == merged.text_sha256
    assert characters.counts == merged.counts


def test_other_documents_are_seen(reader, protein_fasta, protein_tokenizer, tmp_path):
    """The same bytes in all, but in documents of other lengths."""
    build_shards([protein_fasta], protein_tokenizer, tmp_path / "data", BuildOptions(32, 0.4))
    other = Halves.of(ShardReader(tmp_path / "data", "validation"))
    assert other.text_sha256 != Halves.of(reader).text_sha256


def test_a_half_without_documents_is_refused(protein_tokenizer, tmp_path):
    records = {f"p{number}": "MKVLAAGIVG" * 5 for number in range(40)}
    fasta = write_fasta(tmp_path / "few.fasta", records)
    for fraction in np.arange(0.005, 0.2, 0.005):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        try:
            build_shards(
                [fasta], protein_tokenizer, tmp_path / "data", BuildOptions(32, float(fraction))
            )
        except DataError:  # no document is held out
            continue
        break
    validation = ShardReader(tmp_path / "data", "validation")
    assert validation.metadata["splits"]["validation"]["documents"] == 1
    with pytest.raises(DataError, match="no document of the 1 in validation is in the half"):
        Halves.of(validation)
