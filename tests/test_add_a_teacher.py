"The tutorial's adapter as a package of its own: the commands find it by its entry point, in processes that know nothing of it"
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel

from t2v_turbo.core import make_gen
from t2v_turbo.files import UserError
from t2v_turbo.pipeline import T2VTurboPipeline
from t2v_turbo.standins import letter_tokenizer
from t2v_turbo.teachers import folders, tiny
from t2v_turbo.teachers.base import Teacher
from t2v_turbo.teachers.folders import load_teacher, teacher_class

NOTEBOOK = Path(__file__).resolve().parents[1] / "nbs/tutorials/add_a_teacher.ipynb"
CELLS = ["".join(c["source"]) for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
ADAPTER = [s for s in CELLS if s.startswith("# cogvideox.py")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A folder for `sys.path` with the adapter in it, installed as pip would"
    site = tmp_path_factory.mktemp("site")
    (site / "cogvideox.py").write_text("\n\n".join(ADAPTER) + "\n")
    info = site / "cogvideox-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cogvideox\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(
        "[t2v_turbo.teachers]\nCogVideoXTransformer3DModel = cogvideox:load_cogvideox\n")
    return site


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The tutorial's tiny folder, written by the tutorial's own cell"
    names = dict(globals(), torch=torch)
    exec(next(s for s in CELLS if "def tiny_cogvideox(" in s), names)
    return Path(names["tiny_cogvideox"](tmp_path_factory.mktemp("cog") / "cogvideox"))


def test_as_short_as_promised():
    lines = [l for s in ADAPTER for l in s.splitlines() if l.strip() and not l.lstrip().startswith("#")]
    assert len(ADAPTER) == 3 and 50 < len(lines) <= 100 and max(map(len, lines)) <= 105
    offer = 'CogVideoXTransformer3DModel = "cogvideox:load_cogvideox"'
    assert offer in NOTEBOOK.read_text().replace('\\"', '"')


@pytest.fixture
def tables(monkeypatch):
    "What is registered in a test is forgotten after it"
    for name in ("LOADERS", "CLASSES"): monkeypatch.setattr(folders, name, dict(getattr(folders, name)))


@pytest.fixture
def installed(site, tables, monkeypatch):
    "The adapter's package, for this process; its module is imported anew and forgotten afterwards"
    monkeypatch.syspath_prepend(str(site))
    yield
    sys.modules.pop("cogvideox", None)


def test_commands_in_a_fresh_process(site, folder, tmp_path, installed):
    "Distil, sample in bfloat16, save as a pipeline, in a process that never imports the adapter; the pipeline opens in ours"
    code = """if 1:
        import sys, torch
        from t2v_turbo.cli import main
        from t2v_turbo.core import make_gen
        from t2v_turbo.pipeline import T2VTurboPipeline
        small = ["--reward", "tiny-image,tiny-video", "--frames", "9", "--rank", "2", "--batch", "1", "--steps", "1"]
        assert main(["distill", "--teacher", sys.argv[1], *small, "--out", "run"]) == 0
        assert main(["sample", "--student", "run/student", "--dtype", "bfloat16", "--out", "videos"]) == 0
        from t2v_turbo.teachers.folders import defaults_of, load_teacher
        assert defaults_of(load_teacher(sys.argv[1])) == defaults_of(sys.argv[1]) and defaults_of(sys.argv[1]).w_max == 6.
        pipe = T2VTurboPipeline.from_pretrained("run/student")
        torch.save(pipe("a red fish", generator=make_gen(0), output_type="pt").frames, "want.pt")
        pipe.save_pretrained("pipe")
    """
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")])))
    run = subprocess.run([sys.executable, "-c", code, folder], cwd=tmp_path, env=env, text=True, capture_output=True,
                         stdin=subprocess.DEVNULL)
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1
    importlib.import_module("cogvideox")                  # as diffusers demands of modules that are not its own
    pipe = T2VTurboPipeline.from_pretrained(tmp_path / "pipe")
    got, want = pipe("a red fish", generator=make_gen(0), output_type="pt").frames, torch.load(tmp_path / "want.pt", weights_only=True)
    assert got.shape == (1, 9, 3, 32, 32)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_not_installed_is_named(folder):
    with pytest.raises(UserError, match="CogVideoXTransformer3DModel, which is no teacher here: give one of Tiny"):
        load_teacher(folder)


def test_a_class_that_was_forgotten_is_named(tables):
    class Other(Teacher): pass
    def load(folder, **options):
        teacher = tiny.load_teacher(str(folder))
        teacher.__class__ = Other
        return teacher
    folders.LOADERS["TinyVideoDenoiser"] = load
    with pytest.raises(UserError, match=r"set CLASSES\[TinyVideoDenoiser, PatchVAE\] = Other"): load_teacher("tiny")
    teacher = load(tiny.WEIGHTS / "tiny")
    folders.CLASSES[type(teacher.denoiser), type(teacher.vae)] = Other
    assert type(load_teacher("tiny")) is Other and teacher_class(teacher.denoiser, teacher.vae) is Other


def test_protocol_in_bfloat16(folder, installed):
    "Weights in bfloat16, results in float32 and near those of float32 weights"
    half, full = load_teacher(folder, dtype=torch.bfloat16), load_teacher(folder)
    assert half.denoiser.dtype == half.vae.dtype == torch.bfloat16
    clips, t = torch.rand(1, *full.video_shape, generator=make_gen(0)), torch.tensor([979])
    zt, ctx = torch.randn(1, *full.latent_shape, generator=make_gen(1)), full.encode_text(["a"])
    with torch.no_grad():
        for f in (lambda m: m.encode(clips), lambda m: m.decode(zt), lambda m: m.denoise(zt, t, ctx)[0],
                  lambda m: m.encode_text(["a"]).float()):
            a, b = f(half), f(full)
            assert a.dtype == torch.float32 and a.shape == b.shape
            assert (a - b).norm() < .05 * b.norm()


def test_larger_models_are_refused(installed, tmp_path):
    "CogVideoX 5B has rotary positions"
    CogVideoXTransformer3DModel(num_attention_heads=1, attention_head_dim=16, time_embed_dim=8, text_embed_dim=8, num_layers=1,
                                use_rotary_positional_embeddings=True).save_pretrained(tmp_path / "big/transformer")
    with pytest.raises(UserError, match="give CogVideoX-2b"): load_teacher(tmp_path / "big")
