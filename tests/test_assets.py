"""The demo assets that are shipped, and the scripts that make them."""

import gzip
import hashlib
import importlib.util
import json
import random
import re
import sys
from pathlib import Path

import pytest

ASSETS = Path(__file__).parent.parent / "launch" / "assets"
MAX_SHIPPED_BYTES = 20_000_000
LONG = "A sentence that is long enough to be kept, because it has more than eighty characters. "


def load_script(name: str):
    """A script of launch/assets as a module; they are no package."""
    spec = importlib.util.spec_from_file_location(name, ASSETS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


collector = load_script("collect_docstrings")
sampler = load_script("sample_proteins")


def parse_fasta(text: bytes) -> dict[str, str]:
    """Header -> sequence, written apart from the product's reader."""
    blocks = text.decode().removeprefix(">").split("\n>")
    return {b.partition("\n")[0]: b.partition("\n")[2].replace("\n", "") for b in blocks}


# Shipped files


def test_protein_sample_holds_4000_clusters_of_amino_acid_letters():
    sequences = parse_fasta(gzip.decompress((ASSETS / "proteins.fasta.gz").read_bytes()))
    assert len(sequences) == 4000
    for header, sequence in sequences.items():
        assert re.fullmatch(r"SP50_(\w+) Cluster: \1 n=\d+ RepID=\1", header)
        assert re.fullmatch(r"[A-Z]+", sequence), header


def test_shipped_assets_stay_within_20_MB():
    assert sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()) <= MAX_SHIPPED_BYTES


def test_readme_names_the_licence_and_origin_of_the_proteins():
    text = " ".join((ASSETS / "README.md").read_text().split())
    for words in ("CC BY 4.0", "UniProt Consortium", "release 2014_01", "MMseqs2"):
        assert words in text


def test_english_sources_are_permissive_and_add_up():
    sources = json.loads((ASSETS / "english-sources.json").read_text())
    assert sources["bytes"] == sum(entry["bytes"] for entry in sources["used"])
    assert sources["documents"] == sum(entry["documents"] for entry in sources["used"])
    assert all(collector.is_permissive(entry["licence"]) for entry in sources["used"])
    assert all(entry["version"] for entry in sources["used"])


# sample_proteins.py


def write_fasta(path: Path, names: list[str]) -> Path:
    """One record per name, with a sequence of its own over two lines."""
    records = [f">{name} Cluster: {name}\nMK{'A' * i}\nLV\n" for i, name in enumerate(names)]
    path.write_bytes(gzip.compress("".join(records).encode()))
    return path


def test_sample_is_the_smallest_hashes_in_file_order_and_the_same_bytes_twice(tmp_path):
    names = [f"P{i}" for i in range(50)]
    source = write_fasta(tmp_path / "all.fasta.gz", names)
    first, second = tmp_path / "first.gz", tmp_path / "second.gz"
    sampler.sample(source, 12, first)
    sampler.sample(source, 12, second)
    assert first.read_bytes() == second.read_bytes()

    kept = [header.split()[0] for header in parse_fasta(gzip.decompress(first.read_bytes()))]
    smallest = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:12]
    assert kept == [name for name in names if name in smallest]


def test_sample_does_not_depend_on_the_order_of_the_file(tmp_path):
    names = [f"P{i}" for i in range(50)]
    shuffled = random.Random(0).sample(names, 50)
    kept = []
    for i, order in enumerate((names, shuffled)):
        source = write_fasta(tmp_path / f"{i}.fasta.gz", order)
        sampler.sample(source, 12, tmp_path / f"{i}.out.gz")
        text = gzip.decompress((tmp_path / f"{i}.out.gz").read_bytes())
        kept.append({header.split()[0] for header in parse_fasta(text)})
    assert kept[0] == kept[1]


def test_sample_that_is_too_large_is_refused_and_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sampler, "MAX_BYTES", 20)
    source = write_fasta(tmp_path / "all.fasta.gz", ["P1", "P2"])
    with pytest.raises(SystemExit, match=r"2 clusters .* more than 20"):
        sampler.sample(source, 2, tmp_path / "out.gz")
    assert not (tmp_path / "out.gz").exists()


# collect_docstrings.py


def make_package(site: Path, name: str, metadata: str, source: str) -> None:
    """An installed distribution of one module, as pip leaves it."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{metadata}")
    (info / "RECORD").write_text(
        f"{name}.py,,\n../../bin/{name}.py,,\n{name}-1.0.dist-info/RECORD,,"
    )


def read_lines(path: Path) -> list[dict]:
    """The records of a JSONL.gz."""
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_collector_names_cleans_and_deduplicates(tmp_path):
    source = f'''"""{LONG}module"""
class Engine:
    """{LONG}class

        indented
    """
    if True:
        def start(self):
            """{LONG}method"""
            def inner():
                """{LONG}method"""
    def short(self):
        """Too short to keep."""
    def broken(self):
        """{LONG} \\ud800"""
'''
    make_package(tmp_path / "site", "alpha", "License-Expression: MIT\n", source)
    summary = collector.collect(None, tmp_path / "site", tmp_path / "out.jsonl.gz")
    assert read_lines(tmp_path / "out.jsonl.gz") == [
        {"id": "alpha", "text": f"{LONG}module"},
        {"id": "alpha:Engine", "text": f"{LONG.rstrip()} class\n\nindented"},
        {"id": "alpha:Engine.start", "text": f"{LONG}method"},
    ]
    assert summary["documents"] == 3
    assert summary["used"][0]["name"] == "alpha"


def test_collector_reads_permissive_packages_only_and_lists_the_others(tmp_path):
    site = tmp_path / "site"
    classifier = "Classifier: License :: OSI Approved :: "
    packages = {
        "bsd": f"{classifier}BSD License\n",
        "apache": "License: Apache 2.0\n",
        "lgpl": f"{classifier}GNU Lesser General Public License v3 (LGPLv3)\n",
        "mixed": "License-Expression: MPL-2.0 AND MIT\n",
        "silent": "",
    }
    for name, metadata in packages.items():
        make_package(site, name, metadata, f'"""{LONG}{name}"""')
    (site / "bsd.py").write_text(f'"""{LONG}bsd"""\nprint "Python 2"')
    summary = collector.collect(None, site, tmp_path / "out.jsonl.gz")
    assert [record["id"] for record in read_lines(tmp_path / "out.jsonl.gz")] == ["apache"]
    assert [entry["name"] for entry in summary["left_out"]] == ["lgpl", "mixed", "silent"]


def test_collector_writes_the_same_bytes_twice(tmp_path):
    for name in ("beta", "alpha"):
        make_package(tmp_path / "site", name, "License: ISC\n", f'"""{LONG}{name}"""')
    outputs = [tmp_path / "one.gz", tmp_path / "two.gz"]
    for output in outputs:
        collector.collect(None, tmp_path / "site", output)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert [record["id"] for record in read_lines(outputs[0])] == ["alpha", "beta"]


def test_collector_leaves_site_packages_out_of_the_standard_library(tmp_path):
    library = tmp_path / "lib"
    (library / "json" / "site-packages").mkdir(parents=True)
    (library / "json" / "__init__.py").write_text(f'"""{LONG}json"""')
    (library / "json" / "site-packages" / "other.py").write_text(f'"""{LONG}other"""')
    (tmp_path / "site").mkdir()
    summary = collector.collect(library, tmp_path / "site", tmp_path / "out.gz")
    assert [record["id"] for record in read_lines(tmp_path / "out.gz")] == ["json"]
    version = ".".join(str(part) for part in sys.version_info[:3])
    assert (summary["used"][0]["name"], summary["used"][0]["version"]) == ("python", version)
