"""A checkpoint that cannot be cut anew; those that can: `test_train.py`, `LEGS`."""

import pytest

from s2t2_dist import universal
from s2t2_dist.comm import LocalComm
from s2t2_dist.errors import S2T2Error


@pytest.mark.slow
def test_a_conversion_that_fails_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "finetune-000001" / universal.ENGINE_DIR).mkdir(parents=True)
    message = "finetune-000001 could not be converted to another .*Error: .*; free space"
    with (
        pytest.raises(S2T2Error, match=message),
        universal.converted(tmp_path / "finetune-000001", LocalComm()),
    ):
        pytest.fail("there is nothing to load")
    assert [path.name for path in tmp_path.iterdir()] == ["finetune-000001"]
