"The script for a GPU, tried in small on a CPU"
import importlib.util
import json
from pathlib import Path

import torch

PATH = next(p/"bench/full_size.py" for p in Path(__file__).resolve().parents if (p/"bench/full_size.py").is_file())
spec = importlib.util.spec_from_file_location("full_size", PATH)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def test_small(tmp_path, capsys):
    assert bench.main(["--small", "--repeats", "1", "--teacher_steps", "5", "--json", str(tmp_path/"r.json")]) == 0
    rows = json.loads((tmp_path/"r.json").read_text())
    assert [(r["network"], r["sampler"], r["evaluations"]) for r in rows[:2]] == [
        ("ms", "teacher, guided", 10), ("ms", "student", 4)]
    assert [r["clip"] for r in rows[::2]] == ["2x32x32", "2x40x64"]*2 and len(rows) == 8
    assert all(r["seconds"] > 0 for r in rows)
    lines = capsys.readouterr().out.strip().splitlines()[-10:]
    assert {line.count("|") for line in lines} == {9} and lines[2].endswith("| 1.0 |")


def test_without_a_gpu_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    assert "--small" in capsys.readouterr().err


def test_full_size_is_the_published_one():
    with torch.device("meta"): net = bench.UNet3DConditionModel(**bench.FULL)
    assert 1.40e9 < sum(p.numel() for p in net.parameters()) < 1.42e9
