"""Parquet: a row is a document; columns that cannot be one are named."""

import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.readers import ReadCounts, ReadOptions, read_documents
from s2t2_dist.errors import DataError


def texts(path, **options):
    return [document.text for document in read_documents([path], ReadOptions(**options))]


TABLE = {"id": ["a", None, "c"], "text": ["one", "tw\u00f6", ""], "n": [1, 2, 3]}


def parquet(path, table=TABLE, **options):
    pq.write_table(pa.table(table), path, **options)
    return path


@pytest.mark.parametrize("name", ["x.parquet", "x", "x.txt"])
@pytest.mark.parametrize("codec", ["snappy", "zstd", "none"])
def test_parquet(tmp_path, name, codec):
    path = parquet(tmp_path / name, compression=codec)
    counts = ReadCounts()
    documents = list(read_documents([path], counts=counts))
    assert [document.text for document in documents] == ["one", "tw\u00f6"]
    assert (documents[0].id, len(documents[1].id), counts.empty) == ("a", 64, 1)
    with pytest.raises(DataError, match="line 3: the field 'text' is empty"):
        texts(path, strict=True)


def test_parquet_of_many_rows_and_chunks(tmp_path):
    rows = [f"text {i} \u00e9" for i in range(3000)]
    table = {"number": list(range(3000)), "code": pa.array(rows).dictionary_encode()}
    path = parquet(tmp_path / "x.parquet", table, row_group_size=700)
    read = ReadOptions(field="code", id_field="number")
    for size in (100, 5000, None):
        documents = list(read_documents([path], read, chunk_size=size))
        assert documents == [(str(i), row) for i, row in enumerate(rows)]


def test_parquet_mistakes(tmp_path):
    path = parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"has the columns 'id', 'text', 'n', not 'code'.*--field"):
        texts(path, field="code")
    with pytest.raises(DataError, match=r"line 1: .*found the number 1 in that field"):
        texts(path, field="n")
    with pytest.raises(DataError, match="no text in its columns"):
        texts(parquet(tmp_path / "y.parquet", {"text": [b"\xff"]}))
    with pytest.raises(DataError, match="truncated or damaged Parquet"):
        (tmp_path / "z.parquet").write_bytes(path.read_bytes()[:-5])
        texts(tmp_path / "z.parquet")


@pytest.mark.parametrize("value", [b"\x01", datetime.datetime(2026, 1, 1), datetime.date.max])
def test_parquet_with_an_id_that_is_none(tmp_path, value):
    path = parquet(tmp_path / "x.parquet", {"id": [value], "text": ["a"]})
    kind = type(value).__name__
    with pytest.raises(DataError, match=rf"the id column 'id' holds {kind}.*--id-field, or ''"):
        texts(path)
    assert texts(path, id_field="") == ["a"]


def test_a_parquet_document_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.sources.LONGEST_DOCUMENT", 1000)
    path = parquet(tmp_path / "x.parquet", {"text": ["a", "b" * 1000]})
    with pytest.raises(DataError, match=r"x\.parquet: a document is longer than 1,000 bytes"):
        texts(path)
