"""Sealed directories: whom their files are for."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from s2t2_dist import artifacts


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_reads_a_result(umask, mode, tmp_path):
    """safetensors makes its files for the owner alone."""
    before = os.umask(umask)
    try:
        with artifacts.sealed_directory(tmp_path / "out", {"kind": "model"}) as folder:
            save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
            (folder / "sub").mkdir()
            (folder / "sub" / "config.json").write_text("{}")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in files}
    assert len(modes) == 4 and set(modes.values()) == {mode}, modes


def test_a_file_system_without_permissions(tmp_path, monkeypatch):
    """vfat and SMB show modes of their own and refuse to change them."""

    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    with artifacts.sealed_directory(tmp_path / "out", {"kind": "model"}) as folder:
        os.close(os.open(folder / "a", os.O_CREAT, 0o755))
    assert artifacts.verify(tmp_path / "out")


def test_what_a_link_points_to_keeps_its_permissions(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o400)
    with artifacts.sealed_directory(tmp_path / "out", {"kind": "model"}) as folder:
        (folder / "link").symlink_to(secret)
    assert stat.S_IMODE(secret.stat().st_mode) == 0o400
