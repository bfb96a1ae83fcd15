"""`--drop-ids` reads what users bring, says what it found, and never drops in doubt."""

import bz2
import gzip
import json
import lzma
import random
import tracemalloc

import pytest
import zstandard

from data_prep import drop_ids
from data_prep.build import BuildOptions, Jobs, build_shards
from data_prep.ids import id_hashes
from data_prep.readers import RESIDUES
from data_prep.tokenizer import train_tokenizer
from s2t2_dist import artifacts
from s2t2_dist.cli import run
from s2t2_dist.errors import DataError
from tests.conftest import write_fasta

COUNT = 200
IDS = [f"P{i:05d}" for i in range(COUNT)]
DROPPED = IDS[:80:2]


def proteins(ids):
    rng = random.Random(0)
    return {each: "".join(rng.choices(RESIDUES, k=50)) for each in ids}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A FASTA with plain ids, one with `sp|ACC|NAME`, JSON lines with blanks, and tokenizers."""
    folder = tmp_path_factory.mktemp("made")
    write_fasta(folder / "plain.fasta", proteins(IDS))
    write_fasta(folder / "uniprot.fasta", proteins([f"sp|{i}|N{i}_HUMAN" for i in IDS]))
    rows = [{"id": f"doc {i}", "text": t} for i, t in proteins(IDS).items()]
    (folder / "blanks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_tokenizer([folder / "plain.fasta"], folder / "t", 60)
    train_tokenizer([folder / "blanks.jsonl"], folder / "text", 270)
    return folder


def lines(*, form="{}", ids=DROPPED, head="", end="\n"):
    return (head + "".join(form.format(each) + end for each in ids)).encode()


def build(made, target, content, source="plain.fasta", name="list", jobs=Jobs()):  # noqa: B008
    path = target.parent / name
    path.write_bytes(content)
    options = BuildOptions(32, 0.1, drop_ids=path)
    tokenizer = made / ("text" if str(source).endswith("jsonl") else "t")
    assert build_shards([made / source], tokenizer, target, options, jobs)
    return artifacts.read_manifest(target)["dropped"]


PLAIN = lines()
WRITTEN = {
    "lines": PLAIN,
    "no last line end": PLAIN[:-1],
    "CRLF": lines(end="\r\n"),
    "gzip": gzip.compress(PLAIN),
    "zstd": zstandard.compress(PLAIN),
    "xz": lzma.compress(PLAIN),
    "bzip2": bz2.compress(PLAIN),
    "m8": lines(form="{0}\t{0}\t0.9"),
    "blank columns": lines(form="{}  0.9 1e-5"),
    "csv": lines(form="{},0.9"),
    "semicolons": lines(form="{};0,9"),
    "headers": lines(form=">{}"),
    "whole headers": lines(form=">{} heat shock protein, mouse"),
    "quotes": lines(form='"{}"'),
    "single quotes": lines(form="'{}'"),
    "quoted csv": lines(form='"{}","0.9"'),
    "quoted tsv": lines(form='"{}"\t"0.9"'),
    "BOM": b"\xef\xbb\xbf" + PLAIN,
    "UTF-16": PLAIN.decode().encode("utf-16"),
    "UTF-16 without a mark": PLAIN.decode().encode("utf-16-le"),
    "UTF-32": PLAIN.decode().encode("utf-32"),
    "indented": lines(form="   {}"),
    "blank lines": lines(end="\n\n \n"),
    "comments": b"# BLASTP 2.9\n# Fields: subject\n" + PLAIN,
    "twice": PLAIN + PLAIN,
    "uniprot": lines(form="sp|{0}|N{0}_HUMAN"),
    "uniprot of another name": lines(form="sp|{0}|OLD_NAME\t0.5"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_however_the_list_is_written(tmp_path, made, name):
    dropped = build(made, tmp_path / "d", WRITTEN[name])
    assert dropped["documents"] == dropped["ids_found"] == dropped["ids_listed"] == len(DROPPED)
    assert dropped["characters"] == 50 * len(DROPPED)


@pytest.mark.parametrize("form", ["{}", "N{}_HUMAN", "sp|{0}|N{0}_HUMAN", "tr|{}|X", "gb|{}|"])
def test_a_document_of_uniprot_by_each_of_its_names(tmp_path, made, form):
    dropped = build(made, tmp_path / "d", lines(form=form), "uniprot.fasta")
    assert dropped["documents"] == dropped["ids_found"] == len(DROPPED)


@pytest.mark.parametrize("form", ["doc {}", '"doc {}"', "doc {}\t0.9", "doc {},0.9"])
def test_ids_with_blanks(tmp_path, made, form):
    dropped = build(made, tmp_path / "d", lines(form=form), "blanks.jsonl")
    assert dropped["documents"] == dropped["ids_found"] == len(DROPPED)


@pytest.mark.parametrize("source", ["plain.fasta", "uniprot.fasta", "blanks.jsonl"])
def test_what_data_ids_prints_is_read_back(tmp_path, made, source, capsys):
    command = ["data", "ids", str(made / source), "--split", "train"]
    assert run([*command, "--validation-fraction", "0.6"]) == 0
    printed = capsys.readouterr().out
    count = printed.count("\n")
    assert 0 < count < COUNT
    dropped = build(made, tmp_path / "d", printed.encode(), source)
    assert dropped["documents"] == dropped["ids_found"] == dropped["ids_listed"] == count


def test_ids_are_counted_not_lines(tmp_path, made):
    """Three targets on many lines of hits, and two that no document has, one of them twice."""
    hits = "".join(f"{IDS[i % 3]}\tq{i}\t0.{i}\n" for i in range(30)) + "X\t1\nX\t2\nY\t1\n"
    for end in ("", "sp|P00000|A\n"):  # by its whole id and by an accession: two ids listed
        dropped = build(made, tmp_path / f"d{len(end)}", (hits + end).encode())
        more = bool(end)
        assert (dropped["ids_found"], dropped["ids_listed"]) == (3 + more, 5 + more)
        assert dropped["documents"] == 3
    commas = "".join(f"{IDS[i % 3]},q{i},0.{i}\n" for i in range(30)) + "id,score\n"
    dropped = build(made, tmp_path / "e", commas.encode())
    assert (dropped["ids_found"], dropped["ids_listed"]) == (3, 4)


def test_a_chain_is_not_its_entry(tmp_path, made):
    """`pdb|ENTRY|CHAIN`: other chains of the entry stay; BLAST writes ENTRY_CHAIN."""
    ids = [f"pdb|{i:04}|{chain}" for i in range(60) for chain in "ABC"]
    write_fasta(tmp_path / "x.fasta", proteins(ids))
    for number, line in enumerate(["pdb|0003|A", "0003_A", "0003_A\t0.9"]):
        content = f"{line}\n".encode()
        dropped = build(made, tmp_path / f"d{number}", content, tmp_path / "x.fasta")
        assert dropped["documents"] == dropped["ids_found"] == 1
    with pytest.raises(DataError, match="none of the 1 ids"):
        build(made, tmp_path / "d", b"0003\n", tmp_path / "x.fasta")


def test_a_line_without_an_id_names_nothing(tmp_path, made):
    assert build(made, tmp_path / "d", PLAIN + b">\n")["ids_listed"] == len(DROPPED) + 1
    with pytest.raises(DataError, match=r"none of the 1 ids listed in .*the first is '>'"):
        build(made, tmp_path / "e", b">\n")


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_lists_in_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr("data_prep.formats.READ_BYTES", block)
    monkeypatch.setattr("data_prep.drop_ids.LINES_AT_ONCE", block)
    text = "a b\r\n\n  ü\u2028c\n\x0cd\re"
    (tmp_path / "list").write_bytes(text.encode())
    held = drop_ids.DropList(tmp_path / "list")
    names = ["a b", "a", "ü", "c", "d", "e", "f"]
    named, readings = held.match(names, id_hashes(names, "split"))
    assert named.tolist() == [True] * 6 + [False]
    assert {code // drop_ids.READINGS for code in readings} == {0, 1, 2, 3, 4}
    (tmp_path / "list").write_bytes(text.encode() + b"\nf\n\xff\n")
    with pytest.raises(DataError, match="list line 6: not UTF-8"):
        list(drop_ids._lines(tmp_path / "list"))


@pytest.mark.slow
def test_a_long_list_takes_little_memory(tmp_path):
    """Hashes, 25 bytes for a line; whole lines took 300."""
    count = 50_000
    with (tmp_path / "list").open("w") as file:
        file.writelines(f"UniRef50_A0{i}\tquery{i}\t0.351\t120\t3e-20\t{i}\n" for i in range(count))
    tracemalloc.start()
    held = drop_ids.DropList(tmp_path / "list")
    held.match(["a"], id_hashes(["a"], "split"))
    taken, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 60 * count
    assert peak < 160 * count + 10e6  # and a block of the file, with its lines


def test_a_folder_of_lists_is_refused(tmp_path, made, capsys):
    (tmp_path / "lists").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "lists" / name).write_bytes(PLAIN)
    command = ["data", "build", made / "plain.fasta", "--tokenizer", made / "t", "--out"]
    command += [tmp_path / "d", "--drop-ids", tmp_path / "lists"]
    assert run(list(map(str, command))) == 2
    assert "lists is not a file; give a file with one id per line" in capsys.readouterr().err


def test_what_was_found_is_said(tmp_path, made, capsys):
    (tmp_path / "list.csv").write_bytes(lines(head="id,score\n", form="{},1"))
    command = ["data", "build", made / "plain.fasta", "--tokenizer", made / "t", "--context", 32]
    command += ["--validation-fraction", 0.1, "--drop-ids", tmp_path / "list.csv"]
    assert run(list(map(str, [*command, "--out", tmp_path / "d"]))) == 0
    said = f"note: {len(DROPPED)} of {len(DROPPED) + 1} listed ids found, {len(DROPPED)} documents"
    assert said in capsys.readouterr().err


def test_a_list_that_names_nothing_is_refused(tmp_path, made):
    for content, message in (
        (lines(form="X{}"), r"none of the 40 ids listed in .*list is the id of a document .*'XP0"),
        (b"", "lists no id; leave out --drop-ids"),
        (b"\n \n", "lists no id"),
        (b"# only a comment\n", "none of the 0 ids"),
        (b"P00000\n\xff\xfe\xfd", "line 2: not UTF-8"),
        (gzip.compress(PLAIN)[:-9], "truncated or damaged gzip"),
    ):
        with pytest.raises(DataError, match=message):
            build(made, tmp_path / "d", content)
        assert [path.name for path in tmp_path.iterdir()] == ["list"]


def test_a_line_in_doubt_is_refused(tmp_path, made):
    """`a b` is the id of a document, and so is `a`: quotes tell which one is meant."""
    rows = [{"id": name, "text": text} for name, text in proteins(["a", "a b", *IDS]).items()]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "list").write_text("a b\n")
    options = BuildOptions(32, 0.1, drop_ids=tmp_path / "list")
    arguments = [[tmp_path / "x.jsonl"], made / "text", tmp_path / "d", options]
    with pytest.raises(DataError, match="'a b' may name the document 'a b' or 'a', and there are"):
        build_shards(*arguments)
    (tmp_path / "list").write_text('"a b"\n')
    assert build_shards(*arguments)
    assert artifacts.read_manifest(tmp_path / "d")["dropped"]["documents"] == 1


def test_ranks_find_the_same(tmp_path, made):
    path = tmp_path / "list"
    path.write_bytes(PLAIN + b"absent\n")
    options = BuildOptions(32, 0.1, drop_ids=path)
    for only in ("encode", "pack", "seal"):
        for rank in range(1 if only == "seal" else 3):
            jobs = Jobs(1, rank, 3, only)
            build_shards([made / "plain.fasta"], made / "t", tmp_path / "d", options, jobs)
    dropped = artifacts.read_manifest(tmp_path / "d")["dropped"]
    assert (dropped["ids_found"], dropped["ids_listed"]) == (len(DROPPED), len(DROPPED) + 1)
