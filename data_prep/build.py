"""`s2t2 data build`: turn documents into a sealed directory of Arrow shards for `ShardReader`.

A build has three steps:

1. encode: read the input in chunks and write one part per chunk (`parts`);
2. pack: merge the parts in key order into shards (`packing`);
3. seal: write the manifest and rename the directory to its final name.

Each file is written atomically into `.NAME.partial` beside the target. So a killed build continues
where it stopped, and any number of processes on any number of machines can share the work. The
bytes of the result do not depend on how many processes took part.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from data_prep.bpe import plain_bpe
from data_prep.formats import detect_format
from data_prep.options import BuildOptions, is_validation
from data_prep.packing import SplitPlan
from data_prep.progress import OpenFile, reading_progress, tracked, waiting
from data_prep.ranks import OtherRankError, Ranks, exclusive
from data_prep.requests import already_made, describe_sources, mark_failed, open_partial
from data_prep.sources import Chunk
from data_prep.steps import Steps
from data_prep.tokenizer import LoadedTokenizer, load_tokenizer
from data_prep.workers import Workers
from s2t2_dist import artifacts
from s2t2_dist.data.shards import KIND, SPLITS
from s2t2_dist.errors import DataError, S2T2Error

__all__ = ["BuildOptions", "Jobs", "build_shards", "is_validation"]

# How long a rank waits for the others while none of them finishes a file.
PATIENCE_SECONDS = 3600.0
POLL_SECONDS = 0.2
# Below so many bytes of input files, starting processes takes longer than the work.
SMALL_INPUT = 2 << 20

Step = Literal["encode", "pack", "seal"]


@dataclass(frozen=True)
class Jobs:
    """How the work is shared. It changes no byte of the result.

    Attributes:
        workers: processes of this rank.
        rank, ranks: this rank's number, from 0, and how many there are. They share a file system.
        only: run one step and stop; for ranks that do not run at the same time.
    """

    workers: int = 1
    rank: int = 0
    ranks: int = 1
    only: Step | None = None

    def __post_init__(self):
        if not 0 <= self.rank < self.ranks:
            raise DataError(
                f"rank {self.rank} is not one of {self.ranks} ranks; give one from 0 to "
                f"{self.ranks - 1}"
            )


def build_shards(
    inputs: Sequence[Path],
    tokenizer_dir: Path,
    target: Path,
    options: BuildOptions,
    jobs: Jobs = Jobs(),
) -> bool:
    """Encode, split, order and pack documents into `target`, sealed with a manifest.

    A killed build continues where it stopped. After bad input a build with one rank removes its
    unfinished files; after a full disk every build keeps them.

    Returns:
        False if `target` already is the result of the same inputs and options.

    Raises:
        DataError: bad input, or a character that the tokenizer cannot encode.
        ArtifactError: `target` or its unfinished build was made from other inputs or options.
        S2T2Error: the disk is full or read-only, a worker was killed, or files of another rank
            are missing.
    """
    with Ranks(target, jobs.rank, jobs.ranks, together=jobs.only is None) as ranks:
        for path in inputs:
            detect_format(path)  # report a wrong file before hashing gigabytes
        tokenizer = load_tokenizer(tokenizer_dir)
        request = _request(inputs, tokenizer, options)
        if already_made(target, request):
            return False
        with exclusive(target, jobs.rank):
            if already_made(target, request):  # by the process that held the lock
                return False
            partial = open_partial(target, request, jobs.rank)
            steps = Steps(tokenizer_dir, options, request, tuple(inputs), partial, jobs.rank)
            if sum(path.stat().st_size for path in inputs) < SMALL_INPUT:
                jobs = replace(jobs, workers=1)
            plain_bpe(tokenizer.backend)  # compile once, before the workers start
            _run(_Build(steps, jobs, target, ranks))
    return True


def _run(build: "_Build") -> None:
    """Run a build, and clean up after bad input."""
    steps = build.steps
    try:
        build.run()
    except DataError:
        if build.jobs.ranks == 1:
            steps.remove()
        else:
            mark_failed(steps.partial)
        raise
    except OtherRankError as error:
        if error.refused:  # perhaps before it had a folder to mark
            mark_failed(steps.partial)
        raise
    except OSError as error:
        problem = artifacts.disk_error(error, f"building {build.target}")
        if problem is None:
            raise
        raise S2T2Error(f"{problem}; finished files stay in {steps.partial}") from None


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
        **options.read.request(),
        "dropped_ids": describe_sources([options.drop_ids])[0] if options.drop_ids else None,
    }


class _Build:
    """One rank's share of a build."""

    def __init__(self, steps: Steps, jobs: Jobs, target: Path, ranks: Ranks):
        self.steps, self.jobs, self.target, self.ranks = steps, jobs, target, ranks

    def run(self) -> None:
        """Run the steps; a rank that is slow may find that rank 0 has published the result."""
        try:
            self._run_steps()
        except (OSError, S2T2Error):  # the folder of the build went away, or was waited for
            if not self._is_published():
                raise
            self.steps.remove()

    def _is_published(self) -> bool:
        return self.jobs.rank != 0 and artifacts.is_complete(self.target)

    def _run_steps(self) -> None:
        """Run the steps. After each, ranks that run at the same time wait for one another."""
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
            self._wait(lambda: self._missing_shards(plans), "pack")
            steps.seal(plans)
        steps.publish(self.target)

    def _encode(self, workers: Workers) -> None:
        if self.steps.missing_parts() == []:
            return
        with reading_progress("Encoding") as open_file:
            for _ in workers.map("encode", self._own_chunks(open_file)):
                self.ranks.require([])

    def _own_chunks(self, open_file: OpenFile) -> Iterator[tuple[Chunk]]:
        """Yield this rank's chunks that have no part yet; rank 0 then records their number."""
        count = 0
        for chunk in self.steps.chunks(open_file):
            count += 1
            if self._is_mine(chunk.number) and not self.steps.part(chunk.number).exists():
                yield (chunk,)
        if self.jobs.rank == 0:
            self.steps.set_part_count(count)

    def _plan(self, workers: Workers) -> list[SplitPlan]:
        with waiting("Adding up the parts"):
            self.steps.check_counts()
        with waiting("Planning the shards"):
            return [
                self.steps.plan(split, lambda windows: workers.map("window_rows", windows))
                for split in SPLITS
            ]

    def _missing_shards(self, plans: list[SplitPlan]) -> list[int]:
        """Numbers of the shards that are not packed, counted over all splits."""
        shards = [(plan, shard) for plan in plans for shard in range(plan.shards)]
        return [n for n, each in enumerate(shards) if not self.steps.is_packed(*each)]

    def _pack(self, workers: Workers, plans: list[SplitPlan]) -> None:
        shards = [(plan, shard) for plan in plans for shard in range(plan.shards)]
        mine = [shards[n] for n in self._missing_shards(plans) if self._is_mine(n)]
        for _ in tracked(workers.map("pack", mine), len(mine), "Packing shards"):
            self.ranks.require([])

    def _is_mine(self, number: int) -> bool:
        return number % self.jobs.ranks == self.jobs.rank

    def _wait(self, missing: Callable[[], list[int] | None], step: Step) -> None:
        """Return when no file of a step is missing; wait if other ranks run at the same time.

        Args:
            missing: numbers of the files that are missing, or None if rank 0 has yet to count them.

        Raises:
            S2T2Error: files are missing, and no other rank runs or none of them makes progress.
        """
        if (left := missing()) == []:
            return
        if self.jobs.ranks == 1 or self.jobs.only is not None:
            raise self._unfinished(left, step)
        last, since = None, time.monotonic()
        waited_for: list[int] = []
        with waiting(f"Rank {self.jobs.rank} waits for ", lambda: self.ranks.describe(waited_for)):
            while (left := missing()) != []:
                if left != last:
                    last, since = left, time.monotonic()
                if self._is_published() or time.monotonic() - since > PATIENCE_SECONDS:
                    raise self._unfinished(left, step)
                waited_for[:] = {number % self.jobs.ranks for number in left or [0]}
                self.ranks.require(waited_for)
                time.sleep(POLL_SECONDS)

    def _unfinished(self, left: list[int] | None, step: Step) -> S2T2Error:
        count = "an unknown number" if left is None else len(left)
        return S2T2Error(
            f"the step {step} is not finished in {self.steps.partial} (files missing: {count}); "
            f"run that step on every rank (of {self.jobs.ranks}), then this one"
        )
