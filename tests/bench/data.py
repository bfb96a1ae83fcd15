"""Speed and memory of data preparation and reading, against `tokenizers` alone and `datasets`.

`python -m tests.bench.data --help`. All figures come from one run on one machine. Rates are
residues (FASTA letters) or tokens per second of wall time. Writes `data.md` and `data.json`, and
the projection for UniRef50 into docs/data.md.
"""

import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from tests.bench import data_others, measure
from tests.bench.data_page import DOCS, markdown, with_projection

ROOT = Path(__file__).parent.parent.parent
SAMPLE = Path("../shared/data/swissprot50.fasta.gz")
RESULTS = Path("tests/bench/results")
CONTEXT = 512
VOCAB = 512
BATCHES = (200, 1000)  # texts of one call of the bare tokenizer
TIMES = 10  # how much larger the second input is
S2T2 = (sys.executable, "-m", "s2t2_dist.cli")


def main(
    source: Annotated[
        Path, typer.Option(help="gzip FASTA; if it does not exist, a synthetic one is made.")
    ] = SAMPLE,
    cores: Annotated[int, typer.Option(min=1, help="Cores for every method.")] = 2,
    repeats: Annotated[
        int, typer.Option(min=1, help="Runs per short measurement; best counts.")
    ] = 3,
    out: Annotated[Path, typer.Option(help="Folder for data.md and data.json.")] = RESULTS,
    docs: Annotated[Path, typer.Option(help="Page that gets the projection.")] = DOCS,
):
    """Measure tokenizing, sharding, reading and peak memory, and project UniRef50.

    Takes about four minutes. Nothing else should run at the same time.
    """
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        name = source.name if source.is_file() else "synthetic"
        source = source if source.is_file() else synthetic(work / "synthetic.fasta.gz")
        report = {"command": " ".join(["python -m tests.bench.data", *sys.argv[1:]])}
        report |= {"machine": measure.machine(cores), "input": name, "cores": cores}
        report |= {"context": CONTEXT, "vocab": VOCAB, "times": TIMES}
        report |= measured(source, work, cores, repeats)
    (out / "data.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "data.md").write_text(markdown(report))
    docs.write_text(with_projection(docs.read_text(), report))
    print(markdown(report))


def measured(source: Path, work: Path, cores: int, repeats: int) -> dict:
    """All measurements: seconds, bytes and counts, without conversion."""
    from data_prep.tokenizer import train_tokenizer

    tokenizer, saved = work / "tokenizer", work / "saved"
    train_tokenizer([source], tokenizer, VOCAB, 5_000_000)
    texts = sequences(source)
    residues = sum(map(len, texts))
    build(source, tokenizer, work / "warm", cores)  # compiles, and fills the page cache
    bare, ours, theirs = [], [], []
    for i in range(repeats):  # in turns, because other load varies
        bare += [data_others.bare_seconds(tokenizer, texts, size) for size in BATCHES]
        ours.append(measure.seconds(lambda i=i: build(source, tokenizer, work / f"b{i}", cores)))
    for i in range(min(2, repeats)):
        command = [sys.executable, "-m", "tests.bench.data_others", source, tokenizer, cores]
        command = [str(part) for part in [*command, f"{saved}-{i}"]]
        theirs.append(measure.seconds(lambda c=command: subprocess.run(c, check=True, cwd=ROOT)))
    report = {"residues": residues, "texts": len(texts), "bare_seconds": min(bare)}
    report |= {"build_seconds": min(ours), "datasets_seconds": min(theirs)}
    report |= read_rows(work / "b0", Path(f"{saved}-0"))
    report["loader_tokens_per_second"] = loader_rate(work / "b0")
    report["libraries"] = data_others.libraries(tokenizer, texts)
    report["small_peak_bytes"] = watched(build_command(source, tokenizer, work / "s", cores))[1]
    return report | large(source, tokenizer, work, cores)


def large(source: Path, tokenizer: Path, work: Path, cores: int) -> dict:
    """Build from TIMES copies of the input, step by step; measure what the projection needs."""
    from data_prep.sources import read_chunks
    from s2t2_dist.artifacts import sha256_file
    from s2t2_dist.data.shards import ShardReader

    path, target = enlarge(source, work / "large.fasta.gz"), work / "large"
    report, peaks = {}, []
    for step in ("encode", "pack", "seal"):
        command = [*build_command(path, tokenizer, target, cores), "--only", step]
        if step == "pack":
            report["look_seconds"] = look_seconds(work / ".large.partial" / "work")
        report[f"large_{step}_seconds"], peak = watched(command)
        peaks.append(peak)
    report["large_residues"] = TIMES * sum(map(len, sequences(source)))
    report["read_seconds"] = measure.seconds(lambda: [None for _ in read_chunks([path])])
    report["hash_bytes_per_second"] = path.stat().st_size / measure.seconds(
        lambda: sha256_file(path)
    )
    sizes = [file.stat().st_size for file in target.rglob("*.arrow")]
    tokens = sum(s["tokens"] for s in ShardReader(target, "train").metadata["splits"].values())
    return report | {
        "large_peak_bytes": max(peaks),
        "large_shard_bytes": sum(sizes),
        "large_tokens": tokens,
    }


def look_seconds(directory: Path) -> float:
    """Seconds to open a part and find a key, which packing does for every window and part."""
    from data_prep.parts import tokens_before

    parts, edge = sorted(directory.glob("part-*.arrow")), np.array([1 << 63], np.uint64)
    return measure.seconds(lambda: [tokens_before(p, "train", edge) for p in parts]) / len(parts)


def synthetic(path: Path, records: int = 112_002) -> Path:
    """Write a FASTA with the sample's size and lengths (log-normal, median 329, mean 425)."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(np.log(329), 0.715, records), 35_213).astype(int) + 1
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
    weights = np.array([8.3, 1.4, 5.5, 6.8, 3.9, 7.1, 2.3, 5.9, 5.8, 9.7, 2.4, 4.1, 4.7, 3.9, 5.5])
    weights = np.append(weights, [6.6, 5.3, 6.9, 1.1, 2.9])
    with gzip.open(path, "wb", compresslevel=6) as f:
        for i, length in enumerate(lengths):
            text = rng.choice(letters, length, p=weights / weights.sum()).tobytes()
            f.write(b">S%d Cluster: S%d n=1\n" % (i, i))
            f.write(b"\n".join(text[j : j + 60] for j in range(0, length, 60)) + b"\n")
    return path


def enlarge(source: Path, target: Path) -> Path:
    """Write TIMES copies of the file as gzip members, each with ids of its own."""
    text = gzip.decompress(source.read_bytes())
    with target.open("wb") as f:
        for copy in range(TIMES):
            f.write(gzip.compress(text.replace(b">", b">%d_" % copy), 1))
    return target


def sequences(path: Path) -> list[str]:
    """Every sequence of a clean gzip FASTA."""
    records = gzip.decompress(path.read_bytes()).decode().split(">")[1:]
    return [record.partition("\n")[2].replace("\n", "") for record in records]


def build_command(source: Path, tokenizer: Path, target: Path, cores: int) -> list[str]:
    """The command as a user gives it, so start-up, hashing and checks are measured too."""
    command = [*S2T2, "data", "build", source, "--tokenizer", tokenizer, "--context", CONTEXT]
    return list(map(str, [*command, "--out", target, "--workers", cores]))


def build(source: Path, tokenizer: Path, target: Path, cores: int) -> None:
    """Run the build command."""
    command = build_command(source, tokenizer, target, cores)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def watched(command: list[str]) -> tuple[float, int]:
    """Seconds of a command, and the peak of the proportional set size of its process tree."""
    import psutil

    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            total = 0
            try:
                parent = psutil.Process(process.pid)
                for each in [parent, *parent.children(recursive=True)]:
                    total += each.memory_full_info().pss
            except psutil.Error:
                continue
            peak = max(peak, total)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.wait() == 0, command
    seconds = time.perf_counter() - begin
    watcher.join()
    return seconds, peak


def read_rows(data: Path, saved: Path) -> dict:
    """Seconds for one random row of `ShardReader`, and of `datasets` in numpy format."""
    from datasets import load_from_disk

    from s2t2_dist.data.shards import ShardReader

    reader, loaded = ShardReader(data, "train"), load_from_disk(str(saved)).with_format("numpy")
    rng = random.Random(0)
    ours = [rng.randrange(len(reader)) for _ in range(100_000)]
    theirs = [rng.randrange(len(loaded)) for _ in range(2000)]
    for i in theirs[:200]:  # warm up: open every file
        assert len(reader[i % len(reader)]) == len(loaded[i]["tokens"])
    fast = measure.seconds(lambda: [reader[i] for i in ours]) / len(ours)
    slow = measure.seconds(lambda: [loaded[i]["tokens"] for i in theirs]) / len(theirs)
    return {"row_seconds": fast, "datasets_row_seconds": slow}


def loader_rate(data: Path) -> float:
    """Tokens per second of training batches, in the training order, on one core."""
    from s2t2_dist.data.batches import load_batch, read_ahead
    from s2t2_dist.data.order import rows_at
    from s2t2_dist.data.shards import ShardReader

    reader, size, count = ShardReader(data, "train"), 32, 1000
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})

    def read(step):
        positions = np.arange(step * size, (step + 1) * size)
        return load_batch(reader, rows_at(positions, len(reader), 17))

    seconds = measure.seconds(lambda: [None for _ in read_ahead(read, range(count))])
    os.sched_setaffinity(0, cores)
    return count * size * CONTEXT / seconds


if __name__ == "__main__":
    typer.run(main)
