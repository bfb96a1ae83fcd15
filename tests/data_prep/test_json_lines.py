"""Each fault of a JSON line has words of its own; `--skip-bad` counts bad rows."""

import json

import pytest

from data_prep.build import BuildOptions, build_shards
from data_prep.readers import ReadCounts, ReadOptions, read_documents
from data_prep.tokenizer import train_tokenizer
from s2t2_dist import artifacts
from s2t2_dist.cli import run
from s2t2_dist.errors import DataError
from tests.conftest import write_jsonl

FAULTS = {
    b'{"text": "a"': r"a line that was cut off .*column 13",
    b'{"text": "a': r"a line that was cut off",
    b'{"text": "a",}': r"broken JSON \(.* at column 1[34]\)",
    b"{'text': 'a'}": r"single quotes",
    b'{"text": "a"}{"text": "b"}': r"more than one value in the line .*one object per line",
    b"plain words": r"no JSON: 'plain words'",
    b"{": r"JSON over several lines",
    b'[{"text": "a"}]': r"found a list; .*jq -c '\.\[\]'",
    b'"text"': r"found text; write one object per line",
    b"3": r"found the number 3",
    b"null": r"found null",
    b"true": r"found true or false",
    b'{"id": 1, "content": "a"}': r"found the fields 'id', 'content'; name .* --field",
    b"{}": r"found the fields none",
    b'{"text": 7}': r"found the number 7 in that field",
    b'{"text": ["a", "b"]}': r"found a list in that field",
    b'{"text": {"role": "user"}}': r"found an object in that field",
    b'{"text": "\\ud800"}': r"half of a surrogate pair \(\\ud800\)",
    b'{"text": "a", "id": "\\udfff"}': r"half of a surrogate pair",
    b'{"text": "\xff"}': r"not UTF-8 \(byte 0xff at position 11\)",
    b'{"text": ' + b"[" * 100_000: r"nested too deep",
    b'{"text": "a", "n": ' + b"1" * 5000 + b"}": r"JSON that cannot be read",
    b'{"text": "a\tb"}': r"broken JSON \(Invalid control character",
    b'{"id": {"$oid": "1"}, "text": "a"}': r"the id field 'id' is neither text nor a number",
}


@pytest.mark.parametrize("line", FAULTS, ids=lambda line: line[:24].decode("latin-1"))
def test_each_fault_is_told_by_its_own_words(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "last"}\n')
    with pytest.raises(DataError, match=rf"x\.jsonl line 3: .*{FAULTS[line]}"):
        list(read_documents([path]))
    counts = ReadCounts()
    documents = list(read_documents([path], ReadOptions(skip_bad=True), counts))
    assert [document.text for document in documents] == ["good", "last"]
    assert (counts.bad, counts.bad_places) == (1, ["x.jsonl line 3"])


def test_the_words_differ():
    assert len(set(FAULTS.values())) > 15


@pytest.mark.parametrize("text", ["null", '""'])
def test_no_text_is_an_empty_document(tmp_path, text):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "good"}\n{"text": ' + text + "}\n")
    counts = ReadCounts()
    assert len(list(read_documents([path], counts=counts))) == counts.empty == 1
    with pytest.raises(DataError, match="line 2: the field 'text' is empty"):
        list(read_documents([path], ReadOptions(strict=True)))


def test_skipped_rows_are_counted_in_the_manifest_and_said(tmp_path, capsys):
    texts = [f"text number {i} of the kinase" for i in range(200)]
    good = write_jsonl(tmp_path / "good.jsonl", texts)
    bad = tmp_path / "bad.jsonl"
    lines = good.read_text().splitlines()
    bad.write_text("\n".join([*lines[:50], "{", *lines[50:], '{"text": 3}']))
    train_tokenizer([good], tmp_path / "t", 262)
    build_shards([good], tmp_path / "t", tmp_path / "d", BuildOptions(32, 0.1))
    command = ["data", "build", bad, "--tokenizer", tmp_path / "t", "--context", 32]
    command = list(map(str, [*command, "--validation-fraction", 0.1, "--out", tmp_path / "e"]))
    assert run(command) == 2
    assert "bad.jsonl line 51: " in capsys.readouterr().err
    assert run([*command, "--skip-bad"]) == 0
    assert (
        "2 bad records left out (bad.jsonl line 51, bad.jsonl line 202)" in capsys.readouterr().err
    )
    manifests = [artifacts.read_manifest(tmp_path / name) for name in "de"]
    assert manifests[1]["reading"]["bad"] == 2
    tokens = [manifest["splits"]["train"]["tokens"] for manifest in manifests]
    assert tokens[0] == tokens[1]
    assert manifests[1]["skip_bad"] is True


def test_a_sweep_of_text_has_sizes_that_work_and_keeps_finished_rows(tmp_path, capsys, caplog):
    texts = [f"the cat {i} sat on the mat {i % 7} times" for i in range(300)]
    source = str(write_jsonl(tmp_path / "x.jsonl", texts))
    assert run(["tokenizer", "sweep", source]) == 2
    done = capsys.readouterr()
    # 512 tokens or more are too many for so little text, and that is what is said.
    assert "the data yield only" in done.err and "too small" not in done.err
    more = str(
        write_jsonl(
            tmp_path / "y.jsonl", [" ".join(f"{i * k:x}" for k in range(9)) for i in range(300)]
        )
    )
    assert run(["tokenizer", "sweep", more]) == 0  # the sizes that the data yield
    done = capsys.readouterr()
    assert [line.split()[0] for line in done.out.splitlines()] == ["size", "512"]
    assert "no size from 1024 on: the data yield only" in done.err + caplog.text
    assert run(["tokenizer", "sweep", source, "--sizes", "262,280,4096"]) == 2
    done = capsys.readouterr()
    assert [line.split()[0] for line in done.out.splitlines()] == ["size", "262", "280"]
    assert "4096 were asked for" in done.err
    assert run(["tokenizer", "sweep", source, "--sizes", "280,32"]) == 2
    done = capsys.readouterr()
    assert done.out == ""
    assert "a vocabulary of 32 is too small" in done.err
    assert run(["tokenizer", "sweep", source, "--sizes", f"{10**9}"]) == 2
    assert "is too large" in capsys.readouterr().err


def test_an_object_with_a_byte_order_mark_in_the_middle_of_a_file(tmp_path):
    path = tmp_path / "x.jsonl"
    line = json.dumps({"text": "a"}).encode() + b"\n"
    path.write_bytes((b"\xef\xbb\xbf" + line) * 3)
    assert [document.text for document in read_documents([path])] == ["a"] * 3
