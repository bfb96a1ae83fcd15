"""A UniRef download against a metalink in UniProt's own form."""

import gzip
import hashlib
import json
import time
from pathlib import Path

import pytest

from data_prep.build import BuildOptions, build_shards
from data_prep.release import check_release
from s2t2_dist import artifacts
from s2t2_dist.cli import run
from s2t2_dist.errors import ArtifactError, DataError

METALINK = """<?xml version="1.0" encoding="UTF-8"?>
<metalink version="3.0" xmlns="http://www.metalinker.org/" type="static">
  <publisher><name>UniProt</name><url>https://www.uniprot.org</url></publisher>
  <version>2026_03</version>
  <files>
    <file name="uniref50.xml.gz"><size>7</size>
      <verification><hash type="md5">00000000000000000000000000000000</hash></verification></file>
    <file name="uniref50.fasta.gz">
      <size>{size}</size>
      <verification><hash type="sha1">x</hash><hash type="md5">{md5}</hash></verification>
      <resources><url type="ftp" location="uk" preference="100">ftp://x/uniref50.fasta.gz</url>
      </resources>
    </file>
  </files>
</metalink>
"""


@pytest.fixture
def download(tmp_path, protein_fasta):
    folder = tmp_path / "uniref50"
    folder.mkdir()
    content = gzip.compress(protein_fasta.read_bytes(), mtime=0)
    (folder / "uniref50.fasta.gz").write_bytes(content)
    md5 = hashlib.md5(content).hexdigest()
    (folder / "RELEASE.metalink").write_text(METALINK.format(size=len(content), md5=md5))
    return folder


def test_a_good_download_is_named_in_the_manifest(download, protein_tokenizer, tmp_path, capsys):
    source = download / "uniref50.fasta.gz"
    build_shards([source], protein_tokenizer, tmp_path / "before", BuildOptions(32, 0.2))
    assert run(["data", "check-release", str(download)]) == 0
    assert "uniref50.fasta.gz is of release 2026_03" in capsys.readouterr().out
    build_shards([source], protein_tokenizer, tmp_path / "after", BuildOptions(32, 0.2))
    before, after = (artifacts.read_manifest(tmp_path / name) for name in ("before", "after"))
    assert after["sources"] == [{**before["sources"][0], "release": "2026_03"}]
    # A file that was changed since is of no release.
    source.write_bytes(source.read_bytes() + gzip.compress(b">x\nACD\n"))
    build_shards([source], protein_tokenizer, tmp_path / "changed", BuildOptions(32, 0.2))
    assert "release" not in artifacts.read_manifest(tmp_path / "changed")["sources"][0]


def test_another_size_or_md5_is_refused(download):
    source = download / "uniref50.fasta.gz"
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 1
    source.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"uniref50\.fasta\.gz has the md5 .* the release says"):
        check_release(download)
    source.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match="bytes, the release says"):
        check_release(download)
    assert not (download / "release.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a metalink"),
        ("<metalink><version>1</version></metalink>", "states no version, file or md5"),
        (METALINK.format(size="x", md5="0" * 32), "not a metalink"),
        (METALINK.format(size=1, md5="short"), "states no version, file or md5"),
    ],
)
def test_a_bad_metalink_is_refused(download, text, message):
    (download / "RELEASE.metalink").write_text(text)
    with pytest.raises(DataError, match=message):
        check_release(download)


def test_a_long_check_says_what_it_does(download, monkeypatch, capsys):
    original = Path.open

    def slow(path, *arguments, **named):
        time.sleep(0.3 * (path.suffix == ".gz"))
        return original(path, *arguments, **named)

    monkeypatch.setattr("data_prep.progress.FIRST_LINE", 0.05)
    monkeypatch.setattr(Path, "open", slow)
    check_release(download)
    assert f"Hashing {download / 'uniref50.fasta.gz'} (" in capsys.readouterr().err


def test_nothing_to_check(download):
    (download / "uniref50.fasta.gz").unlink()
    with pytest.raises(DataError, match="holds none of the 2 files of release 2026_03"):
        check_release(download)
    (download / "RELEASE.metalink").unlink()
    with pytest.raises(DataError, match="does not exist"):
        check_release(download)


def test_the_record_is_complete(download):
    record = check_release(download)
    assert json.loads((download / "release.json").read_text()) == record
    assert list(record["files"]) == ["uniref50.fasta.gz"]


@pytest.mark.parametrize(
    "text",
    [
        '{"version": "1.2.0", "assets": []}',
        "{",
        "[]",
        '"release"',
        '{"version": 7, "files": {"proteins.fasta": {"sha256": 1}}}',
        '{"version": "1", "files": ["proteins.fasta"]}',
        '{"version": "1", "files": {"proteins.fasta": null}}',
        "[" * 100_000,
    ],
)
def test_a_release_json_of_another_tool_is_none(protein_fasta, protein_tokenizer, tmp_path, text):
    source = tmp_path / "proteins.fasta"
    source.write_bytes(protein_fasta.read_bytes())
    (tmp_path / "release.json").write_text(text)
    build_shards([source], protein_tokenizer, tmp_path / "d", BuildOptions(32, 0.2))
    (described,) = artifacts.read_manifest(tmp_path / "d")["sources"]
    assert described.keys() == {"name", "bytes", "sha256"}
