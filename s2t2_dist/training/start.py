"""From a recipe to a run: the checks of a start, the run directory, then the loop."""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from s2t2_dist import comm
from s2t2_dist.comm import agree
from s2t2_dist.config import Recipe
from s2t2_dist.data.shards import ShardReader, require_tokenizer
from s2t2_dist.errors import S2T2Error
from s2t2_dist.lm import engine
from s2t2_dist.lm.inputs import identified
from s2t2_dist.run import checkpoint, directory, heartbeat
from s2t2_dist.run.link import is_shipped
from s2t2_dist.run.stopping import Launchers, StopRequest
from s2t2_dist.training import preflight
from s2t2_dist.training.context import Context
from s2t2_dist.training.loop import EXIT_DONE, Trainer, start_shipper


def run(
    recipe: Recipe,
    resume: str = "auto",
    dry_run: bool = False,
    launchers: Launchers | None = None,
) -> int:
    """Run a recipe's stages in its run directory, from its newest checkpoint where there is one.

    Args:
        resume: `auto` (the newest good checkpoint), `never` (a new directory only) or the path of
            a checkpoint of this run.
        dry_run: make every check of a start, say what it would do, and write nothing. That every
            rank sees a run directory is checked only where there is one.
        launchers: of this process, as they were early; default: as they are now.

    Returns:
        the exit code: 0 done, 3 stopped by a signal or the time limit, with a checkpoint written.

    Raises:
        S2T2Error: a user's mistake, found before anything is written; a full disk; a model
            that has diverged.
    """
    launchers = launchers or Launchers.now()
    device = engine.init_distributed(recipe.collective_timeout)
    try:
        code = run_joined(recipe, device, resume, dry_run, launchers)
    except S2T2Error as error:
        if error.collective:  # else the other ranks may still be waiting in a collective
            comm.destroy()
        raise
    comm.destroy()
    return code


def run_joined(
    recipe: Recipe,
    device: torch.device,
    resume: str = "auto",
    dry_run: bool = False,
    launchers: Launchers | None = None,
    outer: StopRequest | None = None,
) -> int:
    """`run` in a process that has joined its job, and stays in it: for several runs in a process.

    Args:
        device: of `engine.init_distributed`.
        outer: asks every run of this process to stop; without it the run handles the signals.
    """
    world = comm.world_comm()
    record = partial(directory.record_loss, recipe.output_dir.resolve())
    with heartbeat.monitored(world, recipe.heartbeat_timeout, record) as await_cause:
        context = _open(recipe, world, device)
        if dry_run:
            _rehearse(context, resume)
            return EXIT_DONE
        return _run_job(context, resume, await_cause, launchers or Launchers.now(), outer)


def _open(recipe: Recipe, world: comm.Comm, device: torch.device) -> Context:
    """Make every check that needs no run directory. A collective."""
    preflight.check_agreement(recipe, world)
    context = agree(world, lambda: _open_inputs(recipe, world, device), "opening the inputs")
    preflight.check_room(context)
    return context


def _run_job(
    context: Context,
    resume: str,
    await_cause: Callable[[BaseException], None],
    launchers: Launchers,
    outer: StopRequest | None,
) -> int:
    world = context.comm
    with contextlib.ExitStack() as held:
        state = _claim(context, resume, held)
        preflight.check_shared(context.run_dir, world)
        if world.broadcast_object(state) != "done":
            return Trainer(context, _asked_for(resume), await_cause, launchers, outer).run()
        if world.rank == 0:
            _finish_shipping(context)
            print(f"{context.run_dir} is done; nothing to do")
        return EXIT_DONE


def _open_inputs(recipe: Recipe, world: comm.Comm, device: torch.device) -> Context:
    """Check and open what a run reads, before anything is written."""
    data = recipe.data
    train = ShardReader(data.path, "train", data.verify)
    if data.tokenizer is not None:
        require_tokenizer(train.metadata, data.tokenizer)
    for stage in recipe.stages:
        engine.split_batch(stage, world.size)
    context = Context(
        recipe=recipe,
        run_dir=recipe.output_dir.resolve(),
        comm=world,
        device=device,
        deepspeed=engine.load_settings(recipe.deepspeed),
        train=train,
        validation=ShardReader(data.path, "validation"),
    )
    preflight.check_inputs(context)
    return context


def _claim(context: Context, resume: str, held: contextlib.ExitStack) -> str | None:
    """Make or take over the run directory on rank 0, which gets its state. A collective.

    Args:
        held: unlocks the directory.
    """
    inputs = identified(context.recipe, context.run_dir, context.deepspeed, context.comm)

    def claim() -> str | None:
        if context.comm.rank != 0:
            return None
        claimed = directory.claimed(context.run_dir, context.recipe, inputs, resume)
        held.enter_context(claimed)
        return directory.read_state(context.run_dir)

    return agree(context.comm, claim, "making the run directory")


def _rehearse(context: Context, resume: str) -> None:
    """Check what a start would find in the run directory; print what it would do. A collective."""
    run_dir, world = context.run_dir, context.comm
    is_run = world.broadcast_object((run_dir / directory.CONFIG).exists())
    inputs = {}  # of a new run nothing is compared
    if is_run:
        inputs = identified(context.recipe, run_dir, context.deepspeed, world)

    def look() -> str | None:
        if world.rank != 0:
            return None
        directory.check(run_dir, context.recipe, inputs, resume)
        directory.check_unlocked(run_dir)
        return directory.read_state(run_dir)

    state = agree(world, look, "looking at the run directory")
    preflight.check_shared(run_dir, world)
    would = "is done"
    if world.broadcast_object(state) != "done":
        choice = checkpoint.choose(run_dir, world, _asked_for(resume))
        would = "would start from step 0"
        if choice:
            preflight.check_resume(context, choice.path, choice.position)
            damage = "".join(f", since {problem}" for problem in choice.damaged.values())
            would = f"would resume from {choice.path.name}{damage}"
    if world.rank == 0:
        print(f"{run_dir} {would}")
        _describe(context)


def _asked_for(resume: str) -> Path | None:
    """The checkpoint that `--resume` names, if it names one."""
    return None if resume in ("auto", "never") else Path(resume)


def _describe(context: Context) -> None:
    """Print the steps of each stage and what a rank needs."""
    ranks = context.comm.size
    for stage in context.recipe.stages:
        rows, passes = engine.split_batch(stage, ranks)
        print(
            f"{stage.name}: {stage.max_steps} steps of {stage.train_batch_size} rows; "
            f"each of {ranks} ranks makes {passes} passes of {rows} rows per step"
        )
    need = preflight.needs(context)
    memory, disk = need.memory / preflight.GIB, need.checkpoint / preflight.GIB
    print(f"at least {memory:.2f} GiB of memory for each rank, {disk:.2f} GiB for each checkpoint")
    print("every check passed; nothing was written")


def _finish_shipping(context: Context) -> None:
    """Send MLflow what a finished run could not send at its end."""
    if context.recipe.tracking.enabled and not is_shipped(context.run_dir):
        start_shipper(context).close("FINISHED")
