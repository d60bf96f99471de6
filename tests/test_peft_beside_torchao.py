"Colab brings torchao 0.10, which peft 0.19 and later refuse: one sentence of ours, before anything is loaded"
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import t2v_turbo.saved as saved
import t2v_turbo.student as student
load = saved.load_teacher
saved.load_teacher = lambda *a, **k: print("LOADED") or load(*a, **k)
from t2v_turbo.teachers.tiny import WEIGHTS
from t2v_turbo.files import UserError
try: student.Student(load("tiny"), rank=2); print("made")
except UserError as e: print(e)
try: saved.load_student(WEIGHTS/"tiny-cd"); print("made")
except UserError as e: print(e)
"""


def beside(folder, version):
    "What a program prints that finds such a torchao installed"
    if version:
        (folder/"torchao/quantization").mkdir(parents=True); (folder/"torchao/__init__.py").write_text(f"__version__ = {version!r}")
        (folder/"torchao/quantization/__init__.py").write_text("quantize_ = None")         # diffusers 0.39 imports it
        (folder/f"torchao-{version}.dist-info").mkdir()
        (folder/f"torchao-{version}.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: torchao\nVersion: {version}\n")
    env = os.environ | dict(PYTHONPATH=f"{folder}:{ROOT}")
    done = subprocess.run([sys.executable, "-c", CODE], env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")


@pytest.mark.skipif(Version(peft.__version__) < Version("0.19"), reason="older ones do not mind")
def test_an_old_torchao(tmp_path):
    made, loaded, _ = beside(tmp_path, "0.10.0")
    assert made == loaded and "torchao 0.10.0 is too old for peft" in made and "`pip uninstall -y torchao`" in made


def test_no_torchao(tmp_path):
    if importlib.util.find_spec("torchao"): pytest.skip("this environment has one")
    assert beside(tmp_path, "") == ["made", "LOADED", "made", ""]
