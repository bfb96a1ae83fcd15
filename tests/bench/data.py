"""Measures data preparation and reading on this machine, and prints a table.

    python tests/bench/data.py ../shared/data/swissprot50.fasta.gz [--cores 2] [--out FOLDER]

Without a file it makes one of the same statistics. Everything is measured in this one run: the bare
tokenizer, the build, `datasets` doing the same, random rows through both readers, the loader on one
core, the peak memory of builds that differ 10 times in size, and other BPE libraries where they are
installed. Rates are of residues (FASTA letters) or tokens per second of wall time.
"""

import argparse
import gzip
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

CONTEXT = 512
VOCAB = 512
UNIREF50_RESIDUES = 17_282_055_793
UNIREF50_RECORDS = 60_315_044
MEMORY_TIMES = 10
BATCH = 1000


def synthetic(path: Path, records: int = 112_002) -> Path:
    """A FASTA of the sample's size and lengths (log-normal, median 329, mean 425)."""
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


def sequences(path: Path) -> list[str]:
    """Every sequence of a clean gzip FASTA."""
    records = gzip.decompress(path.read_bytes()).decode().split(">")[1:]
    return [record.partition("\n")[2].replace("\n", "") for record in records]


def timed(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def cpu_seconds(action) -> float:
    """Processor time of this process and its children: what other load on the machine hides."""

    def now() -> float:
        return sum(os.times()[:4])

    start = now()
    action()
    return now() - start


def bare(tokenizer_json: Path, texts: list[str]) -> tuple[float, float]:
    """Seconds, and processor seconds, of `encode_batch_fast` alone on all cores, in batches."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_json))

    def encode() -> None:
        for i in range(0, len(texts), BATCH):
            tokenizer.encode_batch_fast(texts[i : i + BATCH], add_special_tokens=False)

    encode_some = texts[:BATCH]
    tokenizer.encode_batch_fast(encode_some, add_special_tokens=False)
    used = []
    return timed(lambda: used.append(cpu_seconds(encode))), used[0]


def build(source: Path, tokenizer: Path, target: Path, cores: int) -> None:
    """The command, with its start and its hashing, as a user runs it."""
    command = [sys.executable, "-m", "s2t2_dist.cli", "data", "build", str(source)]
    command += ["--tokenizer", str(tokenizer), "--context", str(CONTEXT), "--out", str(target)]
    subprocess.run([*command, "--workers", str(cores)], check=True, stdout=subprocess.DEVNULL)


def with_datasets(source: Path, tokenizer_json: Path, target: Path, cores: int) -> None:
    """The same rows, in file order, by `datasets.map` and `save_to_disk` in `cores` processes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer

    disable_progress_bars()
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    eos = tokenizer.token_to_id("<eos>")

    def rows(batch):
        encodings = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        flat = [i for encoding in encodings for i in [*encoding.ids, eos]]
        end = len(flat) - len(flat) % CONTEXT
        return {"tokens": [flat[i : i + CONTEXT] for i in range(0, end, CONTEXT)]}

    cache = target / "cache"
    data = Dataset.from_generator(
        lambda: ({"text": text} for text in sequences(source)), cache_dir=str(cache)
    )
    mapped = data.map(rows, batched=True, batch_size=BATCH, remove_columns=["text"], num_proc=cores)
    mapped.save_to_disk(str(target / "saved"))


def peak_memory(command: list[str]) -> float:
    """Peak of the proportional set size of a command's whole process tree, GB."""
    import psutil

    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL), 0

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
    assert process.wait() == 0
    watcher.join()
    return peak / 1e9


def enlarge(source: Path, target: Path, times: int) -> Path:
    """The file so many times over, as gzip members; every copy with ids of its own."""
    text = gzip.decompress(source.read_bytes())
    with target.open("wb") as f:
        for copy in range(times):
            f.write(gzip.compress(text.replace(b">", b">%d_" % copy), 1))
    return target


def read_rows(data: Path, saved: Path) -> tuple[float, float]:
    """Seconds for one random row: `ShardReader`, and `datasets` indexing in numpy format."""
    from datasets import load_from_disk

    from s2t2_dist.shards import ShardReader

    reader, loaded = ShardReader(data, "train"), load_from_disk(str(saved)).with_format("numpy")
    rng = random.Random(0)
    ours = [rng.randrange(len(reader)) for _ in range(100_000)]
    theirs = [rng.randrange(len(loaded)) for _ in range(2000)]
    for i in theirs[:200]:  # open what is opened once
        assert len(reader[i]) == len(loaded[i]["tokens"])
    fast = timed(lambda: [reader[i] for i in ours]) / len(ours)
    return fast, timed(lambda: [loaded[i]["tokens"] for i in theirs]) / len(theirs)


def loader_rate(data: Path) -> float:
    """Tokens per second of training batches, in the training order, on one core."""
    from s2t2_dist.data import load_batch, prefetched, rows_at
    from s2t2_dist.shards import ShardReader

    reader, size, count = ShardReader(data, "train"), 32, 1000
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})

    def batches():
        for step in range(count):
            positions = np.arange(step * size, (step + 1) * size)
            yield load_batch(reader, rows_at(positions, len(reader), 17))

    def run() -> None:
        for _ in prefetched(batches()):
            pass

    seconds = timed(run)
    os.sched_setaffinity(0, cores)
    return count * size * CONTEXT / seconds


def other_libraries(tokenizer_json: Path, texts: list[str]) -> dict[str, float]:
    """Residues per second and core of BPE libraries that read the same file, with equal tokens."""
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(tokenizer_json))
    path, found = str(tokenizer_json), {}
    makers = {
        "tokenizers": lambda: lambda text: reference.encode(text, add_special_tokens=False).ids,
        "fastokens": lambda: _fastokens(path),
        "kitoken": lambda: _kitoken(path),
        "tokie": lambda: _tokie(path),
    }
    expected = [e.ids for e in reference.encode_batch_fast(texts, add_special_tokens=False)]
    for name, maker in makers.items():
        if importlib.util.find_spec(name) is None:
            continue
        encode = maker()
        seconds = timed(lambda encode=encode: [encode(text) for text in texts])
        same = all(list(encode(t)) == ids for t, ids in zip(texts[:500], expected, strict=False))
        label = name if same else f"{name} (OTHER TOKENS)"
        found[label] = sum(map(len, texts)) / seconds
    return found


def _fastokens(path):
    import fastokens

    tokenizer = fastokens._native.Tokenizer.from_file(path)
    return lambda text: tokenizer.encode(text, False)


def _kitoken(path):
    import kitoken

    tokenizer = kitoken.Kitoken.from_file(path)
    return lambda text: tokenizer.encode(text, False)


def _tokie(path):
    import tokie

    tokenizer = tokie.Tokenizer.from_json(path)
    return lambda text: tokenizer.encode(text, False).ids


def projection(per_core: float, read: float, bytes_per_residue: float) -> list[str]:
    """Lines of a table: UniRef50 on so many cores."""
    lines = []
    for cores in (16, 128):
        seconds = max(UNIREF50_RESIDUES / (per_core * cores), UNIREF50_RESIDUES / read)
        bound = "tokenizing" if seconds > UNIREF50_RESIDUES / read else "unzipping on one core"
        disk = UNIREF50_RESIDUES * bytes_per_residue / 1e9
        lines.append(
            f"| {cores} cores (projection) | {seconds / 60:.1f} min, bound by {bound} | "
            f"{disk:.0f} GB, twice that while it is built |"
        )
    return lines


def measure(source: Path, work: Path, cores: int) -> list[tuple[str, str]]:
    """Every figure as a line of the table."""
    from data_prep.sources import read_chunks
    from data_prep.tokenizer import train_tokenizer

    tokenizer, data = work / "tokenizer", work / "data"
    train_tokenizer([source], tokenizer, VOCAB, 5_000_000)
    texts = sequences(source)
    residues = sum(map(len, texts))
    tokenizer_json = tokenizer / "tokenizer.json"
    runs, builds = [], []
    for target in (data, work / "data-2", work / "data-3"):  # by turns: other load comes and goes
        runs.append(bare(tokenizer_json, texts))
        used = []
        action = lambda target=target, used=used: used.append(  # noqa: E731
            cpu_seconds(lambda: build(source, tokenizer, target, cores))
        )
        builds.append((timed(action), used[0]))
    alone, alone_cpu = map(min, zip(*runs, strict=True))
    ours, ours_cpu = map(min, zip(*builds, strict=True))
    theirs_dir = work / "datasets"
    command = [sys.executable, __file__, str(source), "--datasets", str(theirs_dir)]
    command += ["--tokenizer", str(tokenizer_json), "--cores", str(cores)]
    theirs = timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    row, row_datasets = read_rows(data, theirs_dir / "saved")
    read = residues / timed(lambda: [None for _ in read_chunks([source])])
    size = sum(path.stat().st_size for path in data.rglob("*.arrow"))
    memory = []
    for times in (1, MEMORY_TIMES):
        large = enlarge(source, work / f"x{times}.fasta.gz", times)
        command = [sys.executable, "-m", "s2t2_dist.cli", "data", "build", str(large)]
        command += ["--tokenizer", str(tokenizer), "--out", str(work / f"x{times}")]
        memory.append(peak_memory([*command, "--workers", str(cores)]))
    lines = [
        ("residues", f"{residues:,}"),
        (f"bare encode_batch_fast, {cores} cores", f"{residues / alone / 1e6:.2f} M residues/s"),
        (f"tokenize and shard, {cores} cores", f"{residues / ours / 1e6:.2f} M residues/s"),
        ("share of the bare rate (wanted: 0.85)", f"{alone / ours:.2f}"),
        ("the same by processor time", f"{alone_cpu / ours_cpu:.2f}"),
        ("datasets.map + save_to_disk", f"{residues / theirs / 1e6:.2f} M residues/s"),
        ("times datasets (wanted: ahead, aim 2)", f"{theirs / ours:.2f}"),
        ("random row, ShardReader", f"{row * 1e6:.2f} us"),
        ("random row, datasets", f"{row_datasets * 1e6:.0f} us"),
        ("times datasets (wanted: 20)", f"{row_datasets / row:.0f}"),
        ("loader, one core (wanted: 5 M)", f"{loader_rate(data) / 1e6:.0f} M tokens/s"),
        ("reading and cutting, one core", f"{read / 1e6:.0f} M residues/s"),
        *[
            (f"peak memory, {times} times the file (wanted: < 1.5)", f"{gb:.2f} GB")
            for times, gb in zip((1, MEMORY_TIMES), memory, strict=True)
        ],
    ]
    for name, rate in other_libraries(tokenizer_json, texts[:4000]).items():
        lines.append((f"one core, {name}", f"{rate / 1e6:.2f} M residues/s"))
    projected = projection(residues / ours / cores, read, size / residues)
    return lines + [("UniRef50", line) for line in projected]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--datasets", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.datasets:
        with_datasets(arguments.source, arguments.tokenizer, arguments.datasets, arguments.cores)
        return
    with tempfile.TemporaryDirectory() as directory:
        source = arguments.source or synthetic(Path(directory) / "synthetic.fasta.gz")
        lines = measure(source, Path(directory), arguments.cores)
    for name, value in lines:
        print(f"{name:50} {value}")
    if arguments.out:
        arguments.out.write_text(json.dumps(dict(lines), indent=2) + "\n")


if __name__ == "__main__":
    main()
