"""The results page of the data benchmark, and the projection for UniRef50."""

from pathlib import Path

from data_prep.packing import WINDOW_TOKENS
from data_prep.sources import LARGEST_CHUNK
from s2t2_dist.data.shards import ROWS_PER_SHARD

DOCS = Path("docs/data.md")
BEGIN, END = "<!-- projection -->", "<!-- end of projection -->"
# UniRef50: residues, clusters, bytes of its gzip file.
RESIDUES, RECORDS, GZIP_BYTES = 17_282_055_793, 60_315_044, 8.8e9


def project(report: dict, cores: int) -> dict[str, float]:
    """Seconds of each step for UniRef50 on one machine with `cores` cores, and bytes of shards.

    - hash: one core hashes the input once.
    - encode: proportional to residues / cores, but not below the time in which one core
      decompresses the input (`read`).
    - pack: proportional to tokens, plus a lookup per window and part, divided by the cores; at
      most one process per shard takes part.
    """
    growth = RESIDUES / report["large_residues"]
    encode = report["large_encode_seconds"] * growth * report["cores"] / cores
    read = report["read_seconds"] * growth
    tokens = report["large_tokens"] * growth
    shards = max(1, tokens / (ROWS_PER_SHARD * report["context"]))
    parts = (RESIDUES + RESIDUES / 60 + 90 * RECORDS) / LARGEST_CHUNK
    looks = parts * 2 ** (int(tokens / WINDOW_TOKENS).bit_length()) * report["look_seconds"]
    pack = report["large_pack_seconds"] * growth * report["cores"] + looks
    return {
        "hash": GZIP_BYTES / report["hash_bytes_per_second"],
        "read": read,
        "encode": max(encode, read),
        "pack": pack / min(cores, shards),
        "bytes": report["large_shard_bytes"] * growth,
    }


def projection_table(report: dict) -> list[str]:
    """The projection as lines of Markdown."""
    lines = [
        "| UniRef50, projected (not run) | hash input | encode | pack | total | shards | "
        "free disk needed |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for cores in (16, 128):
        p = project(report, cores)
        bound = " (decompression)" if p["encode"] == p["read"] else ""
        total = p["hash"] + p["encode"] + p["pack"]
        lines.append(
            f"| one machine, {cores} cores | {p['hash']:.0f} s | {p['encode']:.0f} s{bound} | "
            f"{p['pack']:.0f} s | {total / 60:.1f} min | {p['bytes'] / 1e9:.0f} GB | "
            f"{2 * p['bytes'] / 1e9:.0f} GB |"
        )
    return lines


def with_projection(page: str, report: dict) -> str:
    """The page with the projection between its two markers."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    note = (
        f"Projected from the rates in `tests/bench/results/data.md` ({report['machine']['cpu']}, "
        f"{report['cores']} cores), for a disk that is not the bottleneck:"
    )
    return "\n".join([f"{before}{BEGIN}", note, "", *projection_table(report), f"{END}{after}"])


def markdown(report: dict) -> str:
    """The results page."""
    r, machine = report, report["machine"]
    residues, large = r["residues"], r["large_residues"]
    encode_large = r["large_encode_seconds"] + r["large_pack_seconds"] + r["large_seal_seconds"]
    bare = residues / r["bare_seconds"]
    rows = [
        ("`encode_batch_fast` alone", f"{bare / 1e6:.1f} M residues/s", ""),
        _rate("`s2t2 data build`, whole command", residues / r["build_seconds"], bare, 0.85),
        _rate(f"the same command, {r['times']} times the input", large / encode_large, bare, 0.85),
        (
            "`datasets.map` + `save_to_disk`",
            f"{residues / r['datasets_seconds'] / 1e6:.1f} M residues/s",
            f"`data build` is {r['datasets_seconds'] / r['build_seconds']:.1f} times as fast "
            "(required: > 1; target: 2)",
        ),
        ("random row, `ShardReader`", f"{r['row_seconds'] * 1e6:.2f} us", ""),
        (
            "random row, `datasets`",
            f"{r['datasets_row_seconds'] * 1e6:.0f} us",
            f"{r['datasets_row_seconds'] / r['row_seconds']:.0f} times as long (required: 20)",
        ),
        (
            "training batches on one core",
            f"{r['loader_tokens_per_second'] / 1e6:.0f} M tokens/s",
            "required: 5",
        ),
        ("peak memory of the build", f"{r['small_peak_bytes'] / 1e9:.2f} GB", "required: < 1.5"),
        (
            f"peak memory, {r['times']} times the input",
            f"{r['large_peak_bytes'] / 1e9:.2f} GB",
            "required: < 1.5",
        ),
    ]
    lines = [
        "# Data preparation: speed and memory",
        "",
        f"`{r['command']}`",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB. "
        f"Input: {r['input']}, {r['texts']:,} proteins, {residues:,} residues; vocabulary "
        f"{r['vocab']}, context {r['context']}. Every method has {r['cores']} cores. Times are the "
        "best of several runs in turns. `data build` and `datasets` run as whole programs and "
        "read the file; `encode_batch_fast` gets texts in memory, and its result is dropped. "
        "Memory is the proportional set size of all processes.",
        "",
        "| measurement | result | comparison |",
        "|---|---:|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "BPE encoders on one thread, on every protein of the input:",
        "",
        "| encoder | M residues/s | proteins whose tokens differ from those of `tokenizers` |",
        "|---|---:|---:|",
    ]
    for name, found in r["libraries"].items():
        rate = residues / found["seconds"] / 1e6
        lines.append(f"| {name} {found['version']} | {rate:.1f} | {found['other_tokens']:,} |")
    return "\n".join([*lines, "", *projection_table(r), ""])


def _rate(name: str, rate: float, bare: float, wanted: float) -> tuple[str, str, str]:
    note = f"{rate / bare:.2f} times `encode_batch_fast` (required: {wanted})"
    return name, f"{rate / 1e6:.1f} M residues/s", note
