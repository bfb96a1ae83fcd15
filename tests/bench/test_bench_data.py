"""The data benchmark: same work for everyone, and a projection that is arithmetic."""

import gzip

import numpy as np
import pytest
from datasets import load_from_disk

from data_prep.readers import read_documents
from data_prep.tokenizer import train_tokenizer
from s2t2_dist.data.shards import ShardReader
from tests.bench import data, data_others, data_page

REPORT = {
    "cores": 2,
    "context": 512,
    "large_residues": data_page.RESIDUES // 100,
    "large_encode_seconds": 10.0,
    "large_pack_seconds": 2.0,
    "large_tokens": data_page.RESIDUES // 200,
    "large_shard_bytes": 10**8,
    "look_seconds": 0.0,
    "read_seconds": 0.5,
    "hash_bytes_per_second": data_page.GZIP_BYTES / 7,
    "machine": {"cpu": "a machine"},
}


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    return data.synthetic(tmp_path_factory.mktemp("fasta") / "p.fasta.gz", records=300)


def test_projection_is_arithmetic_on_the_measured_rates():
    # 100 times the input on 8 times the cores.
    few = data_page.project(REPORT, 16)
    assert few["encode"] == pytest.approx(10 * 100 / 8)
    assert few["pack"] == pytest.approx(2 * 100 / 8)
    assert (few["hash"], few["bytes"]) == pytest.approx((7, 10**10))
    # Unzipping is on one core, and packing on no more than there are shards: 8.6 G tokens in 64.4.
    many = data_page.project(REPORT, 128)
    assert many["encode"] == many["read"] == pytest.approx(50)
    shards = data_page.RESIDUES / 2 / (512 * 262_144)
    assert many["pack"] == pytest.approx(2 * 100 * 2 / shards)
    slow = data_page.project({**REPORT, "look_seconds": 1e-3}, 16)
    assert slow["pack"] > few["pack"] + 1


def test_the_table_goes_between_its_marks():
    page = f"before\n{data_page.BEGIN}\nold\n{data_page.END}\nafter\n"
    found = data_page.with_projection(page, REPORT)
    assert found.startswith(f"before\n{data_page.BEGIN}\n") and "old" not in found
    assert found.endswith(f"{data_page.END}\nafter\n")
    assert found.count("projected (not run)") == 1
    assert data_page.with_projection(found, REPORT) == found


@pytest.mark.slow
def test_everyone_does_the_same_work(fasta, tmp_path):
    train_tokenizer([fasta], tmp_path / "t", 60)
    texts = data.sequences(fasta)
    assert texts == [document.text for document in read_documents([fasta])]
    data.build(fasta, tmp_path / "t", tmp_path / "d", 1)
    data_others.with_datasets(fasta, tmp_path / "t", 1, tmp_path / "s")
    saved = load_from_disk(str(tmp_path / "s")).with_format("numpy")
    theirs = np.concatenate([saved[i]["tokens"] for i in range(len(saved))])
    splits = [ShardReader(tmp_path / "d", split) for split in ("train", "validation")]
    ours = np.concatenate([r[i][: r.length(i)] for r in splits for i in range(len(r))])
    # Theirs, in file order, leaves out the last short row.
    assert 0 <= len(ours) - len(theirs) < data.CONTEXT
    differing = np.bincount(ours, minlength=60) - np.bincount(theirs, minlength=60)
    assert differing.min() >= 0
    found = data_others.libraries(tmp_path / "t", texts)
    assert {"tokenizers", "bpe.cpp"} <= found.keys()
    assert found["bpe.cpp"]["other_tokens"] == 0


def test_the_larger_input_is_the_small_one_over_and_over(fasta, tmp_path):
    data.enlarge(fasta, tmp_path / "x.fasta.gz")
    texts, ids = data.sequences(fasta), set()
    found = list(read_documents([tmp_path / "x.fasta.gz"]))
    assert [document.text for document in found] == texts * data.TIMES
    ids = {document.id for document in found}
    assert len(ids) == len(found)
    assert gzip.decompress((tmp_path / "x.fasta.gz").read_bytes()).startswith(b">0_S0 ")
