"""The same pipeline on everything that a file may hold, and on another domain than proteins."""

import argparse
import gzip
import inspect
import json
import random
import shutil
import string
from itertools import pairwise

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_prep.build import BuildOptions, build_shards
from data_prep.packing import best_fit
from data_prep.readers import RARE_RESIDUES, RESIDUES, ReadOptions
from data_prep.tokenizer import train_tokenizer
from s2t2_dist import artifacts
from s2t2_dist.data.shards import SPLITS, ShardReader
from tests.jobs import launching as runs

PACKINGS = ("concatenate", "best-fit")


def rows_of(directory, split):
    """Row by row: the documents' texts (a document that goes on from another row comes first)."""
    reader = ShardReader(directory, split)
    library = Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json"))
    for i in range(len(reader)):
        ids, starts = reader[i][: reader.length(i)], reader.document_starts(i)
        pieces = np.split(ids.astype(int), starts[starts > 0])
        texts = [library.decode([t for t in p if t], skip_special_tokens=False) for p in pieces]
        yield texts, len(starts) > 0 and starts[0] == 0, [bool(0 in piece) for piece in pieces]


def odd_fasta(path):
    """Two gzip members, CRLF, blank lines, rare and lower-case letters, stops, a titin, dirt."""
    rng = random.Random(0)
    letters = RESIDUES * 5 + RARE_RESIDUES
    long = "".join(rng.choices(letters, k=36_000))
    first = f">titin n=1\r\n{long[:20000]}\r\n\r\n{long[20000:].lower()}*\r\n>none\r\n"
    second = "\n\n>UniRef50_U X\nXUOBZJ\n>stop\n*\n>dirt\nAC-D1\n" + "".join(
        f">r{i}\n{''.join(rng.choices(letters, k=rng.randint(1, 400)))}\n" for i in range(300)
    )
    last = ">end\nACDEF"
    path.write_bytes(gzip.compress(first.encode()) + gzip.compress((second + last).encode()))
    return (first + second + last), long


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_residue_that_went_in_comes_out(tmp_path, packing):
    content, long = odd_fasta(tmp_path / "odd.fasta.gz")
    train_tokenizer([tmp_path / "odd.fasta.gz"], tmp_path / "t", 60)
    options = BuildOptions(context=128, validation_fraction=0.3, packing=packing)
    build_shards([tmp_path / "odd.fasta.gz"], tmp_path / "t", tmp_path / "d", options)
    lines = content.replace("\r\n", "\n").split("\n")
    body = "".join(line for line in lines if not line.startswith(">")).upper()
    expected = sorted(letter for letter in body if letter in RESIDUES + RARE_RESIDUES)
    decoded = "".join(
        text for split in SPLITS for texts, _, _ in rows_of(tmp_path / "d", split) for text in texts
    )
    assert sorted(decoded) == expected
    manifest = artifacts.read_manifest(tmp_path / "d")
    reading = manifest["reading"]
    assert reading["characters"] == len(expected)
    assert sum(manifest["splits"][split]["bytes"] for split in SPLITS) == len(expected)
    assert (reading["documents"], reading["empty"], reading["stops"]) == (304, 2, 2)
    assert reading["illegal"] == {"'-'": 1, "'1'": 1}
    assert reading["lower_case"] == 16_000
    if packing == "concatenate":
        rows = (rows_of(tmp_path / "d", split) for split in SPLITS)
        joined = ("".join(t for texts, _, _ in each for t in texts) for each in rows)
        assert any(long in text for text in joined)


def test_best_fit_cuts_only_what_is_longer_than_a_row(tmp_path):
    odd_fasta(tmp_path / "odd.fasta.gz")
    train_tokenizer([tmp_path / "odd.fasta.gz"], tmp_path / "t", 60)
    options = BuildOptions(context=128, validation_fraction=0.3, packing="best-fit")
    build_shards([tmp_path / "odd.fasta.gz"], tmp_path / "t", tmp_path / "d", options)
    plain = BuildOptions(context=128, validation_fraction=0.3)
    build_shards([tmp_path / "odd.fasta.gz"], tmp_path / "t", tmp_path / "c", plain)
    reader = ShardReader(tmp_path / "d", "train")
    held = reader.metadata["splits"]["train"]
    lengths = [reader.length(i) for i in range(len(reader))]
    assert sum(lengths) == held["tokens"]
    assert held["documents"] == sum(len(reader.document_starts(i)) for i in range(len(reader)))
    # Concatenation leaves a document open at the end of nearly every row; best-fit only where a
    # document is longer than a row, and such a piece fills its row.
    open_rows = {}
    for name in ("c", "d"):
        rows = [each for split in SPLITS for each in rows_of(tmp_path / name, split)]
        open_rows[name] = [texts for texts, _, ends in rows if not all(ends)]
    assert len(open_rows["d"]) < len(open_rows["c"])
    assert all(len(texts) == 1 for texts in open_rows["d"])
    assert any(len(texts) > 1 for texts in open_rows["c"])
    # Little of the rows is padding: the pieces are many and small.
    assert held["tokens"] / (len(reader) * 128) > 0.9


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_places_every_token_once(seed):
    rng = random.Random(seed)
    context = rng.choice([2, 7, 64])
    lengths = [rng.randint(1, 3 * context) for _ in range(200)]
    rows = best_fit(lengths, context)
    placed = sorted(piece for row in rows for piece in row)
    for document, length in enumerate(lengths):
        spans = [(first, end) for number, first, end in placed if number == document]
        assert spans[0][0] == 0 and spans[-1][1] == length
        assert all(a[1] == b[0] for a, b in pairwise(spans))
        assert len(spans) == -(-length // context)  # cut no more often than it must be
    sizes = [sum(end - first for _, first, end in row) for row in rows]
    assert max(sizes) <= context
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    # First-fit and best-fit decreasing need at most 11/9 of the best plus one (Johnson 1973).
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // context) * 1.5 + 1


def write_sources(path):
    """Python source of the standard library, one function or class a document."""
    documents = []
    for module in (argparse, gzip, json, random, shutil, string, inspect):
        for name, value in vars(module).items():
            if inspect.isfunction(value) or inspect.isclass(value):
                try:
                    documents.append(
                        {"id": f"{module.__name__}.{name}", "code": inspect.getsource(value)}
                    )
                except (OSError, TypeError):
                    continue
    path.write_bytes(gzip.compress("".join(json.dumps(d) + "\n" for d in documents).encode()))
    return [document["code"] for document in documents]


@pytest.fixture(scope="module")
def python_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("python")
    texts = write_sources(folder / "python.jsonl.gz")
    read = ReadOptions(field="code")
    train_tokenizer([folder / "python.jsonl.gz"], folder / "t", 600, read=read)
    options = BuildOptions(context=32, validation_fraction=0.1, read=read)
    build_shards([folder / "python.jsonl.gz"], folder / "t", folder / "d", options)
    return folder / "d", texts


@pytest.mark.slow
def test_source_code_comes_back_as_it_was(python_data):
    data, texts = python_data
    decoded = []
    for split in SPLITS:
        reader = ShardReader(data, split)
        library = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json"))
        ids = np.concatenate([reader[i][: reader.length(i)] for i in range(len(reader))])
        ends = np.flatnonzero(ids == reader.metadata["eos_token_id"])
        for document in np.split(ids, ends[:-1] + 1):
            decoded.append(library.decode(document[:-1].tolist(), skip_special_tokens=False))
    assert sorted(decoded) == sorted(texts)
    held = ShardReader(data, "train").metadata
    assert held["field"] == "code"
    total = sum(held["splits"][split]["bytes"] for split in SPLITS)
    assert total == sum(len(text.encode()) for text in texts)


@pytest.mark.slow
def test_a_model_adapts_to_source_code_and_resumes_bit_for_bit(python_data, source_model, tmp_path):
    """On two ranks, with documents kept apart; the second run is killed and started again."""
    options = {
        "data": {"path": str(python_data[0]), "document_mask": True, "verify": "full"},
        "stages": [
            {"kind": "translate", "max_steps": 12, "learning_rate": 0.01, **runs.STAGE},
            {"kind": "finetune", "max_steps": 40, "learning_rate": 0.01, **runs.STAGE},
        ],
    }
    whole, killed = (
        runs.write_recipe(tmp_path / name, source_model, python_data[0], **options)
        for name in ("whole", "killed")
    )
    assert runs.train(whole, 2) == 0, runs.output(whole)
    evaluated = [x["eval_loss"] for x in runs.metrics(tmp_path / "whole/run") if "eval_loss" in x]
    # A random model starts near log(600) = 6.4 nats.
    assert evaluated[-1] < evaluated[0] - 0.7, evaluated
    process = runs.start(killed, 2)
    runs.wait_for_line(tmp_path / "killed" / "run", "finetune", 7, process)
    runs.kill(process)
    assert runs.train(killed, 2) == 0, runs.output(killed)
    found = [runs.losses(tmp_path / name / "run") for name in ("whole", "killed")]
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_flipped_byte_stops_the_trainer_when_it_is_asked_to_look(
    python_data, source_model, tmp_path
):
    data = tmp_path / "d"
    shutil.copytree(python_data[0], data)
    shard = data / "validation" / "shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    recipe = runs.write_recipe(
        tmp_path, source_model, data, data={"path": str(data), "verify": "full"}
    )
    assert runs.train(recipe, 0) == 2
    assert "validation/shard-00000.arrow was altered" in runs.output(recipe)
    assert "(validation rows 0 to " in runs.output(recipe)
