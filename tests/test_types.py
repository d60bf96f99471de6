"What a user's type checker sees of the package"
import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIB = ROOT / "t2v_turbo"
WRONG = """
from pathlib import Path
from t2v_turbo.pipeline import T2VTurboPipeline
from t2v_turbo.saved import load_student
from t2v_turbo.student import Student
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.train import Config, Trainer

teacher = load_teacher("tiny")
teacher.encode_txt([""])                        # wrong
teacher.encode("a clip")                        # wrong
student = load_student(3)                       # wrong
student.merge()                                 # wrong
Config(step=3)                                  # wrong
Trainer(Config()).fits()                        # wrong
Trainer(Config()).fit().loss                    # wrong
pipe = T2VTurboPipeline.from_pretrained(Path("x"))
pipe("a prompt", num_inference_step=4)          # wrong
pipe("a prompt", num_inference_steps=4)
student.teacher.encode_text([""])
"""


def stubs():
    "`(module, class, declaration)` of every method that is declared for type checkers and written elsewhere"
    for py in sorted(LIB.rglob("*.py")):
        module = ".".join(py.relative_to(ROOT).with_suffix("").parts)
        for c in ast.walk(ast.parse(py.read_text(encoding="utf-8"))):
            if not isinstance(c, ast.ClassDef): continue
            for block in c.body:
                if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
                    for f in block.body:
                        if isinstance(f, ast.FunctionDef): yield pytest.param(module, c.name, f, id=f"{module}.{c.name}.{f.name}")


def parameters(f):
    "Names, defaults and annotations, without `self` and without spaces"
    a = f.args
    names = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(names) - len(a.defaults)) + a.defaults
    rest = [*zip(a.kwonlyargs, a.kw_defaults), *((p, None) for p in (a.vararg, a.kwarg) if p)]
    return [(p.arg, d and ast.unparse(d), p.annotation and ast.unparse(p.annotation)) for p, d in [*zip(names, defaults), *rest]
            if p.arg not in ("self", "cls")]


def leaves(cls):
    "The package's own classes below `cls` that nothing derives from"
    below = [k for k in cls.__subclasses__() if k.__module__.startswith("t2v_turbo.")]
    if not below: yield cls
    for k in below: yield from leaves(k)


@pytest.mark.parametrize("module, cls, stub", list(stubs()))
def test_what_is_declared_is_what_is_written(module, cls, stub):
    own = getattr(importlib.import_module(module), cls)
    written = inspect.getattr_static(own, stub.name, None)
    if written is None:                                                 # each subclass has its own
        for py in LIB.rglob("[a-z]*.py"): importlib.import_module(".".join(py.relative_to(ROOT).with_suffix("").parts))
        ends = list(leaves(own))
        assert own not in ends
        for k in ends: assert hasattr(k, stub.name), f"{k.__name__} has no {stub.name}"
        return
    written = inspect.unwrap(getattr(written, "f", written))            # fastcore's class methods hold it there
    source, = ast.parse(inspect.cleandoc(inspect.getsource(written))).body
    assert parameters(source) == parameters(stub)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    "What pyright says of the client and of a script full of mistakes: `{file: {line: rule}}`"
    pytest.importorskip("pyright", reason="pyright is not installed: pip install -e '.[dev]'")
    tmp = tmp_path_factory.mktemp("client")
    (tmp / "client.py").write_text((ROOT / "tests/typed_client.py").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp / "wrong.py").write_text(WRONG, encoding="utf-8")
    (tmp / "pyrightconfig.json").write_text(json.dumps(dict(typeCheckingMode="basic", extraPaths=[str(ROOT)], include=["."])))
    run = subprocess.run([sys.executable, "-m", "pyright", "-p", str(tmp), "--pythonpath", sys.executable, "--outputjson"],
                         capture_output=True, text=True, stdin=subprocess.DEVNULL, env=os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"})
    if run.returncode not in (0, 1): pytest.skip(f"pyright cannot run here: {(run.stderr or run.stdout).strip()[-300:]}")
    told = json.loads(run.stdout)
    assert told["summary"]["filesAnalyzed"] == 2, told["summary"]
    files = {"client.py": {}, "wrong.py": {}}
    for d in told["generalDiagnostics"]:
        if d["severity"] == "error": files[Path(d["file"]).name][d["range"]["start"]["line"] + 1] = d["message"]
    return files


def test_a_client_has_no_type_error(found):
    assert not found["client.py"]


def test_mistakes_of_a_client_are_found(found):
    assert sorted(found["wrong.py"]) == [i for i, l in enumerate(WRONG.splitlines(), 1) if l.endswith("# wrong")], found["wrong.py"]


def test_the_client_runs(tmp_path):
    "What is asserted of types holds of the values, too: the script is a user's, not a checker's"
    import typed_client
    typed_client.main(tmp_path)
    assert (tmp_path / "clip.mp4").is_file() and (tmp_path / "run/student/student.json").is_file()
