"An exported student, loaded with stock diffusers only, gives the frames of our pipeline"
import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import LCMScheduler, TextToVideoSDPipeline, UNet3DConditionModel

from t2v_turbo import pipeline
from t2v_turbo.consistency import few_step_grid, w_embedding
from t2v_turbo.core import make_gen
from t2v_turbo.export import export_stock, fold_w
from t2v_turbo.files import UserError
from t2v_turbo.full import make_student
from t2v_turbo.pipeline import T2VTurboPipeline
from t2v_turbo.saved import save_student
from t2v_turbo.standins import tiny_modelscope, tiny_videocrafter2
from t2v_turbo.student import Student
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.teachers.videocrafter2 import convert_videocrafter2


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
