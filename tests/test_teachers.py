"One command for every teacher; and the recipe names none of them"
import ast
import re
from pathlib import Path

import pytest
import torch

import t2v_turbo
from t2v_turbo import running
from t2v_turbo.cli import main
from t2v_turbo.standins import tiny_modelscope, tiny_videocrafter2, tiny_wan
from t2v_turbo.student import Student
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.teachers.videocrafter2 import convert_videocrafter2
from t2v_turbo.teachers.wan import save_wan

RECIPE = "schedule", "solver", "consistency", "data.clips", "student", "distill", "engines", "train", "pipeline"


def videocrafter2(folder):
    folder.parent.mkdir(exist_ok=True)
    torch.save(dict(state_dict=tiny_videocrafter2()), folder.with_suffix(".ckpt"))
    words = folder.with_suffix(".txt")
    words.write_text("#version: toy\np a\npa n\nd a</w>\npan da</w>\na n\nr e\n")
    convert_videocrafter2(folder.with_suffix(".ckpt"), folder, 16, words)


SMALL = ["--height", "32", "--width", "32"]
REWARDS = ["--reward", "tiny-image,tiny-video"]          # a real teacher has none of its own
KINDS = dict(tiny=(None, []), ms=(tiny_modelscope, [*SMALL, "--frames", "8"]),
             vc2=(videocrafter2, [*SMALL, "--frames", "8"]),
             wan=(lambda folder: save_wan(tiny_wan(), folder),
                  [*SMALL, "--frames", "9"]))


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_and_four(kind, tmp_path, monkeypatch):
    "A real optimiser step with both rewards, and a clip in four steps, from the command line; the table at the end has its own tests"
    monkeypatch.setattr(running, "report", lambda *_: {})
    make, options = KINDS[kind]
    name = "tiny" if make is None else str(tmp_path / kind)
    if make: make(tmp_path / kind)
    out = tmp_path / "student"
    one = ["--steps", "1", "--batch", "2", "--rank", "2", "--eval_every", "0", "--repeats", "1"]
    assert main(["distill", "--teacher", name, *one, *REWARDS, *options, "--out", str(out)]) == 0
    assert main(["sample", "--student", str(out / "student"), "--out", str(tmp_path / "v")]) == 0
    assert len(list((tmp_path / "v").glob("*.mp4"))) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_denoiser_is_called_in_its_precision(kind, dtype, tmp_path):
    "Which is that of its first convolution, whatever the adapters are in"
    make, _ = KINDS[kind]
    if make: make(tmp_path / kind)
    teacher = load_teacher(tmp_path / kind if make else "tiny", dtype=dtype)
    student, seen = Student(teacher, 2), []
    zt = torch.zeros(1, *teacher.latent_shape)
    if make: zt = zt[..., :4, :4]                         # the tiny teacher has one size
    teacher.denoiser.register_forward_pre_hook(lambda net, x, kw: seen.append((x[0].dtype, kw["encoder_hidden_states"].dtype)),
                                               with_kwargs=True)
    with torch.no_grad(): out = student(zt, torch.tensor([499]), teacher.encode_text(["a cat"]), torch.tensor([3.]))
    assert seen == [(dtype, dtype)] == [(teacher.denoiser.dtype,)*2] and out.dtype == torch.float32


def test_illegal_sizes_name_the_nearest(tmp_path, capsys):
    for kind, bad, told in (("ms", ["--height", "30", "--width", "32"], "the nearest is 32x32"),
                            ("wan", ["--frames", "8"], "the nearest is 9")):
        KINDS[kind][0](tmp_path / kind)
        out = tmp_path / "out"
        assert main(["distill", "--teacher", str(tmp_path / kind), *REWARDS, *bad, "--out", str(out)]) == 2
        assert told in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("module", RECIPE)
def test_recipe_names_no_teacher(module):
    "Solver, losses, trainer and sampler know the protocol, and not who is behind it"
    tree = ast.parse((Path(t2v_turbo.__file__).parent / (module.replace(".", "/") + ".py")).read_text())
    words = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    words |= {a.name for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    words |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    words |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    known = r"unet3d|wan$|wan_|wanteacher|wantransformer|videocrafter|vc2|modelscope|teachers\.tiny|tinyvideo"
    assert not [w for w in words if re.search(known, w.lower())]


@pytest.mark.parametrize("kind", ["ms", "wan"])
def test_suite_of_a_teacher_in_a_folder(kind, tmp_path):
    "`generate --teacher` opens the folders that `distill --teacher` opens"
    KINDS[kind][0](tmp_path / kind)
    (tmp_path / "prompts.txt").write_text("a red fish\n")
    assert main(["generate", "--suite", "evalcrafter", "--prompts", f"{tmp_path}/prompts.txt", "--teacher",
                 f"{tmp_path}/{kind}", "--steps", "1", "--out", f"{tmp_path}/out"]) == 0
    assert len(list((tmp_path / "out" / "videos").glob("*.mp4"))) == 1


def test_wan_rewards_see_the_whole_clip(tmp_path, monkeypatch):
    "The trainer asks for frames of the clip, of which there are more than latents"
    from t2v_turbo.teachers.wan import WanTeacher
    from t2v_turbo.train import Config, Objective, Trainer
    save_wan(tiny_wan(), tmp_path / "wan")
    trainer = Trainer(Config(out=str(tmp_path / "o"), teacher=str(tmp_path / "wan"), steps=4, batch=1, rank=2,
                             frames=9, height=32, width=32, reward="tiny-image", objective=Objective(beta_vid=0., image_frames=9)))
    asked, decode = [], WanTeacher.decode
    monkeypatch.setattr(WanTeacher, "decode", lambda self, z, frames=None: (
        asked.append(frames.tolist()), decode(self, z, frames))[1])
    for _ in trainer.fit(): pass
    assert asked == [list(range(9))]*4                   # 9 frames are 3 latents
