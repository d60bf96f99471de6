"An exported student, loaded with stock diffusers only, gives the frames of our pipeline"
import json
import os
import subprocess
import sys

import loras
import pytest
import torch
from diffusers import (
    FlowMatchLCMScheduler,
    LCMScheduler,
    TextToVideoSDPipeline,
    UNet3DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file
from test_faults import refused

from t2v_turbo import cli, pipeline
from t2v_turbo.consistency import few_step_grid, w_embedding
from t2v_turbo.core import make_gen
from t2v_turbo.export import export_lora, export_stock, fold_w
from t2v_turbo.files import UserError
from t2v_turbo.full import make_student
from t2v_turbo.identity import weights_ids
from t2v_turbo.pipeline import T2VTurboPipeline
from t2v_turbo.saved import load_student, save_student
from t2v_turbo.standins import tiny_modelscope, tiny_videocrafter2, tiny_wan
from t2v_turbo.student import Student
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.teachers.lora import wan_name
from t2v_turbo.teachers.videocrafter2 import convert_videocrafter2
from t2v_turbo.teachers.wan import save_wan


def near(got, want, rtol=1e-4):
    assert got.shape == want.shape
    assert ((got.double() - want.double()).norm()/want.double().norm()).item() < rtol


def shaken(teacher, seed=0):
    "A student whose every trainable number is random"
    student, gen = Student(teacher, rank=3), make_gen(seed)
    with torch.no_grad():
        for p in student.trainable().values(): p.copy_(.1*torch.randn(p.shape, generator=gen))
    return student


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    at = tmp_path_factory.mktemp("t")
    torch.save(dict(state_dict=tiny_videocrafter2()), at/"model.ckpt")
    (at/"merges.txt").write_text("#version\np a\npa n\npan d\npand a</w>\na n\nan d</w>\n")
    return dict(ms=tiny_modelscope(at/"ms"),
                vc2=convert_videocrafter2(at/"model.ckpt", at/"vc2", 16, at/"merges.txt"))


@pytest.fixture(scope="module", params=["ms", "vc2"])
def pipe(request, folders):
    more = dict(frames=3) | (dict(size=(16, 24), fps=8) if request.param == "vc2" else {})
    pipe = T2VTurboPipeline.from_student(shaken(load_teacher(folders[request.param], **more)), 7.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_student_without_lora_is_exported_like_any_other(folders, tmp_path):
    "Saved, read for sampling, and as a stock folder: the frames of the student in training"
    student, gen = make_student(load_teacher(folders["ms"], frames=3), 0), make_gen(0)
    with torch.no_grad():
        for p in student.trainable().values(): p.add_(.05*torch.randn(p.shape, generator=gen))
    save_student(student, tmp_path/"s")
    pipe = T2VTurboPipeline.from_pretrained(tmp_path/"s")
    pipe.set_progress_bar_config(disable=True)
    assert all(torch.equal(p, q) for p, q in zip(pipe.denoiser.parameters(), student.merged().parameters()))
    stock = TextToVideoSDPipeline.from_pretrained(export_stock(pipe, tmp_path/"stock", w=7.5))
    z, t = torch.randn(1, *student.teacher.latent_shape, generator=gen), torch.tensor([999])
    ctx = student.teacher.encode_text(["a panda dances"])
    with torch.no_grad():
        got = stock.unet(z, t, ctx).sample
        near(got, student.teacher.denoiser(z, t, ctx, timestep_cond=w_embedding(torch.tensor([7.5]))).sample)
    half = T2VTurboPipeline.from_pretrained(tmp_path/"s", dtype="bfloat16")
    assert {p.dtype for p in half.denoiser.parameters()} == {torch.bfloat16}


class Frames:
    "Draws as the stock pipeline does: the start at once, then between the steps frame by frame"
    def __init__(self): self.n = 0

    def __call__(self, shape, generator=None, device=None):
        self.n += 1
        if self.n == 1: return torch.randn(shape, generator=generator)
        b, c, t, h, w = shape
        return torch.randn(b*t, c, h, w, generator=generator).unflatten(0, (b, t)).transpose(1, 2)


@pytest.mark.parametrize("n, b", [(1, 1), (2, 2), (4, 1), (5, 1)])
def test_stock_diffusers_gives_our_frames(pipe, tmp_path, monkeypatch, n, b):
    "At the published timesteps, which `LCMScheduler` takes where its own rounding differs"
    prompts, size = ["a panda", "an"][:b], dict(height=pipe.config.height, width=pipe.config.width)
    stock = TextToVideoSDPipeline.from_pretrained(export_stock(pipe, tmp_path/"out"))
    stock.set_progress_bar_config(disable=True)
    assert isinstance(stock.scheduler, LCMScheduler) and type(stock.unet) is UNet3DConditionModel
    assert stock.unet.config.time_cond_proj_dim is None
    own = stock.scheduler.set_timesteps
    stock.scheduler.set_timesteps = lambda _, device: own(device=device, timesteps=few_step_grid(n))
    got = stock(prompts, num_inference_steps=n, guidance_scale=1, num_frames=3, output_type="pt",
                generator=make_gen(2), **size).frames
    monkeypatch.setattr(pipeline, "randn_tensor", Frames())
    want = pipe(prompts, n, 7.5, generator=make_gen(2), output_type="pt").frames
    near(torch.as_tensor(got), want)
    monkeypatch.setattr(pipeline, "randn_tensor", Frames())
    other = pipe(prompts, n, 4., generator=make_gen(2), output_type="pt").frames
    assert (other - want).abs().max() > 1e-3          # w matters in this student


@pytest.mark.parametrize("w", [0., 7.5, 14.])
@torch.no_grad()
def test_fold_w(pipe, w):
    net, gen = pipe.denoiser, make_gen(1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x, t = torch.randn(2, 4, 3, 4, 4, generator=gen), torch.tensor([19, 999])
    ctx = torch.randn(2, 5, net.config.cross_attention_dim, generator=gen)
    want = net(x, t, ctx, timestep_cond=w_embedding(torch.tensor([w, w]))).sample
    near(fold_w(net, w)(x, t, ctx).sample, want, 1e-5)
    for k, v in net.state_dict().items(): assert torch.equal(v, before[k]), k


def test_without_this_package(pipe, tmp_path):
    "A process that cannot import t2v_turbo samples the folder"
    export_stock(pipe, tmp_path/"out", 5.)
    about = json.loads((tmp_path/"out/about.json").read_text())
    assert about["w"] == 5 and (about["num_frames"], about["fps"]) == (3, 8)
    code = """if 1:
        import sys; sys.modules['t2v_turbo'] = None
        from diffusers import TextToVideoSDPipeline
        p = TextToVideoSDPipeline.from_pretrained(sys.argv[1])
        got = p('a', num_inference_steps=4, guidance_scale=1, num_frames=3, height=16, width=16, output_type='pt').frames
        assert p.scheduler.timesteps.tolist() == [999, 759, 499, 259]
        print(tuple(got.shape))"""
    run = subprocess.run([sys.executable, "-c", code, tmp_path/"out"], text=True, capture_output=True,
                         env=os.environ | dict(HF_HUB_OFFLINE="1"))
    assert run.stdout.strip().endswith("(1, 3, 3, 16, 16)"), run.stderr


@pytest.mark.parametrize("origin, n", [(o, n) for o in (50, 200) for n in (1, 2, 4, 8, 16)])
def test_the_scheduler_takes_the_published_timesteps(pipe, tmp_path, origin, n):
    sched = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=origin)
    sched.set_timesteps(timesteps=few_step_grid(n, origin))
    assert sched.timesteps.tolist() == few_step_grid(n, origin)
    sched.set_timesteps(n)
    k = 1000//origin
    assert {int(t) % k for t in sched.timesteps} == {k - 1}   # on the training grid in any case


def test_origin_grid_is_kept(pipe, tmp_path):
    export_stock(pipe, tmp_path/"out", origin_steps=200)
    sched = LCMScheduler.from_pretrained(tmp_path/"out/scheduler")
    assert sched.config.original_inference_steps == 200
    torch.testing.assert_close(sched.alphas_cumprod, pipe.scheduler.alphas_cumprod)
    sched.set_timesteps(4)
    assert sched.timesteps.tolist() == few_step_grid(4, 200)


def test_refused(pipe, tmp_path, monkeypatch):
    (tmp_path/"there").mkdir()
    with pytest.raises(UserError, match="is there already"): export_stock(pipe, tmp_path/"there")
    with pytest.raises(UserError, match="negative"): export_stock(pipe, tmp_path/"new", -1)
    with pytest.raises(UserError, match="already"): fold_w(fold_w(pipe.denoiser, 4), 4)
    with pytest.raises(UserError, match="TinyVideoDenoiser"): fold_w(load_teacher("tiny").denoiser, 4)
    def stop(self, folder, **_): folder.mkdir(); raise KeyboardInterrupt
    monkeypatch.setattr(TextToVideoSDPipeline, "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt): export_stock(pipe, tmp_path/"new")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


# ---- a student of my own Wan: a style, few steps, or both

@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    "A model, a style in ComfyUI's names, and a student that `distill` made of both in two steps"
    at = tmp_path_factory.mktemp("wan")
    t = tiny_wan(frames=5)
    save_wan(t, at/"wan")
    file, _ = loras.write(loras.random_lora(t.denoiser, loras.in_blocks(t.denoiser), size=.2), "comfyui", at/"style", t.denoiser)
    assert cli.main(f"distill --teacher {at}/wan --teacher_lora {file}=0.8 --steps 2 --batch 2 --rank 3 --lr 0.01 --w_min 3 --w_max 3 "
                    f"--beta_img 0 --beta_vid 0 --eval_every 0 --track= --dtype float32 --out {at}/run".split()) == 0
    return at


def louder(student, folder):
    "Two steps hardly move a student: make every trained number count"
    with torch.no_grad():
        for i, p in enumerate(student.trainable().values()): p.add_(.1*torch.randn(p.shape, generator=make_gen(i)))
    save_student(student, folder)
    return student


def frames_of(pipe, n, **more):
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    z = torch.randn(1, 16, 2, 4, 4)
    got = pipe("a cat", num_inference_steps=n, latents=z, height=32, width=32, num_frames=5, output_type="pt", **more).frames
    return torch.as_tensor(got)


def stock(wan, *files):
    "Stock classes with LoRA files, all at full strength but the style"
    pipe = WanPipeline.from_pretrained(wan/"wan")
    for i, f in enumerate(files): pipe.load_lora_weights(f.parent, weight_name=f.name, adapter_name=f"lora{i}")
    if files: pipe.set_adapters([f"lora{i}" for i in range(len(files))], [.8 if f.name == "style.safetensors" else 1. for f in files])
    return pipe


@pytest.mark.parametrize("n", [1, 2, 4])
def test_my_own_wan_in_stock_diffusers(wan, tmp_path, n):
    "Distilled from a model with a style, exported in three forms, and loaded by stock classes: the frames of our pipeline"
    louder(load_student(wan/"run/student"), tmp_path/"student")
    run = lambda form: cli.main(["export", str(tmp_path/"student"), str(tmp_path/form), "--form", form, "--steps", str(n), "--w", "3"])
    for form in ("folder", "lora", "comfyui"): assert run(form) == 0
    want = frames_of(T2VTurboPipeline.from_pretrained(tmp_path/"student"), n, guidance_scale=3.)
    folder = WanPipeline.from_pretrained(tmp_path/"folder")
    assert type(folder.transformer) is WanTransformer3DModel and type(folder.scheduler) is FlowMatchLCMScheduler
    near(frames_of(folder, n, guidance_scale=1.), want)
    assert json.loads((tmp_path/"folder/about.json").read_text()) == dict(
        w=3., num_frames=5, height=32, width=32, fps=16, guidance_scale=1, num_inference_steps=n)
    for form, name in (("lora", "pytorch_lora_weights.safetensors"), ("comfyui", "comfyui_lora.safetensors")):
        pipe = stock(wan, wan/"style/style.safetensors", tmp_path/form/name)
        pipe.scheduler = FlowMatchLCMScheduler.from_pretrained(tmp_path/form, subfolder="scheduler")
        near(frames_of(pipe, n, guidance_scale=1.), want)
        about = json.loads((tmp_path/form/"about.json").read_text())
        assert about["teacher_lora"].endswith("style.safetensors=0.8") and len(about["sigmas"]) == n + 1


@torch.no_grad()
def test_style_and_few_steps_together_and_apart(wan, tmp_path):
    "Neither file holds anything of the other: W, W + S, W + F and W + S + F, by stock diffusers and by ours"
    louder(load_student(wan/"run/student"), tmp_path/"s")
    few, style = export_lora(load_student(tmp_path/"s"), tmp_path/"few", 3.), wan/"style/style.safetensors"
    t = tiny_wan(frames=5)
    x, time, ctx = torch.randn(1, 16, 2, 4, 4, generator=make_gen(1)), torch.tensor([700.]), t.encode_text(["a cat"])
    of = lambda *files: stock(wan, *files).transformer(x, time, ctx).sample
    both, alone, styled, plain = of(style, few), of(few), of(style), of()
    near(both, fold_w(T2VTurboPipeline.from_pretrained(tmp_path/"s").denoiser, 3.)(x, time, ctx).sample, 1e-5)
    near(styled, load_teacher(wan/"wan", teacher_lora=f"{style}=.8").denoiser(x, time, ctx).sample, 1e-5)
    near(plain, load_teacher(wan/"wan").denoiser(x, time, ctx).sample, 1e-5)
    near(alone, load_teacher(wan/"wan", teacher_lora=str(few)).denoiser(x, time, ctx).sample, 1e-5)      # our own files are read, too
    near(both, load_teacher(wan/"wan", teacher_lora=f"{style}=.8,{few}").denoiser(x, time, ctx).sample, 1e-5)
    for a, b in ((both, alone), (both, styled), (alone, plain), (styled, plain)): assert (a - b).norm() > .05*b.norm()
    fused = stock(wan, style, few)
    fused.fuse_lora(); fused.unload_lora_weights()
    near(fused.transformer(x, time, ctx).sample, both, 1e-5)


# Layers of Wan 2.1's published weights, as ComfyUI's `diffusion_model` has them; a LoRA of ComfyUI adds up @ down to `.weight` and `diff_b` to `.bias`.
WAN_LAYERS = ["time_embedding.0", "time_embedding.2", "time_projection.1", "text_embedding.0", "text_embedding.2", "head.head", *(
    f"blocks.{i}.{n}" for i in range(2) for n in ("ffn.0", "ffn.2", *(f"{a}_attn.{k}" for a in ("self", "cross") for k in "qkvo")))]


def test_the_names_of_comfyui(wan, tmp_path):
    student = louder(load_student(wan/"run/student"), tmp_path/"s")
    state, base = load_file(export_lora(student, tmp_path/"c", 3., comfyui=True)), load_teacher(wan/"wan", teacher_lora=f"{wan}/style=.8").denoiser
    assert {*state} == {f"diffusion_model.{n}.{k}" for n in WAN_LAYERS for k in ("lora_down.weight", "lora_up.weight", "diff_b")}
    want = fold_w(student.merged(), 3.).state_dict()
    for n, m in base.named_modules():
        if not isinstance(m, torch.nn.Linear) or n == "cond_proj": continue
        down, up, shift = (state[f"diffusion_model.{wan_name(n)}.{k}"] for k in ("lora_down.weight", "lora_up.weight", "diff_b"))
        torch.testing.assert_close(m.weight + up @ down, want[f"{n}.weight"], atol=1e-5, rtol=0)
        torch.testing.assert_close(m.bias + shift, want[f"{n}.bias"], atol=1e-5, rtol=0)


def test_a_full_student_of_a_style_is_known_by_its_own_weights(wan, tmp_path):
    "The fused files identify the frozen copy; what was trained has a fingerprint of its own, in training, saved and merged"
    style = f"{wan}/style/style.safetensors=.8"
    student = make_student(t := load_teacher(wan/"wan", teacher_lora=style), 0)
    fused, before = load_teacher(wan/"wan", teacher_lora=style).fingerprints(), t.fingerprints()
    assert student.fingerprints == fused and weights_ids(student.frozen) == fused
    def saved(name):
        save_student(student, tmp_path/name)
        return T2VTurboPipeline.from_pretrained(tmp_path/name).fingerprint()
    start = saved("a")
    with torch.no_grad():
        for p in student.trainable().values(): p.mul_(1.1)
    with student.as_teacher() as teacher: assert teacher.fingerprints() == fused
    assert before != t.fingerprints() != fused and weights_ids(student.merged()) == weights_ids(t.denoiser) != fused
    assert start != saved("b") and load_student(tmp_path/"b").fingerprints == fused


def test_a_run_and_a_cache_of_another_style_are_refused(wan, tmp_path, capsys):
    "Other strengths and other files; the same file in another place goes on, and so does a cache that no denoiser made"
    style, moved = wan/"style/style.safetensors", tmp_path/"moved.safetensors"
    moved.write_bytes(style.read_bytes())
    run = lambda lora, steps: (f"distill --teacher {wan}/wan {lora} --steps {steps} --batch 2 --rank 3 --lr 0.01 --w_min 3 --w_max 3 --beta_img 0 --beta_vid 0 "
                               f"--eval_every 0 --track= --dtype float32 --out {wan}/run").split()
    for lora in ("", f"--teacher_lora {style}=0.7"):
        said = refused(capsys, *run(lora, 3))
        assert f"was made with another teacher (teacher_lora '{style}=0.8', now" in said and "give the model and the LoRA files that the run began with" in said
    capsys.readouterr()
    assert cli.main(run(f"--teacher_lora {moved}=0.8", 3)) == 0 and "resumed at step 2 of 3" in capsys.readouterr().out
    cache = lambda kind, lora: f"cache {kind} {tmp_path}/{kind} --teacher {wan}/wan {lora} --samples 2 --batch 2 --dtype_of_teacher float32".split()
    assert cli.main(cache("pairs", f"--teacher_lora {style}=0.8")) == cli.main(cache("pairs", f"--teacher_lora {moved}=0.8")) == 0
    assert "denoiser" in refused(capsys, *cache("pairs", "")) and "denoiser" in refused(capsys, *cache("pairs", f"--teacher_lora {style}"))
    assert cli.main(cache("text", f"--teacher_lora {style}")) == cli.main(cache("text", "")) == 0


@pytest.mark.parametrize("words, says", [
    ("distill --teacher a/b --teacher_lora gone.safetensors", "no LoRA file 'gone.safetensors'"),
    ("cache text out --teacher a/b --teacher_lora style.pt", "LoRA 'style.pt' is not read, since formats other than safetensors can run code"),
    ("sample --teacher_lora style.safetensors=much", "give FILE or FILE=strength"),
    ("generate --teacher a/b --prompts x --teacher_lora gone.safetensors", "no LoRA file"),
    ("export student out --teacher_lora gone.safetensors", "no LoRA file"),
    ("export student out --form gguf", "form 'gguf': give one of folder, lora, comfyui"),
    ("export student out --w=-1", "w is -1.0: give a number from 0 on"),
    ("export student out --steps 99", "steps is 99: give 1 to 16")])
def test_bad_words_are_refused_before_anything_is_fetched(words, says, capsys, monkeypatch, tmp_path):
    "One sentence; the hub is never asked"
    def never(*args, **kw): raise AssertionError("something was fetched")
    for n in ("hub.fetch_folder", "hub.fetch_file", "teachers.folders.fetch_folder", "teachers.folders.hf_hub_download", "teachers.loading.fetch_file"):
        monkeypatch.setattr(f"t2v_turbo.{n}", never)
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, *words.split()) and not [*tmp_path.iterdir()]


def test_what_no_other_program_can_read(wan, folders, tmp_path, capsys):
    save_student(shaken(load_teacher(folders["ms"], frames=3)), tmp_path/"ms")
    for form in ("lora", "comfyui"):
        said = refused(capsys, "export", tmp_path/"ms", tmp_path/"out", "--form", form)
        assert f"--form {form} is for students of Wan" in said and "give --form folder" in said
    save_student(full := make_student(load_teacher(wan/"wan"), 0), tmp_path/"full")
    for form in ("lora", "comfyui"):
        said = refused(capsys, "export", tmp_path/"full", tmp_path/"out", "--form", form)
        assert f"--form {form} is for students with LoRA" in said and "was trained: give --form folder" in said
    with pytest.raises(UserError, match="has no LoRA, since every weight of it was trained"): export_lora(full, tmp_path/"out")
    said = refused(capsys, "export", wan/"wan", tmp_path/"out", "--form", "lora")
    assert "no student in" in said and not (tmp_path/"out").exists()
