"bench/gpu.py on a CPU: every kind of row in small, the code for full sizes on small parts, and a table that is resumed"
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from t2v_turbo import plan
from t2v_turbo.fit import GB

PATH = next(p/"bench/gpu.py" for p in Path(__file__).resolve().parents if (p/"bench/gpu.py").is_file())
spec = importlib.util.spec_from_file_location("gpu", PATH)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
ROWS = ["train modelscope-24gb bfloat16", "train wan-48gb float16", "published modelscope", "sample modelscope bfloat16"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    "`main` on a CPU, whatever there is; what it wrote"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    def call(*args):
        assert bench.main(["--small", "--repeats", "1", "--teacher_steps", "2", "--json", str(tmp_path/"gpu.json"), *args]) == 0
        return json.loads((tmp_path/"gpu.json").read_text())
    return call


def test_every_kind_of_row(run, tmp_path, capsys):
    done = run("--rows", *ROWS)
    rows = done["rows"]
    assert set(rows) == set(ROWS) and all(r["seconds"] > 0 and "failed" not in r for r in rows.values())
    for key in ROWS[:2]: assert 0 < rows[key]["plan"] < 1 and rows[key]["clips"] == 2
    assert rows[ROWS[0]]["loss"] == rows[ROWS[0]]["loss"]                        # a number
    assert rows[ROWS[3]]["teacher_seconds"] > 0 and rows[ROWS[3]]["teacher_steps"] == 2
    table = (tmp_path/"gpu.md").read_text()
    assert table.startswith("CPU, ") and "small networks" in table and table in capsys.readouterr().out
    assert {line.count("|") for line in table.splitlines() if line.startswith("|")} == {8}


def test_out_of_memory_is_a_result_and_the_rest_goes_on(run, monkeypatch):
    asked = []
    def row(teacher, a, device):
        asked.append(teacher)
        if teacher == "modelscope" and len(asked) == 1: raise torch.OutOfMemoryError("CUDA out of memory")
        return dict(clips=1, seconds=1., peak=2.)
    monkeypatch.setattr(bench, "published_row", row)
    rows = run("--rows", "published")["rows"]
    assert rows == {"published modelscope": dict(failed="out of memory"), "published videocrafter2": dict(clips=1, seconds=1., peak=2.)}
    assert "| published modelscope | - | - | - | - | - | out of memory |" in bench.table(dict(device="X", torch="1", small=True, repeats=1, rows=rows))
    assert run("--rows", "published")["rows"] == rows and len(asked) == 2        # resumed: nothing is measured twice
    assert "failed" not in run("--rows", "published", "--again", "published modelscope")["rows"]["published modelscope"] and len(asked) == 3


def test_rows_of_another_device_are_kept_apart(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "published_row", lambda *_: dict(clips=1, seconds=1., peak=None))
    run("--rows", "published modelscope")
    about = json.loads((tmp_path/"gpu.json").read_text()) | dict(device="another")
    (tmp_path/"gpu.json").write_text(json.dumps(about))
    assert bench.main(["--small", "--json", str(tmp_path/"gpu.json")]) == 2 and "is of another device (another, not CPU" in capsys.readouterr().err


def test_a_process_of_its_own():
    "As on a GPU: a row comes back, and an error is recorded by its last line"
    a = bench.argparse.Namespace(small=True, repeats=1, teacher_steps=2)
    got = bench.apart("sample modelscope bfloat16", a)
    assert got["seconds"] > 0 and got["teacher_steps"] == 2
    assert "KeyError" in bench.apart("train no-such-recipe bfloat16", a)["failed"]


def test_full_sizes_are_made_and_planned_alike(tmp_path, monkeypatch):
    "The code for a GPU with the parts of bench/train_step.py in place of the published sizes: what is planned on `meta` is what trains"
    ts = bench.train_step()
    monkeypatch.setitem(plan.TEACHERS, "modelscope", (lambda size: ts.unet_parts(8, size), 8, (32, 32)))
    for name in ("hpsv2.1", "viclip-l14"): monkeypatch.setitem(plan._FULL, name, lambda name=name: ts.reward_of(name, 8))
    a = bench.argparse.Namespace(small=False, repeats=1, teacher_steps=2)
    monkeypatch.setitem(bench.RECIPES["modelscope-16gb"].settings, "accumulate", 2)
    monkeypatch.setitem(bench.RECIPES["modelscope-16gb"].settings, "batch", 2)
    row = bench.train_row("modelscope-16gb", "bfloat16", False, a, "cpu", tmp_path)
    assert row["loss"] == row["loss"] and row["seconds"] > 0 and row["clips"] == 2
    given, s = bench.settings_of("modelscope-16gb", "float32", False)
    teacher, *_ = bench.networks("modelscope-16gb", given, s, "meta", False, tmp_path)
    weights = sum(p.numel()*p.element_size() for p in teacher.parameters())/GB
    assert teacher.device.type == "meta" and weights < row["plan"] < 3
    assert bench.sample_row("modelscope", "bfloat16", a, "cpu", tmp_path)["seconds"] > 0


@pytest.mark.parametrize("name", bench.recipes())
def test_settings_of_every_recipe(name):
    given, s = bench.settings_of(name, "float16", True)
    cfg = bench.Config(teacher="tiny", **given)
    assert cfg.dtype == "float16" and cfg.compile == 1 and cfg.objective.beta_vid > 0 and bench.teacher_of(name) in plan.TEACHERS
    if name.endswith("-8x"): assert cfg.batch == s["batch"]//8
    assert f"train {name} bfloat16 compile" in bench.keys()


def test_without_a_gpu_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2 and "--small" in capsys.readouterr().err
    assert bench.main(["--list"]) == 0 and capsys.readouterr().out.splitlines() == bench.keys()
