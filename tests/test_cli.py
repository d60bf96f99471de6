"Bad input: one clear sentence, exit status 2, and nothing written over"
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.resources import files

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file

from t2v_turbo import cli, running
from t2v_turbo.checkpoints import claim
from t2v_turbo.cli import main
from t2v_turbo.core import make_gen, write_video
from t2v_turbo.evaluate import Sampler, evaluate
from t2v_turbo.judges import held_captions, load_judges
from t2v_turbo.options import options_of
from t2v_turbo.pipeline import sample_teacher
from t2v_turbo.recipes import STARTS
from t2v_turbo.saved import load_student, save_student
from t2v_turbo.standins import tiny_modelscope, tiny_videocrafter2
from t2v_turbo.student import Student
from t2v_turbo.teachers import folders
from t2v_turbo.teachers.folders import load_teacher as load_any
from t2v_turbo.teachers.published import layer_shapes, load_unet, with_w_projection
from t2v_turbo.teachers.tiny import WEIGHTS, load_teacher, save_teacher
from t2v_turbo.watch import WatchOptions


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


def test_own_data_and_no_captions_to_look_at(capsys, tmp_path):
    "A held-out reward, and an ablation, which judges at its end, need them: said before anything is loaded"
    (tmp_path / "clips").mkdir()
    call = lambda *words: refused(capsys, *words, "--data", tmp_path / "clips", "--out", tmp_path / "o")
    assert "held_out 'tiny-video' would never be asked: give prompts" in call("distill", "--held_out", "tiny-video")
    assert "no caption to judge by: with data give prompts" in call("ablate", "--over", "beta_vid=0", "--seeds", "0")
    assert not (tmp_path / "o").exists()


def test_data_folder(capsys, tmp_path):
    call = lambda d: refused(capsys, "distill", "--data", d, "--out", tmp_path / "o")
    assert "nowhere" in call(tmp_path / "nowhere")
    empty = tmp_path / "empty"; empty.mkdir()
    assert "empty" in call(empty)
    lonely = tmp_path / "lonely"; lonely.mkdir()
    write_video(lonely / "here.mp4", torch.rand(3, 8, 32, 32))
    (lonely / "captions.csv").write_text("file,caption\nhere.mp4,noise\ngone.mp4,a red fish moving left in the sea\n")
    assert "gone.mp4" in call(lonely)
    assert not (tmp_path / "o").exists()


def test_folder_in_use(capsys, tmp_path):
    with claim(tmp_path / "o"):
        assert "in use by another run" in refused(capsys, "distill", "--out", tmp_path / "o")
        assert [p.name for p in (tmp_path / "o").iterdir()] == ["run.lock"]


def test_truncated_checkpoint(capsys, tmp_path):
    bad = tmp_path / "o" / "checkpoints" / "step-00000001.pt"; bad.parent.mkdir(parents=True)
    bad.write_bytes(b"PK\x03\x04" + b"0" * 100)
    assert "is truncated" in refused(capsys, "distill", "--out", tmp_path / "o")
    assert bad.read_bytes() == b"PK\x03\x04" + b"0" * 100


def test_student_of_another_teacher(capsys, tmp_path):
    other = load_teacher("tiny")
    with torch.no_grad(): other.denoiser.patch_out.weight.mul_(2)
    save_teacher(other, tmp_path / "teacher")
    student = load_student(WEIGHTS / "tiny-cd"); save_student(student, tmp_path / "student")
    meta = tmp_path / "student" / "student.json"
    meta.write_text(meta.read_text().replace('"tiny"', f'"{tmp_path / "teacher"}"', 1))
    assert "belongs to another teacher" in refused(capsys, "evaluate", "--student", tmp_path / "student")


def test_evaluate_loads_the_teacher_of_the_student(tmp_path):
    "Its row is that of `tiny-flow`, and not that of `tiny`"
    flow, rows = load_any("tiny-flow"), tmp_path / "rows.json"
    save_student(Student(flow, 2), tmp_path / "student")
    assert main(["evaluate", "--student", str(tmp_path / "student"), "--steps", "2", "--w", "2", "--repeats", "1", "--out", str(rows)]) == 0   # in one step they are the same
    got, judges, prompts = json.loads(rows.read_text())[0], load_judges(), held_captions()
    row = lambda t: evaluate(Sampler("teacher", 2, 4, lambda p, seed: sample_teacher(t, p, make_gen(seed), 2, 2.)), prompts, judges, repeats=1)
    flow, tiny = row(load_any("tiny-flow")), row(load_teacher("tiny"))
    assert got["motion_amount"] == pytest.approx(flow["motion_amount"]) and got["motion_amount"] != pytest.approx(tiny["motion_amount"], rel=.01)


def test_who_is_compared_is_where_the_student_is(monkeypatch):
    "On a device that is not the CPU (`meta` stands for it), and the teacher in the student's precision"
    loaded = []
    monkeypatch.setattr(folders, "load_teacher", lambda *a, **how: loaded.append(how) or load_any(*a, **how))
    who = running.samplers(load_student(WEIGHTS / "tiny-cd").to("meta"), running.DistillOptions(), WatchOptions())
    assert {s.model: s.sample(["a red fish moving left in the sea"], 0).device.type for s in who} == dict(teacher="meta", cd="meta", turbo="meta")
    running.samplers(Student(load_any("tiny-flow", dtype=torch.bfloat16), 2), running.DistillOptions(), WatchOptions())
    assert [how["dtype"] for how in loaded] == [torch.float32, torch.bfloat16]


def test_captions_that_the_text_cache_lacks(capsys, tmp_path):
    "Said before the folder of the run is made"
    assert main(["cache", "text", str(tmp_path / "texts"), "--samples", "8"]) == 0
    capsys.readouterr()
    told = refused(capsys, "distill", "--texts", tmp_path / "texts", "--steps", "1", "--out", tmp_path / "o")
    assert f"12 captions to look at, such as {held_captions(1)[0]!r}, are not in the text cache" in told and told.endswith("or give --eval_every 0")
    assert not (tmp_path / "o").exists()


def test_texts_that_are_no_cache_of_texts(capsys, tmp_path):
    "Said before anything is made"
    assert main(["cache", "latents", str(tmp_path / "z"), "--samples", "2", "--batch", "2"]) == 0
    capsys.readouterr()
    for words in (["distill"], ["cache", "pairs", tmp_path / "p", "--data", tmp_path / "z"]):
        more = ["--out", tmp_path / "o", "--eval_every", "0"] if words == ["distill"] else []
        told = refused(capsys, *words, "--texts", tmp_path / "z", *more)
        assert "is a cache of latents, not of texts: give it as --data, and as --texts one that" in told
    assert not (tmp_path / "o").exists() and not (tmp_path / "p").exists()


def test_long_prompt_is_reported(tmp_path, capsys):
    long = "a red fish moving left in the sea and then right again"
    with pytest.warns(UserWarning, match="was cut to 'a red fish moving left in the sea"):
        assert main(["sample", "--prompt", long, "--out", str(tmp_path), "--steps", "1"]) == 0


@pytest.mark.parametrize("verb", ["distill", "ablate", "sample", "evaluate", "pretrain", "cache", "plan", "generate"])
def test_help_names_every_option_with_its_default(verb, capsys):
    with pytest.raises(SystemExit) as e: main([verb, "--help"])
    text, v = " ".join(capsys.readouterr().out.split()), next(v for v in cli.VERBS if v.name == verb)
    options = [o for o in (*options_of(v), *(STARTS if v.training else ())) if not o.place]
    assert e.value.code == 0 and text.count("(default:") == len(options) >= 2
    for o in options: assert f" --{o.name}" in text, o.name


@pytest.mark.parametrize("kind", ["videocrafter2", "lora", "merged"])
def test_help_of_conversions(kind, capsys):
    with pytest.raises(SystemExit) as e: main(["convert", kind, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and "folder to write; must not exist" in text and text.count("(default:") >= 1


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
    paths = [f"{tmp_path}/{n}" for n in ("t2v_turbo_vc2.pt", "student")]
    base = ["--base_folder", f"{tmp_path}/vc2"]
    assert main(["convert", "merged", *paths, *base, "--fps", "8"]) == 0
    a, b = (load_file(tmp_path / n / "unet" / "diffusion_pytorch_model.safetensors")
            for n in ("vc2", "student"))
    assert b.keys() - a.keys() == {"time_embedding.cond_proj.weight"}
    assert all(torch.equal(a[k], b[k]) for k in a)
    capsys.readouterr()
    assert "is there already" in refused(capsys, "convert", "merged", *paths, *base)


@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_convert_is_stopped(tmp_path, capsys, monkeypatch, name, status):
    "A signal in the middle of writing: nothing is left, and the words are not those of training"
    torch.save(dict(state_dict=tiny_videocrafter2()), tmp_path / "model.ckpt")
    (tmp_path / "merges.txt").write_text("#version: toy\np a\npa n\nd a</w>\npan da</w>\na n\nr e\n")
    before, handlers = sorted(tmp_path.iterdir()), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    def stop(self, folder, **_):
        assert list(folder.parent.rglob("*.safetensors"))              # the UNet is written
        signal.raise_signal(getattr(signal, name))
    monkeypatch.setattr(AutoencoderKL, "save_pretrained", stop)
    words = ["convert", "videocrafter2", f"{tmp_path}/model.ckpt", f"{tmp_path}/vc2", "--vocabulary", f"{tmp_path}/merges.txt"]
    assert main(words) == status
    assert f"stopped by {name}; no folder was written: run the command again" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def random_list(folder, base):
    unet, out = with_w_projection(load_unet(folder)), []
    for o, i, *k in layer_shapes(unet, base).values():
        r = min(4, o, i)
        out += [torch.zeros(o, r, *[1] * len(k)), torch.zeros(r, i, *k)]
    return out


def test_convert_lora(tmp_path, capsys, monkeypatch):
    "A list for ModelScopeT2V: its base comes from the hub, or from a copy that is named; the student remembers which"
    ms, fetched = tiny_modelscope(tmp_path / "ms"), []
    monkeypatch.setattr(folders, "fetch_folder", lambda name, *_, **__: fetched.append(name) or str(ms))
    torch.save(random_list(ms, "ms"), tmp_path / "unet_lora.pt")
    words, hub = ["convert", "lora", f"{tmp_path}/unet_lora.pt", "--base", "ms"], "ali-vilab/text-to-video-ms-1.7b"
    assert main([*words, f"{tmp_path}/a"]) == 0 and fetched == [hub]
    assert main([*words, f"{tmp_path}/b", "--base_folder", str(ms)]) == 0 and fetched == [hub]
    assert main([*words, f"{tmp_path}/c", "--form", "merged", "--base_folder", "some/copy"]) == 0 and fetched == [hub, "some/copy"]
    a, b = (json.loads((tmp_path / n / "student.json").read_text()) for n in "ab")
    assert (a["teacher"], b["teacher"]) == (hub, str(ms)) and a["fingerprints"] == b["fingerprints"]
    assert load_student(tmp_path / "b").teacher.latent_shape == (4, 16, 4, 4)
    assert (tmp_path / "c/unet/config.json").is_file() and (tmp_path / "c/vae/config.json").is_file()
    capsys.readouterr()
    lost = refused(capsys, "convert", "lora", tmp_path / "none.pt", "--base", "ms", tmp_path / "d")
    assert "no file" in lost and "unet_lora.pt" in lost
    assert "is there already" in refused(capsys, *words, tmp_path / "a")
    assert len(fetched) == 2                               # a mistake is told before anything is fetched
    assert "is a list for base 'ms'" in refused(capsys, *words[:3], "--base_folder", ms, tmp_path / "d")
    def offline(name, *_, **__): raise folders.UserError("offline")
    monkeypatch.setattr(folders, "fetch_folder", offline)
    assert f"no folder '{hub}'" in refused(capsys, *words, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_convert_refuses(tmp_path, capsys):
    out = tmp_path / "out"
    torch.save([torch.zeros(1)], tmp_path / "l.pt")
    lora = ("convert", "lora", tmp_path / "l.pt", out)
    assert "no UNet in" in refused(capsys, *lora, "--base_folder", WEIGHTS / "tiny")
    assert "give adapters or merged" in refused(capsys, *lora, "--form", "x")
    assert "give vc2 or ms" in refused(capsys, *lora, "--base", "sd")
    for call in (lora, ("convert", "merged", tmp_path / "l.pt", out)):
        assert "no --base_folder: give the folder that `t2v-turbo convert videocrafter2` made" in refused(capsys, *call)
    assert "fps 0 is not possible" in refused(capsys, *lora, "--base_folder", tmp_path, "--fps", "0")
    assert not out.exists()


def test_a_folder_that_is_no_teacher(capsys, tmp_path):
    (tmp_path / "model").mkdir()
    assert "is not a diffusers model" in refused(capsys, "distill", "--teacher", tmp_path / "model", "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_console_command():
    run = subprocess.run([sys.executable, "-m", "t2v_turbo.cli", "--version"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("t2v-turbo 0.")


@pytest.mark.parametrize("argv", [["--version"], ["no_such_verb"], ["recipes"], ["completion", "bash"], ["distill", "--recipe", "list"],
                                  ["--help"], ["vbench", "--help"]], ids=" ".join)
def test_asking_loads_no_heavy_library(argv):
    code = ("import sys; from t2v_turbo.cli import main\n"
            f"try: main({argv!r})\n"
            "except SystemExit: pass\n"
            "print('loaded:', *sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].strip() == "loaded:", run.stdout


def test_paths_and_numbers_that_cannot_be_meant(capsys, tmp_path):
    "One sentence each, before anything is sampled"
    (tmp_path / "file").touch(); (tmp_path / "latin1.txt").write_bytes("un caf\xe9".encode("latin-1"))
    assert "is a file: give a folder" in refused(capsys, "sample", "--out", tmp_path / "file")
    assert "is not UTF-8 text: save it as UTF-8" in refused(capsys, "sample", "--prompts", tmp_path / "latin1.txt")
    assert "is not UTF-8 text: save it as UTF-8" in refused(capsys, "distill", "--prompts", tmp_path / "latin1.txt", "--out", tmp_path / "o")
    assert "give another path" in refused(capsys, "cache", "text", tmp_path / "file" / "c", "--samples", "4")
    assert "w is nan: give a number" in refused(capsys, "sample", "--w", "nan")
    assert "give 0 to 2^63 - 1" in refused(capsys, "sample", "--seed", 10**20)
    (tmp_path / "p.txt").write_text("a red fish moving left in the sea\n")
    for name, v in dict(frames=-1, height=-8, batch=0, rank=-1, gpu="nan", tflops=-1).items():
        assert f"{name} is {float(v) if name in ('gpu', 'tflops') else v}: give " in refused(capsys, "plan", f"--{name}", v)
    assert "steps is 0: give 1 to 1000" in refused(capsys, "cache", "samples", tmp_path / "c", "--steps", 0, "--data", tmp_path / "p.txt")
    assert "at_once is -1: give 0 or more" in refused(capsys, "cache", "text", tmp_path / "c", "--at_once", -1, "--samples", 4)
    assert not (tmp_path / "c").exists()
    for verb, name in (("distill", "student_w"), ("distill", "teacher_w"), ("evaluate", "w"), ("generate", "w")):
        assert f"{name} is nan: give" in refused(capsys, verb, f"--{name}", "nan", "--out", tmp_path / "o")
    assert "/proc/x cannot be used" in refused(capsys, "cache", "text", "/proc/x/y", "--samples", 4)
    assert "(Not a directory): choose another --out" in refused(capsys, "pretrain", "--out", tmp_path / "file" / "w")


def test_weights_that_are_none(capsys, tmp_path):
    "A safetensors file that was cut short is not a traceback"
    shutil.copytree(WEIGHTS / "tiny", tmp_path / "t")
    part = next((tmp_path / "t").rglob("*.safetensors")); part.write_bytes(part.read_bytes()[:100])
    assert refused(capsys, "distill", "--teacher", tmp_path / "t", "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("error, says", [(FileNotFoundError(2, "No such file or directory", "/proc/x"), "/proc/x cannot be used (No such file or directory): give another path"),
                                         (OSError(28, "No space left on device"), "a file cannot be written (No space left on device): make room"),
                                         (SafetensorError("Error while deserializing header"), "a .safetensors file cannot be read or written")])
def test_errors_of_the_file_system_are_sentences(capsys, monkeypatch, error, says):
    def fails(argv): raise error
    monkeypatch.setattr(cli, "run", fails)
    assert says in refused(capsys, "sample")


def test_a_bug_is_still_a_traceback(monkeypatch):
    def fails(argv): raise OSError("no file and no name")
    monkeypatch.setattr(cli, "run", fails)
    with pytest.raises(OSError, match="no file and no name"): main(["sample"])


def test_a_reader_that_has_enough(tmp_path):
    "`t2v-turbo vbench check | head -1` ends quietly, also when all that was said is still in a buffer"
    head, row = (files("t2v_turbo") / "published" / "vbench.csv").read_text().splitlines()[:2]
    (tmp_path / "t.csv").write_text(f"{head}\n{row}\n")
    read, write = os.pipe(); os.close(read)
    run = subprocess.run([sys.executable, "-m", "t2v_turbo.cli", "vbench", "check", tmp_path / "t.csv"], stdout=write, stderr=subprocess.PIPE, text=True,
                         env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"})
    os.close(write)
    assert (run.returncode, run.stderr) == (0, "")
