"""A checkpoint that cannot be cut anew; those that can: `test_train.py`, `LEGS`."""

import psutil
import pytest

from s2t2_dist.comm import Comm
from s2t2_dist.errors import S2T2Error
from s2t2_dist.run import reshard


@pytest.mark.slow
def test_a_conversion_that_fails_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "finetune-000001" / reshard.ENGINE_DIR).mkdir(parents=True)
    message = "finetune-000001 could not be converted to another .*Error: .*; free space"
    with (
        pytest.raises(S2T2Error, match=message),
        reshard.converted(tmp_path / "finetune-000001", Comm()),
    ):
        pytest.fail("there is nothing to load")
    assert [path.name for path in tmp_path.iterdir()] == ["finetune-000001"]


def test_an_interrupted_wait_ends_the_conversion(tmp_path, monkeypatch):
    """As when a collective fails meanwhile, or the user interrupts."""
    (tmp_path / "finetune-000001" / reshard.ENGINE_DIR).mkdir(parents=True)

    def interrupt(*_) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(reshard, "_running", interrupt)
    with (
        pytest.raises(KeyboardInterrupt),
        reshard.converted(tmp_path / "finetune-000001", Comm()),
    ):
        pytest.fail("there is nothing to load")
    assert [path.name for path in tmp_path.iterdir()] == ["finetune-000001"]
    running = [child.cmdline() for child in psutil.Process().children(recursive=True)]
    assert not [words for words in running if reshard.CONVERTER in words]
