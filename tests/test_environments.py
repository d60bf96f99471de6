"What the package asks for, and what that does to an environment that has older versions: Colab's, and the one that runs this test"
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import colab  # noqa: E402
import environments  # noqa: E402

PINS = environments.constraints()
WANTED = [f"{n}>={v}" for n, v in environments.requirements().items()]
PARTNERS = "torchvision torchaudio tensorflow numba gradio".split()
core = pytest.mark.core


def pip(*words, seconds=500):
    "What `pip install --dry-run` would install, `{name: version}`; None where it cannot"
    run = subprocess.run([sys.executable, "-m", "pip", "install", "--dry-run", "-q", "--report", "-", *map(str, words)], cwd=ROOT,
                         stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)
    if run.returncode: return None
    return {i["metadata"]["name"].lower().replace("-", "_"): i["metadata"]["version"] for i in json.loads(run.stdout)["install"]}


@core
def test_every_requirement_has_a_floor_and_nothing_else():
    "An upper bound at run time would break an environment that has newer versions"
    words = environments.ini()["requirements"].split()
    assert words == WANTED and not any(c in w for w in words for c in "<~!;,")


@core
def test_what_colab_has_is_enough():
    "Only av is missing there"
    missing = [n for n in environments.requirements() if n not in PINS]
    assert missing == ["av"], f"Colab has no {missing}"
    low = [f"{n} {PINS[n]}" for n, v in environments.requirements().items() if n in PINS and Version(PINS[n]) < Version(v)]
    assert not low, f"pip would replace {low} on Colab"


@core
def test_here_nothing_would_be_changed():
    "In an environment where the package runs, its requirements are met"
    assert pip(*WANTED) == {}


def test_pip_keeps_every_pin_of_colab():
    "pip's own dry run of `pip install . -c LIST` for Colab's Python, beside partners whose bounds a newer torch, NumPy, Pillow, hub or tensorboard breaks"
    if pip("--ignore-installed", "--no-deps", "tqdm") is None: pytest.skip("no package index can be reached")
    got = pip("--ignore-installed", "--only-binary", ":all:", "--python-version", environments.PYTHONS["colab"],
              "--target", "nowhere", "-c", environments.COLAB, ".", *PARTNERS)       # an older pip requires a target
    assert got is not None, "pip finds no such set"
    pins = {n.lower().replace("-", "_"): v for n, v in PINS.items()}
    assert {n: v for n, v in got.items() if n in pins and v.split("+")[0] != pins[n]} == {}
    assert {"t2v_turbo", "torch", "numpy", "pillow", "ipywidgets", *PARTNERS} <= got.keys()


@core
def test_the_table_of_the_docs_is_what_is_tested():
    "Floors of settings.ini, the pins of Colab's list, and a newest column that is above both"
    md = "".join("".join(c["source"]) for c in json.loads((ROOT / "nbs/tutorials/environments.ipynb").read_text(encoding="utf-8"))["cells"])
    rows = {r[0]: r[1:] for r in re.findall(r"^\| ([\w]+) \| ([\d.]+) \| ([\d.]+|—) \| ([\d.]+) \|$", md, flags=re.M)}
    assert rows.pop("Python") == tuple(environments.PYTHONS[n] for n in ("floors", "colab", "newest"))
    assert {n: (f, c) for n, (f, c, _) in rows.items()} == {n: (f, PINS.get(n, "—")) for n, f in environments.requirements().items()}
    assert all(Version(new) >= Version(f) for f, _, new in rows.values())
    assert f"Colab, {environments.COLAB.stem.removeprefix('colab-')}" in md and environments.COLAB.name in md
    assert set(environments.ini()["py_versions"].split()) == {*environments.PYTHONS.values()}                       # classifiers only for what ran


@pytest.mark.parametrize("after, lines", [({}, 0), (dict(numpy="2.5.5"), 1), (dict(torch=None), 1), (dict(torchao=None), 0), (dict(torchao="0.17"), 1),
                                          (dict(av="19.0.2"), 0)])
def test_a_package_of_colab_that_changed_is_named(after, lines):
    had = dict(numpy="2.1.3", torch="2.11.0+cu128", torchao="0.10.0")
    now = {n: v for n, v in (had | after).items() if v}
    assert len(colab.changed(had, now)) == lines


def test_the_core_names_what_there_is():
    "A file or test that is renamed must not leave the core in silence"
    import conftest
    tests = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py"))
    assert not [f for f in conftest.CORE if not (ROOT / f"tests/test_{f}.py").is_file()]
    assert not [n for n in (*conftest.LONG, *conftest.MORE) if f"def {n}(" not in tests]


def test_a_missing_python_is_reported_and_not_passed_over(monkeypatch, capsys):
    "Named or newest: a failure. Else a line"
    monkeypatch.setattr(environments, "find_python", lambda v: None)
    monkeypatch.setattr(sys, "argv", ["environments.py", "floors"])
    assert environments.main() and "NOT RUN: no Python 3.12" in capsys.readouterr().out
    monkeypatch.setattr(environments, "find_python", lambda v: None if v == "3.13" else "python")
    monkeypatch.setattr(environments, "check", lambda name, *a: (False, f"{name} passed"))
    monkeypatch.setattr(sys, "argv", ["environments.py"])
    assert not environments.main()
    assert "NOT RUN: no Python 3.13" in (out := capsys.readouterr().out) and "newest passed" in out
    monkeypatch.setattr(environments, "check", lambda name, *a: (name == "floors", name))
    assert environments.main()


def test_a_python_is_what_its_name_promises():
    found = environments.find_python("%d.%d" % sys.version_info[:2])
    assert found and environments.find_python("3.2") is None
