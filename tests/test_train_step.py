"The bench of a training step: A, written from the equations, and B, the trainer, compute the same; what is reported is there"
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from t2v_turbo import distill

PATH = next(p/"bench/train_step.py" for p in Path(__file__).resolve().parents if (p/"bench/train_step.py").is_file())
spec = importlib.util.spec_from_file_location("train_step", PATH)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
SMALL = ["--width", "8", "--frames", "8", "--size", "32", "64", "--pairs", "1"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    "`main` on a CPU, whatever there is; what it wrote"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    def call(*args):
        assert bench.main([*args, *SMALL, "--json", str(tmp_path/"rows.json")]) == 0
        return json.loads((tmp_path/"rows.json").read_text())
    return call


def test_every_variant_agrees(run, capsys):
    (case,) = run("--teachers", "tiny", "--parts", "agree")["cases"]
    a, *rows = case["rows"]
    assert a["name"] == "published" and [r["name"] for r in rows] == list(bench.VARIANTS) and len(rows) == 10
    assert set(a["terms"]) == {"loss", "cd", "r_img", "r_vid"} and all(abs(v) > 1e-4 for v in a["terms"].values())
    for r in rows:
        if "bf16" in r["name"]: assert 1e-4 < r["off"]["gradient"] < bench.BF16["gradient"]
        else: assert r["off"]["loss"] < 1e-5 and r["off"]["gradient"] < 1e-4 and r["rounding"]["gradient"] < 1e-4
    assert capsys.readouterr().out.count("| ours, ") == 10


def test_the_options_for_a_gpu(run):
    cases = run("--full", "--parts", "agree", "--variants", "ours, teacher cached, memory saved, bf16", "--autocast", "1")["cases"]
    assert [c["case"]["teacher"] for c in cases] == ["modelscope", "videocrafter2"]
    assert cases[1]["case"]["rewards"] == ["hpsv2.1", "internvideo2"] and "rounding" not in cases[0]["rows"][0]


def test_what_is_reported(run):
    (case,) = run("--teachers", "tiny", "--parts", "agree", "time", "memory", "share", "--variants", "ours, teacher cached")["cases"]
    a, b = case["rows"]
    assert a["ratio"] == 1 and b["ratios"] == [b["ratio"]] and b["seconds"] > 0 < a["seconds"]
    assert b["bytes"] > 2**20 and a["bytes"] > 2**20
    parts = {"text", "encode", "student", "decode", "image reward", "video reward", "teacher", "target", "backward", "optimiser", "read", "rest"}
    assert set(a["share"]) == parts and set(b["share"]) == parts - {"encode", "teacher"}       # `text`: the text cache is read


@pytest.mark.parametrize("mistake", ["loss", "target", "weight"])
def test_a_mistake_in_ours_is_seen(run, monkeypatch, mistake):
    if mistake == "loss": monkeypatch.setattr(distill, "cd_loss", lambda f, g, c, plain=distill.cd_loss: 1.001*plain(f, g, c))
    elif mistake == "target":
        plain = distill.guided_step
        monkeypatch.setattr(distill, "guided_step", lambda ddim, f, zt, i, w, c, n: plain(ddim, f, zt, i, 1.001*w, c, n))
    else: monkeypatch.setattr(bench.Ours, "terms", lambda self, *x: wrong(super(bench.Ours, self).terms(*x)))
    def wrong(out): return distill.StepOut(out.loss + 1e-3*(out.loss - out.cd), *list(vars(out).values())[1:])
    with pytest.raises(SystemExit, match="A and B disagree: the (loss|gradient) of 'ours, no cache' differs"):
        run("--teachers", "tiny", "--parts", "agree", "--variants", "ours, no cache")


def test_exponents(monkeypatch):
    found = bench.fit([1, 2, 3, 5], [2*x**1.5 for x in (1, 2, 3, 5)])
    assert found["exponent"] == pytest.approx(1.5) and found["error"] < 1e-6
    assert bench.fit([1, 2, 4], [1, 2.2, 4])["error"] > .01
    monkeypatch.setattr(bench, "AXES", dict(batch=("batch", (1, 2))))
    grown = bench.growth(bench.case_of("tiny"), "cpu", 1, False)
    fits = {(f["name"], f["what"]): f["exponent"] for f in grown["fits"]}
    assert len(grown["points"]) == 4 and len(fits) == 6
    assert all(fits[n, "flops"] == pytest.approx(1, abs=.05) and 0 < fits[n, "bytes"] < 1 for n in bench.GROWN)


def test_full_size_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--full"]) == 2 and "--width 32" in capsys.readouterr().err


def test_sizes_are_the_published_ones():
    with torch.device("meta"): unet, vae, text = bench.unet_parts(bench.FULL, (256, 256))
    count = lambda net: sum(p.numel() for p in net.parameters())/1e6
    assert 1410 < count(unet) < 1413 and 83 < count(vae) < 85 and 339 < count(text) < 341
    assert bench.case_of("videocrafter2", bench.FULL)["size"] == (320, 512) and bench.objective(bench.case_of("modelscope")).beta_vid == 1
