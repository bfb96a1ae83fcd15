"""What both commands share: naming their inputs, and not making the same thing twice."""

from collections.abc import Sequence
from pathlib import Path

from s2t2_dist import artifacts
from s2t2_dist.errors import ArtifactError


def describe_sources(paths: Sequence[Path]) -> list[dict]:
    """Name, size and sha256 of each input file, for the manifest."""
    return [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": artifacts.sha256_file(path)}
        for path in paths
    ]


def already_made(target: Path, request: dict) -> bool:
    """Whether `target` is complete and was made from exactly this request.

    Raises:
        ArtifactError: it exists but is unfinished, damaged or was made from something else.
    """
    if not target.exists():
        return False
    manifest = artifacts.verify(target, hashes=False)
    differing = [key for key, value in request.items() if manifest.get(key) != value]
    if differing:
        raise ArtifactError(
            f"{target} was made with another {', '.join(differing)}; choose another folder"
        )
    return True
