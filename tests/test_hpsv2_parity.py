"""Our HPSv2.1 against the package hpsv2: letterbox, gradient and score, on a small network in its own file format

Needs an environment with `pip install "t2v_turbo[hpsv2]"`. Its pins (pytest 7.2, protobuf < 4) would change this one, so it may be another:
T2V_TURBO_HPSV2_PYTHON names its interpreter. T2V_TURBO_HPS, a path of HPS_v2.1_compressed.pt, adds the published weights.
"""
import importlib.util
import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch

from t2v_turbo.core import make_gen
from t2v_turbo.rewards import clip

PROMPTS = ["a red panda surfing a wave", "Café, naïve & 3D!  two  spaces"]
SMALL = dict(embed_dim=24, vision_cfg=dict(image_size=56, layers=2, width=160, head_width=80, patch_size=14),
             text_cfg=dict(context_length=77, vocab_size=49408, width=128, heads=2, layers=2))
SHAPES = [(80, 128), (96, 64), (72, 72), (41, 57), (30, 20)]         # height, width; shrunk, grown, odd
THEIRS = """
import gzip, json, os, sys, types
where, vocabulary, full = sys.argv[1:]
try: import turtle                       # wanted by mistake; needs tkinter
except ImportError:
    sys.modules["turtle"] = types.ModuleType("turtle")
    sys.modules["turtle"].forward = None
import torch
try: import torchvision                  # a build for CUDA beside a torch for CPUs lacks one operator
except RuntimeError:
    [sys.modules.pop(k) for k in list(sys.modules) if k.startswith("torchvision")]
    lib = torch.library.Library("torchvision", "DEF")
    lib.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    lib.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
plain = gzip.open                        # the wheel lacks its vocabulary
gzip.open = lambda path, *a, **k: plain(path if os.path.exists(path) else vocabulary, *a, **k)
from PIL import Image
from hpsv2 import img_score
from hpsv2.src.open_clip import create_model_and_transforms, get_tokenizer
from hpsv2.src.open_clip.factory import add_model_config
add_model_config(where + "/small.json")
model, _, prepare = create_model_and_transforms("ViT-H-14" if full else "small", precision="fp32", light_augmentation=True, output_dict=True)
file = full or where + "/small.pt"
if not full:
    torch.manual_seed(0)
    for p in model.parameters():
        if p.ndim: torch.nn.init.normal_(p, std=.15)
    torch.save(dict(state_dict=model.state_dict(), epoch=1), file)
else: model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["state_dict"])
model.eval()
out, prompts = dict(rows=[]), json.load(open(where + "/prompts.json"))
ids = get_tokenizer("ViT-H-14")(prompts)
out["ids"] = ids
img_score.model_dict.update(model=model, preprocess_val=prepare)     # else it fetches 4 GB
for x in torch.load(where + "/images.pt", weights_only=True):
    image = Image.fromarray(x.numpy())
    pixels = (x.permute(2, 0, 1).float() / 255).requires_grad_()
    y = pixels
    for t in prepare.transforms[2:]: y = t(y)                        # as T2V-Turbo calls it
    R = (model.encode_image(y[None], normalize=True) @ model.encode_text(ids, normalize=True).T)[0]
    g, = torch.autograd.grad(R[0], pixels)
    own = [float(img_score.score(image, p, cp=file)[0]) for p in prompts]
    out["rows"].append(dict(prepared=y.detach(), R=R.detach(), grad=g, own=torch.tensor(own)))
torch.save(out, where + "/theirs.pt")
"""


def python_of_the_package():
    "Its interpreter; skips with the way to get it, and fails if one was named that has it not"
    named = os.environ.get("T2V_TURBO_HPSV2_PYTHON")
    mend = 'pip install "t2v_turbo[hpsv2]", in an environment that T2V_TURBO_HPSV2_PYTHON names or in this one'
    if not named and importlib.util.find_spec("hpsv2") is None: pytest.skip(f"the package hpsv2 is not here: {mend}")
    found = subprocess.run([named or sys.executable, "-c", "import importlib.util as u; print(u.find_spec('hpsv2') is not None)"],
                           capture_output=True, text=True)
    assert found.stdout.strip() == "True", f"{named} has no package hpsv2: {mend}\n{found.stderr}"
    return named or sys.executable


def theirs(python, folder, vocabulary, weights=""):
    "What the package says, computed in its own process"
    gen = make_gen(0)
    smooth = [torch.rand(1, 3, 5, 6, generator=gen) for _ in SHAPES]
    images = [(torch.nn.functional.interpolate(x, s, mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)*255).round().byte().contiguous()
              for x, s in zip(smooth, SHAPES)]
    torch.save(images, folder/"images.pt")
    (folder/"small.json").write_text(json.dumps(SMALL))
    (folder/"prompts.json").write_text(json.dumps(PROMPTS))
    with zipfile.ZipFile(vocabulary) as z: (folder/"bpe.txt.gz").write_bytes(z.read("open_clip/bpe_simple_vocab_16e6.txt.gz"))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(HPS_ROOT=str(folder))
    run = subprocess.run([python, "-c", THEIRS, str(folder), str(folder/"bpe.txt.gz"), weights], cwd=folder, env=env,
                         capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr[-3000:]
    return images, torch.load(folder/"theirs.pt", weights_only=True)


def compare(rm, images, out):
    "Pixels, score and gradient of the tensors; the score of the PIL image, which is rounded to bytes after the resize"
    ids = rm.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, out["ids"])
    for x, row in zip(images, out["rows"]):
        frame = (x.permute(2, 0, 1).float()/255)[None, :, None].requires_grad_()
        torch.testing.assert_close(rm.prepare(frame)[0, :, 0], row["prepared"], rtol=0, atol=1e-5)
        R = torch.cat([rm(frame, [p]) for p in PROMPTS])
        torch.testing.assert_close(R, row["R"], rtol=0, atol=2e-5)
        g, = torch.autograd.grad(R[0], frame)
        assert (g[0, :, 0] - row["grad"]).norm() < 1e-3*row["grad"].norm()
        torch.testing.assert_close(R.detach(), row["own"], rtol=0, atol=5e-3)
    assert torch.stack([r["R"] for r in out["rows"]]).std(0).min() > 1e-3, "the scores differ, so agreement means something"


def test_small_network(tmp_path, clip_vocabulary):
    images, out = theirs(python_of_the_package(), tmp_path, clip_vocabulary)
    compare(clip.hpsv2(tmp_path/"small.pt", clip_vocabulary), images, out)


def test_published_weights(tmp_path, clip_vocabulary):
    weights = os.environ.get("T2V_TURBO_HPS")
    if not weights: pytest.skip("T2V_TURBO_HPS names no HPS_v2.1_compressed.pt")
    images, out = theirs(python_of_the_package(), tmp_path, clip_vocabulary, weights)
    compare(clip.hpsv2(weights, clip_vocabulary), images, out)
