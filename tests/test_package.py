"What ships: small, without pickle, loadable, and with every argument explained"
import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet3DConditionModel

from t2v_turbo.core import make_gen
from t2v_turbo.distill import Distillation, Objective, draw
from t2v_turbo.student import Student
from t2v_turbo.teachers.base import Teacher, zero_w_projection
from t2v_turbo.teachers.tiny import WEIGHTS, load_teacher

ROOT = Path(__file__).resolve().parents[1]
LIB = ROOT / "t2v_turbo"
modules = sorted(p for p in LIB.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
SHAPE = re.compile(r"\(.*\)|\blike\b|\bany\b|\bscalar\b|\bas\b|\bper\b|\ba tensor\b")   # ways to say the shape of a tensor
PAIRS = dict(width="height", w_max="w_min")                          # one comment for both, on the first


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    "Wheel and sdist, built from a copy of what git would have"
    tmp = tmp_path_factory.mktemp("dist")
    copy = tmp / "copy"
    shutil.copytree(LIB, copy / "t2v_turbo", ignore=shutil.ignore_patterns("__pycache__"))
    for f in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff"):
        shutil.copy(ROOT / f, copy)
    pytest.importorskip("build"), pytest.importorskip("setuptools", minversion="77")
    build = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp, copy], capture_output=True, text=True,
                           stdin=subprocess.DEVNULL)
    assert build.returncode == 0, build.stderr[-3000:]
    assert "would be ignored" not in build.stdout + build.stderr
    return next(tmp.glob("*.whl")), next(tmp.glob("*.tar.gz"))


def test_wheel_and_sdist_are_whole_and_small(dist):
    wheel, sdist = dist
    pytest.importorskip("twine")
    check = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *dist], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert check.returncode == 0, check.stdout + check.stderr
    with zipfile.ZipFile(wheel) as z:
        inside = {i.filename: i.file_size for i in z.infolist()}
    want = {p.relative_to(ROOT).as_posix() for p in LIB.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    have = {n for n in inside if ".dist-info/" not in n}
    assert have == want, have ^ want
    assert "t2v_turbo/py.typed" in have
    assert wheel.stat().st_size < 17e6 and sum(v for k, v in inside.items() if "/weights/" not in k) < 1.5e6
    with tarfile.open(sdist) as t: names = {n.split("/", 1)[1] for n in t.getnames() if "/" in n}
    assert {"settings.ini", "setup.py", "README.md", "CONTRIBUTING.md", "LICENSE"} | want <= names


def public(py):
    "Functions and classes of a module's `__all__`, as syntax trees"
    tree = ast.parse(py.read_text(encoding="utf-8"))
    names = {ast.literal_eval(e) for n in tree.body if isinstance(n, ast.Assign)
             and ast.unparse(n.targets[0]) == "__all__" for e in n.value.elts}
    return [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in names]


def explained(n):
    "`(name, annotation, its line, the line's last one)` of everything that a reader may give to a function or class"
    if isinstance(n, ast.ClassDef):
        for m in n.body:
            if isinstance(m, ast.AnnAssign): yield m.target.id, m.annotation, m
    raised = isinstance(n, ast.ClassDef) and re.search(r"Exception|Error|Interrupt", "".join(map(ast.unparse, n.bases)))    # not made by a reader
    inits = [m for m in n.body if getattr(m, "name", "") == "__init__"] if isinstance(n, ast.ClassDef) else [n]
    for f in [] if raised else inits:
        star = [p for p in (f.args.vararg, f.args.kwarg) if p and p.arg not in ("args", "kwargs")]
        for p in [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs, *star]:
            if p.arg not in ("self", "cls"): yield p.arg, p.annotation, p


@pytest.mark.parametrize("py", modules, ids=lambda p: p.relative_to(LIB).as_posix())
def test_every_argument_has_a_comment_and_every_tensor_a_shape(py):
    lines, wrong = py.read_text(encoding="utf-8").splitlines(), []
    for n in public(py):
        found = {}
        for name, kind, node in explained(n):
            note = re.search(r"#\s*(\S.*)$", lines[node.lineno - 1]) or re.search(r"#\s*(\S.*)$", lines[node.end_lineno - 1])
            found[name] = note[1] if note else found.get(PAIRS.get(name), "")
            if not found[name]: wrong.append(f"{n.name}({name}) has no comment")
            elif kind is not None and ast.unparse(kind) == "Tensor" and not SHAPE.search(found[name] + (ast.get_docstring(n) if isinstance(n, ast.ClassDef) else "")):
                wrong.append(f"{n.name}({name}): `{found[name]}` does not say its shape")
    assert not wrong, wrong


def test_importing_the_package_loads_nothing():
    code = "import sys; have = set(sys.modules); import t2v_turbo; print(sorted(m for m in set(sys.modules) - have if 't2v' not in m))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "[]", run.stdout


def test_weights_are_small_and_safe():
    files = [p for p in WEIGHTS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 16e6          # one network of 3.5 M parameters, which two teachers share
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".md"}, files
    assert "t2v-turbo pretrain" in (WEIGHTS / "README.md").read_text()


def test_the_recipe_runs_on_the_denoiser_of_the_real_teachers():
    "UNet3DConditionModel, the class of ModelScopeT2V: same student, same step, gradients only where they belong"
    tiny = load_teacher("tiny")
    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        sample_size=8, in_channels=16, out_channels=16, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1, cross_attention_dim=96, attention_head_dim=8, time_cond_proj_dim=256)
    sched = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear")
    teacher = Teacher("unet3d", zero_w_projection(unet), tiny.vae, tiny.text_encoder, tiny.tokenizer, sched, frames=4)
    z, t = torch.randn(2, *teacher.latent_shape, generator=make_gen(0)), torch.tensor([19, 999])
    prompts = ["a red fish moving left in the sea", ""]
    ctx, null = teacher.encode_text(prompts), teacher.encode_text(["", ""])
    with torch.no_grad(): before, _ = teacher.denoise(z, t, ctx)
    student = Student(teacher, rank=4)
    kinds = {type(m.get_base_layer()).__name__ for m in unet.modules() if hasattr(m, "get_base_layer")}
    assert kinds == {"Linear", "Conv2d", "Conv3d"}
    with torch.no_grad():
        torch.testing.assert_close(student(z, t, ctx, torch.tensor([4., 4.]))[1], before[1], rtol=1e-3, atol=1e-3)
    reward = lambda frames, texts: frames.mean((1, 2, 3, 4))
    cfg = Objective(video_frames=2)
    out = Distillation(student, cfg, reward, reward)(z, ctx, null, prompts, draw(cfg, z.shape, make_gen(1)))
    out.loss.mean().backward()
    grads = {n for n, p in unet.named_parameters() if p.grad is not None}
    assert grads and all("lora" in n or "cond_proj" in n for n in grads)
    names = {n.split(".lora")[0] for n in grads if "lora_B" in n}
    assert any("temp_convs" in n for n in names) and any("attn2.to_k" in n for n in names) and "conv_in" in names
    with student.as_teacher(), torch.no_grad():
        torch.testing.assert_close(teacher.denoise(z, t, ctx)[0], before)
    merged = student.merged()
    assert not any("lora" in k for k in merged.state_dict())
