"Bad input: one clear sentence, exit status 2, and nothing written over"
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from t2v_turbo.cli import main
from t2v_turbo.core import write_video
from t2v_turbo.student import load_student
from t2v_turbo.teachers.tiny import WEIGHTS, load_teacher, save_teacher
from t2v_turbo.teachers.videocrafter2 import tiny_videocrafter2
from t2v_turbo.train import claim


def refused(capsys, *argv):
    "The one sentence on stderr of a call that must fail"
    assert main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("t2v-turbo: ") and len(err.splitlines()) == 1 and "Traceback" not in err
    return err


def test_unknown_option(capsys):
    with pytest.raises(SystemExit) as e: main(["distill", "--betas", "1"])
    assert e.value.code == 2 and "--betas" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [0, 17])
def test_steps(capsys, tmp_path, steps):
    for verb in ("sample", "evaluate"):
        assert f"steps is {steps}" in refused(capsys, verb, "--steps", steps, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("beta", ["beta_img", "beta_vid"])
def test_negative_beta(capsys, tmp_path, beta):
    assert f"{beta} is -0.5" in refused(capsys, "distill", f"--{beta}", "-0.5", "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_data_folder(capsys, tmp_path):
    call = lambda d: refused(capsys, "distill", "--data", d, "--out", tmp_path / "o")
    assert "nowhere" in call(tmp_path / "nowhere")
    empty = tmp_path / "empty"; empty.mkdir()
    assert "empty" in call(empty)
    lonely = tmp_path / "lonely"; lonely.mkdir()
    write_video(lonely / "here.mp4", torch.rand(3, 8, 32, 32))
    (lonely / "captions.csv").write_text("file,caption\nhere.mp4,noise\ngone.mp4,a red circle moving left\n")
    assert "gone.mp4" in call(lonely)
    assert not (tmp_path / "o").exists()


def test_folder_in_use(capsys, tmp_path):
    with claim(tmp_path / "o"):
        assert "in use by another run" in refused(capsys, "distill", "--out", tmp_path / "o")
        assert [p.name for p in (tmp_path / "o").iterdir()] == ["run.lock"]


def test_truncated_checkpoint(capsys, tmp_path):
    bad = tmp_path / "o" / "checkpoint.pt"; bad.parent.mkdir(); bad.write_bytes(b"PK\x03\x04" + b"0" * 100)
    assert "is truncated" in refused(capsys, "distill", "--out", tmp_path / "o")
    assert bad.read_bytes() == b"PK\x03\x04" + b"0" * 100


def test_student_of_another_teacher(capsys, tmp_path):
    other = load_teacher("tiny")
    with torch.no_grad(): other.denoiser.proj_out.weight.mul_(2)
    save_teacher(other, tmp_path / "teacher")
    student = load_student(WEIGHTS / "tiny-cd"); student.save(tmp_path / "student")
    meta = tmp_path / "student" / "student.json"
    meta.write_text(meta.read_text().replace('"tiny"', f'"{tmp_path / "teacher"}"', 1))
    assert "belongs to another teacher" in refused(capsys, "evaluate", "--student", tmp_path / "student")


def test_long_prompt_is_reported(tmp_path, capsys):
    long = "a red circle moving left and then right again"
    with pytest.warns(UserWarning, match="was cut to 'a red circle moving left"):
        assert main(["sample", "--prompt", long, "--out", str(tmp_path), "--steps", "1"]) == 0


@pytest.mark.parametrize("verb", ["distill", "sample", "evaluate", "pretrain"])
def test_help_names_every_option_with_its_default(verb, capsys):
    with pytest.raises(SystemExit) as e: main([verb, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and text.count("(default:") == text.count(" --") - 1 >= 2   # all but --help


@pytest.mark.parametrize("kind", ["videocrafter2", "lora", "merged"])
def test_help_of_conversions(kind, capsys):
    with pytest.raises(SystemExit) as e: main(["convert", kind, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and "folder to write; must not exist" in text
    assert text.count("(default:") == text.count(" --") - 1 >= 1


def test_convert(tmp_path, capsys):
    "VideoCrafter2's checkpoint and then a merged student, from the shell's side"
    state = tiny_videocrafter2()
    torch.save(dict(state_dict=state), tmp_path / "model.ckpt")
    (tmp_path / "merges.txt").write_text("#version: toy\np a\npa n\nd a</w>\npan da</w>\na n\nr e\n")
    assert main(["convert", "videocrafter2", f"{tmp_path}/model.ckpt", f"{tmp_path}/vc2",
                 "--vocabulary", f"{tmp_path}/merges.txt", "--fps", "8"]) == 0
    unet = {k.removeprefix("model.diffusion_model."): v for k, v in state.items()
            if k.startswith("model.diffusion_model.")}
    unet["time_cond_proj.weight"] = torch.zeros(unet["time_embed.0.weight"].shape[1], 256)
    torch.save(unet, tmp_path / "t2v_turbo_vc2.pt")
    paths = [f"{tmp_path}/{n}" for n in ("t2v_turbo_vc2.pt", "vc2", "student")]
    assert main(["convert", "merged", *paths, "--fps", "8"]) == 0
    a, b = (load_file(tmp_path / n / "unet" / "diffusion_pytorch_model.safetensors")
            for n in ("vc2", "student"))
    assert b.keys() - a.keys() == {"time_embedding.cond_proj.weight"}
    assert all(torch.equal(a[k], b[k]) for k in a)
    capsys.readouterr()
    assert "is there already" in refused(capsys, "convert", "merged", *paths)


def test_convert_refuses(tmp_path, capsys):
    out = tmp_path / "out"
    assert "no UNet in" in refused(capsys, "convert", "lora", "nowhere.pt", WEIGHTS / "tiny", out)
    assert "give adapters or merged" in refused(capsys, "convert", "lora", "a", "b", out, "--form", "x")
    assert not out.exists()


def test_console_command():
    run = subprocess.run([sys.executable, "-m", "t2v_turbo.cli", "--version"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("t2v-turbo 0.")
