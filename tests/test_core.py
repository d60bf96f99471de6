"Files appear whole or not at all, and nothing of the user's goes"
import pytest

from t2v_turbo.cli import main
from t2v_turbo.files import UserError, write_json


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path, capsys):
    "The folder and what is in it stay"
    (tmp_path / "results").mkdir(); (tmp_path / "results" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="results' is a folder: give the name of a file"): write_json(tmp_path / "results", [])
    assert main(["evaluate", "--steps", "1", "--repeats", "1", "--out", str(tmp_path / "results")]) == 2
    told = capsys.readouterr()
    assert "is a folder: give the name of a file" in told.err and not told.out
    assert [p.name for p in sorted(tmp_path.rglob("*"))] == ["results", "thesis.txt"]
