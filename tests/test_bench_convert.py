"The measurement of the conversion, tried in small; and a conversion that is stopped by real signals half way"
import importlib.util
import json
import math
import signal
from pathlib import Path

import pytest
import torch
from diffusers import UNet3DConditionModel

from t2v_turbo.standins import tiny_videocrafter2, vc2_shapes, vc2_sizes
from t2v_turbo.teachers.videocrafter2 import PREFIXES, convert_videocrafter2

PATH = next(p/"bench/convert.py" for p in Path(__file__).resolve().parents if (p/"bench/convert.py").is_file())
spec = importlib.util.spec_from_file_location("bench_convert", PATH)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

STALL = """if 1:
    import sys, time
    from diffusers import AutoencoderKL
    from t2v_turbo.cli import main
    AutoencoderKL.save_pretrained = lambda *a, **k: time.sleep(600)      # the UNet is written by now
    sys.exit(main())"""


def test_small(tmp_path, capsys):
    "Every row of the table; the process, the bar and the stock classes are real"
    assert bench.main(["--small", "--folder", str(tmp_path), "--json", str(tmp_path/"r.json")]) == 0
    rows = json.loads((tmp_path/"r.json").read_text())
    assert rows["progress bar"] == "yes" and rows["checkpoint"].startswith("0.0128 GB, 893 tensors")
    assert rows["stock classes load"].count(" M") == 3 and "unet 2.079 M" in rows["stock classes load"]
    peak, own = (float(rows[k].split()[0]) for k in ("peak memory", "of it not mapped from the file"))
    assert .1 < own < 4 and own <= peak                     # the peak counts the mapped libraries of torch too: gigabytes in a build for CUDA
    assert {p.name for p in tmp_path.iterdir()} == {"r.json"}
    assert {line.count("|") for line in capsys.readouterr().out.strip().splitlines()} == {3}


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGKILL", -9)])
def test_stopped_half_way(name, code, tmp_path, monkeypatch):
    "Ctrl-C leaves nothing; after a kill a hidden folder is left, never one of the right name, and it is in nobody's way"
    torch.save(dict(state_dict=tiny_videocrafter2()), tmp_path/"model.ckpt")
    merges = bench.vocabulary(tmp_path/"merges.txt", 6)
    monkeypatch.setattr(bench, "COMMAND", ["-c", STALL])
    got = bench.convert(tmp_path/"model.ckpt", tmp_path/"vc2", merges, getattr(signal, name), 8e6)
    assert got["exit"] == code and got["sent_at"] > 8e6, got["said"]
    ours = {"model.ckpt", "merges.txt", "vc2.log"}
    left = bench.left(tmp_path, ours)
    assert ("vc2" in left, len(left)) == (False, int(name == "SIGKILL")), left
    assert all(n.startswith(".tmp-") and b > 8e6 for n, b in left.items())
    convert_videocrafter2(tmp_path/"model.ckpt", tmp_path/"vc2", vocabulary=merges)
    now = bench.left(tmp_path, ours)
    assert now.pop("vc2") > 1e7 and now == left
    assert UNet3DConditionModel.from_pretrained(tmp_path/"vc2/unet").conv_in.weight.any()


def test_full_size_is_the_published_one():
    shapes = vc2_shapes(vc2_sizes())
    unet, vae, text = (sum(math.prod(s) for k, s in shapes.items() if k.startswith(PREFIXES[p]))/1e6 for p in ("unet", "vae", "text_encoder"))
    assert 1411 < unet < 1415 and 83.6 < vae < 83.7 and 352 < text < 354
