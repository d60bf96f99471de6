"The exercises of the method's notebooks: every check tells a folded solution from an empty and from a wrong answer"
import contextlib
import importlib
import io
import json
import re
from pathlib import Path

import matplotlib
import pytest
from notebooks import flags, source

NBS = Path(__file__).resolve().parents[1] / "nbs"
METHOD = sorted(p for p in NBS.glob("*.ipynb") if re.match(r"0\d_|1[0-8]_", p.name) and p.name != "02_explore.ipynb")
FOLDED = re.compile(r"<details><summary>Solution</summary>\n\n```python\n(.*)\n```\n\n</details>", flags=re.S)
BEFORE = {"16_first_student": "teacher = load_teacher()"}         # of the notebook, beside its imports


def exercises(nb):
    "(answer to fill in, check, solution) of each exercise; the first blank line outside a function ends the answer"
    cells = json.loads(nb.read_text(encoding="utf-8"))["cells"]
    for i, c in enumerate(cells):
        src = source(c)
        if c["cell_type"] != "code" or "eval:" not in flags(src) or "print(" not in src: continue
        head, answer = src.split("\n", 1)
        assert head == "#| eval: false" and not c["outputs"], "an exercise is not run, and stores no output"
        answer, check = answer.split("\n\n", 1)
        yield answer, check, FOLDED.fullmatch(source(cells[i + 1]))[1]


def names_of(nb):
    "What the notebook's reader has: its module and its imports"
    cells = [source(c) for c in json.loads(nb.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    module = next((m[1] for m in (re.search(r"default_exp (\S+)", s) for s in cells) if m), None)
    names = dict(vars(importlib.import_module(f"t2v_turbo.{module}"))) if module else {}
    for s in cells:
        if s.startswith(("import ", "from ")): exec(s, names)
    exec(BEFORE.get(nb.stem, ""), names)
    return names


def verdict(names, *code):
    "What the check prints"
    out, names = io.StringIO(), dict(names)
    with contextlib.redirect_stdout(out):
        for s in code: exec(s, names)
    return out.getvalue()


def spoilt(solution):
    "Code that makes another answer of the right kind"
    return solution + """
_some = lambda x: .1*x.mean() if hasattr(x, "mean") else .1
for _name, _v in list(globals().items()):
    if _name not in _asked: continue
    if callable(_v): globals()[_name] = lambda *a, _f=_v: None if (r := _f(*a)) is None else 1.1*r + _some(a[0])
    elif isinstance(_v, dict): globals()[_name] = {k: n + 1 for k, n in _v.items()}
    elif isinstance(_v, list): globals()[_name] = [n + 1 for n in _v]
    else: globals()[_name] = 1.1*_v + .1"""


CASES = [pytest.param(nb, k, id=f"{nb.stem}-{k + 1}") for nb in METHOD for k in range(len(list(exercises(nb))))]


@pytest.fixture(scope="module")
def reader():
    "Names by notebook, collected once"
    matplotlib.use("Agg")
    known = {}
    return lambda nb: known.setdefault(nb, None) or known.update({nb: names_of(nb)}) or known[nb]


@pytest.mark.parametrize("nb, k", CASES)
def test_the_check_knows_right_from_wrong(nb, k, reader):
    answer, check, solution = list(exercises(nb))[k]
    names = reader(nb)
    right, empty = verdict(names, solution, check), verdict(names, answer, check)
    assert re.fullmatch(r"right: [^\n]+[^.\n]\n", right), right
    assert re.fullmatch(r"wrong: [^\n]+[^.\n]\n", empty), empty
    asked = set(re.findall(r"^(?:def )?(\w+(?:, \w+)*)(?:\(| =)", answer, flags=re.M))
    asked = {n for some in asked for n in some.split(", ")}
    assert asked and all(re.search(rf"^(def )?(\w+, )*{n}\b", solution, flags=re.M) for n in asked), "the solution defines other names"
    bad = verdict(names | dict(_asked=asked), spoilt(solution), check)
    assert bad.startswith("wrong: ") or nb.stem == "00_files", bad          # `write_whole` returns nothing to spoil


def test_every_notebook_of_the_method_has_exercises():
    assert len(METHOD) == 18
    count = {nb.stem: len(list(exercises(nb))) for nb in METHOD}
    assert all(1 <= n <= 3 for n in count.values()), count
    for nb in METHOD:
        cells = json.loads(nb.read_text(encoding="utf-8"))["cells"]
        intro, = [c for c in cells if source(c).startswith("## Exercises\n")]
        assert "prints *right* or *wrong*" in source(intro)


def test_wrong_answers_that_come_to_mind(reader):
    "The sign of the rewards, the order of the LoRA product, guidance the other way round, DDIM with the noise of t"
    wrong = {"15_distill": "def total(cd, R_img, R_vid, beta_img, beta_vid): return cd + beta_img*objective(R_img) + beta_vid*objective(R_vid)",
             "14_student": "def folded(W, A, B, scale): return W + B@A",
             "05_solver": "def my_guide(cond, uncond, w): return uncond + w*(cond - uncond)",
             "01_core": "def my_frames(clip): return clip.transpose(1, 2).flatten(0, 1).flip(0)",
             "12_rewards": "def slope(R): return torch.sigmoid(R)"}
    for stem, code in wrong.items():
        nb = NBS / f"{stem}.ipynb"
        name = re.match(r"def (\w+)", code)[1]
        check, = [c for a, c, _ in exercises(nb) if f"def {name}(" in a]
        assert verdict(reader(nb), code, check).startswith("wrong: "), stem
