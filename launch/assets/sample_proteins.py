"""Draw a fixed sample of clusters from a clustered protein FASTA.

    python launch/assets/sample_proteins.py swissprot50.fasta.gz --clusters 4000 \\
        --out proteins.fasta.gz

Takes the clusters whose ids have the smallest SHA-256, of any length. So the sample does not depend
on the order of the file, and a smaller sample is a subset of a larger one. The records keep the
order, the headers and the lines of the input. The same input gives the same bytes.
"""

import argparse
import gzip
import hashlib
import heapq
from collections.abc import Iterator
from pathlib import Path

MAX_BYTES = 1_200_000


def records(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (cluster id, the record's bytes) of a gzip FASTA; the id is the header's first word."""
    name, lines = "", []
    with gzip.open(path, "rb") as f:
        for line in f:
            if line.startswith(b">"):
                if lines:
                    yield name, b"".join(lines)
                name, lines = line[1:].split(maxsplit=1)[0].decode(), []
            lines.append(line)
    if lines:
        yield name, b"".join(lines)


def rank(name: str) -> bytes:
    """The sort key by which clusters are drawn."""
    return hashlib.sha256(name.encode()).digest()


def sample(source: Path, clusters: int, output: Path) -> int:
    """Write the sample and return its size in bytes.

    Raises:
        SystemExit: the sample would be larger than MAX_BYTES; nothing is written.
    """
    chosen = set(heapq.nsmallest(clusters, (name for name, _ in records(source)), key=rank))
    text = b"".join(record for name, record in records(source) if name in chosen)
    compressed = gzip.compress(text, 9, mtime=0)
    if len(compressed) > MAX_BYTES:
        raise SystemExit(
            f"{clusters} clusters of {source} take {len(compressed)} bytes, more than {MAX_BYTES};"
            " ask for fewer"
        )
    output.write_bytes(compressed)
    return len(compressed)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw a fixed sample of clusters from a FASTA.gz.")
    parser.add_argument("source", type=Path, help="the clustered FASTA.gz")
    parser.add_argument("--clusters", type=int, required=True, help="how many to draw")
    parser.add_argument("--out", type=Path, required=True, help="the FASTA.gz to write")
    arguments = parser.parse_args()
    size = sample(arguments.source, arguments.clusters, arguments.out)
    print(f"{arguments.clusters} clusters, {size} bytes: {arguments.out}")


if __name__ == "__main__":
    main()
