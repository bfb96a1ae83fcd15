"""Checkpoints: whole or not there, verified, the newest position first, old ones removed."""

import pytest

from s2t2_dist import artifacts
from s2t2_dist.comm import Comm
from s2t2_dist.errors import ArtifactError, ConfigError, S2T2Error
from s2t2_dist.run import checkpoint
from tests.jobs.distributed import run_ranks


def position(stage_index: int, stage: str, step: int) -> checkpoint.Position:
    return checkpoint.Position(stage_index, stage, step, world_size=1, metrics_bytes=7)


def save(run_dir, where, text="state", keep=9):
    checkpoint.save(run_dir, where, lambda d: (d / "state").write_text(text) and None, Comm(), keep)


def test_the_newest_position_is_found_across_stages(tmp_path):
    # Written out of order, and with names that sort the other way.
    for where in (position(1, "finetune", 3), position(0, "translate", 9), position(1, "a", 0)):
        save(tmp_path, where)
    path, found = checkpoint.find(tmp_path, Comm())
    assert path.name == "finetune-000003"
    assert found == position(1, "finetune", 3)


def test_nothing_to_find(tmp_path):
    assert checkpoint.find(tmp_path, Comm()) is None


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "remove", "manifest", "no json", "unlisted", "not complete"]
)
def test_a_damaged_one_is_set_aside_for_the_one_before(tmp_path, damage, caplog):
    """One line says what is wrong, and the damaged one never counts again."""
    for step in (1, 2):
        save(tmp_path, position(0, "translate", step))
    newest = tmp_path / "checkpoints/translate-000002"
    state = newest / "state"
    if damage == "flip":
        state.write_text("stAte")
    elif damage == "cut":
        state.write_text("sta")
    elif damage == "remove":
        state.unlink()
    elif damage == "unlisted":  # DeepSpeed finds some files by pattern, and unpickles them
        (newest / "mp_rank_00_model_states.pt").write_text("x")
    elif damage == "not complete":
        (newest / "COMPLETE").unlink()
    elif damage == "no json":
        (newest / artifacts.MANIFEST).write_text("{")
    else:
        manifest = newest / artifacts.MANIFEST
        manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 3'))
    with caplog.at_level("WARNING"):
        assert checkpoint.find(tmp_path, Comm())[1].step == 1
    (line,) = caplog.messages
    assert "resuming from translate-000001 because" in line and "translate-000002" in line
    # Retention counts what is good only: the next two saves leave themselves.
    for step in (3, 4):
        save(tmp_path, position(0, "translate", step), keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [".damaged-translate-000002", "translate-000003", "translate-000004"]


def test_where_none_is_good_nothing_starts_over_in_silence(tmp_path):
    for step in (1, 2):
        save(tmp_path, position(0, "translate", step))
        (tmp_path / f"checkpoints/translate-00000{step}/state").write_text("other")
    with pytest.raises(ArtifactError, match=r"no checkpoint to resume from: .*2/state .*1/state"):
        checkpoint.find(tmp_path, Comm())
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_asking_for_a_damaged_one_by_name_is_refused(tmp_path):
    save(tmp_path, position(0, "translate", 1))
    path = tmp_path / "checkpoints/translate-000001"
    (path / "state").write_text("other")
    with pytest.raises(ArtifactError, match="translate-000001/state was altered"):
        checkpoint.find(tmp_path, Comm(), path)


def test_one_of_another_run_is_refused(tmp_path):
    save(tmp_path / "other", position(0, "translate", 1))
    with pytest.raises(ArtifactError, match="is not a checkpoint of"):
        checkpoint.find(tmp_path / "run", Comm(), tmp_path / "other/checkpoints/translate-000001")


def test_one_that_is_not_the_newest_is_refused_until_the_newer_are_gone(tmp_path):
    for where in (position(0, "translate", 4), position(0, "translate", 8), position(1, "f", 2)):
        save(tmp_path, where)
    checkpoints = tmp_path / "checkpoints"
    asked = checkpoints / "translate-000004"
    with pytest.raises(
        ConfigError, match=r"newer checkpoints \(f-000002, translate-000008\); move"
    ):
        checkpoint.find(tmp_path, Comm(), asked)
    for name in ("f-000002", "translate-000008"):
        (checkpoints / name).rename(tmp_path / name)
    assert checkpoint.find(tmp_path, Comm(), asked) == (asked, position(0, "translate", 4))


def test_old_ones_are_removed_only_after_the_new_one_is_there(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, position(0, "translate", step), keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["translate-000002", "translate-000003"]


def test_every_nth_stays_for_good(tmp_path):
    for step in range(1, 11):
        where = position(0, "translate", step)
        checkpoint.save(tmp_path, where, lambda d: None, Comm(), 2, keep_steps=4)
    names = sorted(path.name[-2:] for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["04", "08", "09", "10"]


def test_a_failed_save_leaves_the_ones_before_and_one_clear_line(tmp_path):
    save(tmp_path, position(0, "translate", 1), keep=1)

    def disk_full(directory):
        (directory / "half").write_text("half")
        raise RuntimeError("[enforce fail] unexpected pos 64 vs 0")

    with pytest.raises(S2T2Error, match=r"translate-000002 could not be written .*MiB free"):
        checkpoint.save(tmp_path, position(0, "translate", 2), disk_full, Comm(), 1)
    assert checkpoint.find(tmp_path, Comm())[1].step == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["translate-000001"]


def test_the_same_position_can_be_saved_again(tmp_path):
    save(tmp_path, position(0, "translate", 1), "first")
    save(tmp_path, position(0, "translate", 1), "second")
    path, _ = checkpoint.find(tmp_path, Comm())
    assert (path / "state").read_text() == "second"


def _damaged_in_the_share_of_rank_1(comm, run_dir):
    for step in (1, 2):
        where = checkpoint.Position(0, "translate", step, comm.size, 0)
        checkpoint.save(
            run_dir, where, lambda d: (d / f"rank-{comm.rank}").write_text("x") and None, comm, 2
        )
    before = checkpoint.find(run_dir, comm)
    if comm.rank == 0:
        (run_dir / "checkpoints/translate-000002/rank-1").write_text("y")
    comm.barrier()
    return before, checkpoint.find(run_dir, comm)


def test_the_ranks_share_the_writing_and_the_checking(tmp_path):
    found = run_ranks(_damaged_in_the_share_of_rank_1, 2, tmp_path, tmp_path / "run")
    assert found[0] == found[1]
    (_, newest), (path, position) = found[0]
    assert (newest.step, position.step) == (2, 1)
    assert artifacts.verify(path)["files"].keys() == {"rank-0", "rank-1"}


def _save_where_rank_1_fails(comm, run_dir) -> tuple[str, bool]:
    def write(directory) -> None:
        if comm.rank == 1:
            raise OSError(28, "No space left on device")
        (directory / "part").write_text("x")

    where = checkpoint.Position(0, "translate", 4, comm.size, 0)
    try:
        checkpoint.save(run_dir, where, write, comm, 2)
    except S2T2Error as error:
        return str(error), error.collective
    return "saved", False


def test_one_full_disk_is_every_ranks_error(tmp_path):
    """Without agreement rank 0 would wait for rank 1 until the group's timeout."""
    found = run_ranks(_save_where_rank_1_fails, 2, tmp_path, tmp_path / "run", timeout=60)
    assert found[0] == found[1]
    message, everywhere = found[0]
    assert message.startswith("rank 1 on ") and ": no space left while saving" in message
    assert everywhere
    assert not list((tmp_path / "run/checkpoints").iterdir())
