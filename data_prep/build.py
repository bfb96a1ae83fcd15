"""`s2t2 data build`: documents -> a sealed directory of Arrow shards that `ShardReader` reads.

Three steps, each of them files that are there or not, so that a killed build goes on where it was
and any number of processes on any number of machines can share the work:

1. encode: the input, cut into chunks, becomes one part for each (`parts`);
2. pack: the parts, merged in the order of the keys, become shards (`packing`);
3. seal: the manifest, and one rename puts the directory in its place.

Until then everything is in `.NAME.partial` beside the target. No byte of the result depends on how
many processes took part.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.bpe import plain_bpe
from data_prep.packing import SplitPlan
from data_prep.requests import already_made, describe_sources, open_partial
from data_prep.sources import (
    Chunk,
    OpenFile,
    detect_format,
    progress_bar,
    read_chunks,
    reading_progress,
)
from data_prep.steps import BuildOptions, Steps, is_validation
from data_prep.tokenizer import LoadedTokenizer, load_tokenizer
from data_prep.workers import Workers
from s2t2_dist import artifacts
from s2t2_dist.data.shards import KIND, SPLITS
from s2t2_dist.errors import DataError, S2T2Error

__all__ = ["BuildOptions", "Jobs", "build_shards", "is_validation"]

# How long a rank waits for the others while none of them writes anything.
PATIENCE_SECONDS = 3600.0
POLL_SECONDS = 0.2
# Compressed bytes below which starting processes takes longer than the work.
SMALL_INPUT = 2 << 20

Step = Literal["encode", "pack", "seal"]


@dataclass(frozen=True)
class Jobs:
    """Who does the work; changes no byte of the result.

    Attributes:
        workers: processes of this rank.
        rank, ranks: which share of the work is done here. Ranks need a common file system.
        only: do one step and stop; for ranks that do not run at the same time.
    """

    workers: int = 1
    rank: int = 0
    ranks: int = 1
    only: Step | None = None

    def __post_init__(self):
        if not 0 <= self.rank < self.ranks:
            raise DataError(f"rank {self.rank} is not one of {self.ranks}; they count from 0")


def build_shards(
    inputs: Sequence[Path],
    tokenizer_dir: Path,
    target: Path,
    options: BuildOptions,
    jobs: Jobs = Jobs(),
) -> bool:
    """Encode, split, order and pack documents into `target`, sealed with a manifest.

    A build that was killed goes on. A mistake in the input removes what was made so far where one
    rank does all of it; a full disk does not.

    Returns:
        False if `target` already holds exactly this.

    Raises:
        DataError: bad input, or a character that the tokenizer cannot encode.
        ArtifactError: `target` exists and is something else, or an unfinished other build is there.
    """
    for path in inputs:
        detect_format(path)  # a wrong name is reported before gigabytes are hashed
    tokenizer = load_tokenizer(tokenizer_dir)
    request = _request(inputs, tokenizer, options)
    if already_made(target, request):
        return False
    partial = open_partial(target, request)
    steps = Steps(tokenizer_dir, options, request, tuple(inputs), partial, jobs.rank)
    if sum(path.stat().st_size for path in inputs) < SMALL_INPUT:
        jobs = Jobs(1, jobs.rank, jobs.ranks, jobs.only)
    plain_bpe(tokenizer.backend)  # compiled here, before every worker would do it
    try:
        _Build(steps, jobs, target).run()
    except DataError:
        if jobs.ranks == 1:
            steps.remove()
        raise
    except OSError as error:
        problem = artifacts.disk_error(error, f"building {target}")
        if problem is None:
            raise
        raise S2T2Error(f"{problem}; what is done stays in {partial}") from None
    return True


def _request(inputs: Sequence[Path], tokenizer: LoadedTokenizer, options: BuildOptions) -> dict:
    """Everything that decides the result; the manifest records it."""
    return {
        "kind": KIND,
        "sources": describe_sources(inputs),
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "context": options.context,
        "packing": options.packing,
        "characters": options.characters,
        "validation_fraction": options.validation_fraction,
        "seed": options.seed,
        "strict": options.read.strict,
        "field": options.read.field,
        "dropped_ids": describe_sources([options.drop_ids])[0] if options.drop_ids else None,
    }


class _Build:
    """One rank's share of a build."""

    def __init__(self, steps: Steps, jobs: Jobs, target: Path):
        self.steps, self.jobs, self.target = steps, jobs, target

    def run(self) -> None:
        """Do the steps; several ranks wait between them until all have done theirs."""
        only, steps = self.jobs.only, self.steps
        if self.jobs.ranks == 1:
            steps.remove_temporaries()
        if not artifacts.is_complete(steps.partial):
            with Workers(self.jobs.workers, steps) as workers:
                if only in (None, "encode"):
                    self._encode(workers)
                if only == "encode":
                    return
                self._wait(steps.missing_parts, "encode")
                plans = self._plan(workers)
                if only in (None, "pack"):
                    self._pack(workers, plans)
            if only == "pack" or self.jobs.rank != 0:
                return
            self._wait(lambda: steps.missing_shards(plans), "pack")
            steps.seal(plans)
        steps.publish(self.target)

    def _encode(self, workers: Workers) -> None:
        if self.steps.missing_parts() == []:
            return
        with reading_progress("Encoding") as open_file:
            for _ in workers.map("encode", self._own_chunks(open_file)):
                pass

    def _own_chunks(self, open_file: OpenFile) -> Iterator[tuple[Chunk]]:
        """The chunks of this rank that have no part yet."""
        count = 0
        for chunk in read_chunks(self.steps.inputs, None, open_file):
            count += 1
            if self._is_mine(chunk.number) and not self.steps.part(chunk.number).exists():
                yield (chunk,)
        if self.jobs.rank == 0:
            self.steps.set_part_count(count)

    def _plan(self, workers: Workers) -> list[SplitPlan]:
        self.steps.check_counts()
        return [
            self.steps.plan(split, lambda windows: workers.map("window_rows", windows))
            for split in SPLITS
        ]

    def _pack(self, workers: Workers, plans: list[SplitPlan]) -> None:
        shards = [(plan, shard) for plan in plans for shard in range(plan.shards)]
        missing = {(plan.split, shard) for plan, shard in self.steps.missing_shards(plans)}
        mine = [
            (plan, shard)
            for number, (plan, shard) in enumerate(shards)
            if self._is_mine(number) and (plan.split, shard) in missing
        ]
        with progress_bar() as progress:
            packed = workers.map("pack", mine)
            for _ in progress.track(packed, total=len(mine), description="Packing shards"):
                pass

    def _is_mine(self, number: int) -> bool:
        return number % self.jobs.ranks == self.jobs.rank

    def _wait(self, missing: Callable[[], list | None], step: Step) -> None:
        """Return when nothing is missing; others may be at it.

        Raises:
            S2T2Error: nobody is, or none of them writes anything any more.
        """
        waiting = self.jobs.ranks > 1 and self.jobs.only is None
        last, since = None, time.monotonic()
        while (left := missing()) != []:
            if left != last:
                last, since = left, time.monotonic()
            if not waiting or time.monotonic() - since > PATIENCE_SECONDS:
                what = "nobody knows how much of" if left is None else f"{len(left)} files of"
                raise S2T2Error(
                    f"{what} the step {step} is missing in {self.steps.partial}; run that step of "
                    f"every rank (of {self.jobs.ranks}) and then this one again"
                )
            time.sleep(POLL_SECONDS)
