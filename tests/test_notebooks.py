"Every notebook runs from top to bottom; cells under a flag of `tst_flags` are skipped."
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from notebooks import run_notebook

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"


def wanted(p):
    "Not in or under anything that starts with `_` or `.`"
    return not any(s[0] in "_." for s in p.relative_to(NBS).parts)


ini = ConfigParser(delimiters=["="])
ini.read(ROOT / "settings.ini", encoding="utf-8")
flags = ini["DEFAULT"]["tst_flags"].split()
notebooks = sorted(filter(wanted, NBS.rglob("*.ipynb")))
sections = yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
METHOD, = (s["contents"] for s in sections if s["section"] == "The method, in order")


def case(p):
    "The notebooks of the method are part of the suite's core"
    name = p.relative_to(NBS).as_posix()
    return pytest.param(p, id=name, marks=[pytest.mark.core] if name in METHOD else [])


ALONE = {"58_optimizer.ipynb"}         # a compilation that fails leaves a process in which arguments live longer, and a plan counts an activation more
RUN = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from notebooks import run_notebook; print('cell', run_notebook(Path(sys.argv[2]), sys.argv[4:], sys.argv[3]))"


@pytest.mark.parametrize("nb", [case(p) for p in notebooks])
def test_notebook(nb, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")  # nbdev's own cells ask for it
    monkeypatch.setattr(sys, "path", [*sys.path])                       # what a notebook puts there goes with it
    if nb.name in ALONE:
        run = subprocess.run([sys.executable, "-c", RUN, ROOT / "tests", nb, ROOT, *flags], capture_output=True, text=True, timeout=600)
        print(run.stdout, run.stderr)
        failed = None if run.stdout.endswith("cell None\n") else "?"
    else: failed = run_notebook(nb, flags, ROOT)
    assert failed is None, f"cell {failed} of {nb.name} fails; its traceback is above"


@pytest.mark.parametrize("bad, cell", [("1/0", 1), ("raise SystemExit('no')", 1), ("x = (", 1), ("x = 2", None)])
def test_a_cell_that_fails_is_found(tmp_path, bad, cell):
    "The runner itself: text, flags and what a broken cell gives"
    import json
    sources = ["#| slow\n1/0", bad, "assert __import__('os').getcwd() == " + repr(str(tmp_path)), "get_ipython().system('true')", "%time y = 1"]
    cells = [dict(cell_type="markdown", source="1/0")] + [dict(cell_type="code", source=[s]) for s in sources[1:]]
    (tmp_path / "a.ipynb").write_text(json.dumps(dict(cells=[*cells, dict(cell_type="code", source=sources[0])])))
    assert run_notebook(tmp_path / "a.ipynb", ["slow"], ROOT) == cell


def test_what_a_notebook_registers_goes_with_it(tmp_path):
    import json

    from t2v_turbo.teachers.folders import LOADERS
    src = "from t2v_turbo.teachers.folders import LOADERS\nLOADERS['Strange'] = LOADERS.pop('TinyVideoDenoiser')"
    (tmp_path / "a.ipynb").write_text(json.dumps(dict(cells=[dict(cell_type="code", source=src)])))
    before = dict(LOADERS)
    assert run_notebook(tmp_path / "a.ipynb", [], ROOT) is None and LOADERS == before
