"Files appear whole or not at all, and nothing of the user's goes"
import os
from pathlib import Path

import pytest

from t2v_turbo.cli import main
from t2v_turbo.files import UserError, atomic, write_json


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path, capsys):
    "The folder and what is in it stay"
    (tmp_path / "results").mkdir(); (tmp_path / "results" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="results' is a folder: give the name of a file"): write_json(tmp_path / "results", [])
    assert main(["evaluate", "--steps", "1", "--repeats", "1", "--out", str(tmp_path / "results")]) == 2
    told = capsys.readouterr()
    assert "is a folder: give the name of a file" in told.err and not told.out
    assert [p.name for p in sorted(tmp_path.rglob("*"))] == ["results", "thesis.txt"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    "Its new content cannot be renamed: the old folder is back at once, not only at the next write"
    with atomic(tmp_path / "o") as p: p.mkdir(); (p / "a").write_text("old")
    real = os.replace
    def no(src, dst):
        if Path(dst) == tmp_path / "o" and ".tmp-old-" not in str(src): raise OSError("disk is gone")
        return real(src, dst)
    monkeypatch.setattr(os, "replace", no)
    with pytest.raises(OSError, match="disk is gone"):
        with atomic(tmp_path / "o") as p: p.mkdir(); (p / "a").write_text("new")
    assert (tmp_path / "o" / "a").read_text() == "old" and [q.name for q in tmp_path.iterdir()] == ["o"]
