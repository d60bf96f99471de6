"Every notebook runs from top to bottom; cells under a flag of `tst_flags` are skipped."
from configparser import ConfigParser
from pathlib import Path

import pytest
from nbdev.test import test_nb as run_nb

run_nb.__test__ = False
ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"


def wanted(p):
    "Not in or under anything that starts with `_` or `.`"
    return not any(s[0] in "_." for s in p.relative_to(NBS).parts)


ini = ConfigParser(delimiters=["="])
ini.read(ROOT / "settings.ini", encoding="utf-8")
flags = ini["DEFAULT"]["tst_flags"].split()
notebooks = sorted(filter(wanted, NBS.rglob("*.ipynb")))


@pytest.mark.parametrize("nb", notebooks, ids=lambda p: p.relative_to(NBS).as_posix())
def test_notebook(nb, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")  # run_nb sets it and never unsets it
    ok, _ = run_nb(nb, skip_flags=flags, basepath=ROOT)
    assert ok, f"{nb.name} fails; its traceback is above"
