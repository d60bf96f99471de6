"Sampling as published, from any folder: timesteps, guidance, the frames that are decoded, precision, memory"
import json

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from t2v_turbo.cli import run
from t2v_turbo.consistency import consistency_fn, few_step_grid, w_embedding
from t2v_turbo.core import make_gen
from t2v_turbo.files import UserError
from t2v_turbo.pipeline import T2VTurboPipeline
from t2v_turbo.saved import load_student, save_student
from t2v_turbo.standins import tiny_modelscope, tiny_videocrafter2
from t2v_turbo.student import Student
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.teachers.published import (
    convert_lora,
    convert_merged,
    layer_shapes,
    load_unet,
    with_w_projection,
)
from t2v_turbo.teachers.videocrafter2 import convert_videocrafter2
from t2v_turbo.train import Config, Trainer
from t2v_turbo.using import SampleOptions, sample

SMALL = dict(size=(16, 24), frames=3)


def random_list(unet, base, gen):
    out = []
    for o, i, *k in layer_shapes(unet, base).values():
        r = min(8, o, i)
        out += [.1*torch.randn(o, r, *[1]*len(k), generator=gen),
                torch.randn(r, i, *k, generator=gen)/r]
    return out


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    "Bases, published files and what `convert` makes of them: `ms`, `vc2`, and their students"
    at = tmp_path_factory.mktemp("t")
    state = tiny_videocrafter2()
    torch.save(dict(state_dict=state), at/"model.ckpt")
    (at/"merges.txt").write_text("#version\np a\npa n\npan d\npand a</w>\na n\nan d</w>\n")
    convert_videocrafter2(at/"model.ckpt", at/"vc2", 16, at/"merges.txt")
    tiny_modelscope(at/"ms")
    for base in ("ms", "vc2"):
        path = at/f"{base}.pt"
        torch.save(random_list(with_w_projection(load_unet(at/base)), base, make_gen(1)), path)
        convert_lora(path, at/base, at/f"{base} adapters", base, w_projection=3)
        convert_lora(path, at/base, at/f"{base} whole", base, merged=True, w_projection=3)
    pre = "model.diffusion_model."
    turbo = {k.removeprefix(pre): v for k, v in state.items() if k.startswith(pre)}
    turbo["time_cond_proj.weight"] = torch.randn(32, 256, generator=make_gen(2))
    torch.save(turbo, at/"turbo.pt")
    convert_merged(at/"turbo.pt", at/"vc2", at/"vc2 merged", 8)
    return at


def open_pipe(folder, **more):
    pipe = T2VTurboPipeline.from_pretrained(folder, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", ["ms adapters", "ms whole", "vc2 whole", "vc2 merged"])
def test_any_converted_folder(at, name):
    more = SMALL if "vc2" in name and "adapters" not in name else {}
    pipe = open_pipe(at/name, **more)
    shape = (2, 3, 3, 16, 24) if more else (2, 16, 3, 32, 32)
    out = pipe(["a panda", "an"], generator=make_gen(0), output_type="pt").frames
    assert out.shape == shape and out.isfinite().all() and 0 <= out.min() < out.max() <= 1
    assert pipe.config.fps == (8 if "merged" in name or "ms" in name else 16)


@pytest.mark.parametrize("base", ["ms", "vc2"])
def test_adapters_are_the_whole_model(at, base):
    "Clamped ranks, the w-projection, and for vc2 the bias with the frame rate come back from adapters"
    student = load_student(at/f"{base} adapters")
    a, b = student.merged().state_dict(), load_unet(at/f"{base} whole").state_dict()
    assert set(a) == set(b)
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-5, msg=k)


def test_adapters_at_another_frame_rate_and_saved_again(at, tmp_path):
    convert_lora(at/"vc2.pt", at/"vc2", tmp_path/"s", fps=8)
    convert_lora(at/"vc2.pt", at/"vc2", tmp_path/"w", fps=8, merged=True)
    student = load_student(tmp_path/"s")
    assert student.teacher.fps == 8
    save_student(student, tmp_path/"again")
    a, b = load_student(tmp_path/"again").merged().state_dict(), load_unet(tmp_path/"w").state_dict()
    for k in b: torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-5, msg=k)


def test_a_lora_on_another_base_is_refused(at, tmp_path):
    told = json.loads((at/"ms adapters/student.json").read_text())
    assert told["teacher"] == str((at/"ms").resolve())
    other = load_teacher(tiny_modelscope(tmp_path/"other", 5))
    with pytest.raises(UserError, match="belongs to another teacher"): load_student(at/"ms adapters", other)


def test_a_teacher_is_no_student(at):
    for n in ("ms", "vc2"):
        with pytest.raises(UserError, match="holds a teacher"): open_pipe(at/n)


@pytest.mark.parametrize("origin, want", [
    (50, {1: [999], 2: [999, 499], 4: [999, 759, 519, 279], 8: [*range(999, 158, -120)]}),
    (200, {1: [999], 2: [999, 499], 4: [999, 749, 499, 249], 8: [*range(999, 123, -125)]})])
def test_timesteps_of_both_origin_grids(at, origin, want):
    pipe, seen = open_pipe(at/"ms whole", frames=2), []
    for n, steps in want.items():
        seen.clear()
        pipe("a", n, origin_steps=origin, generator=make_gen(0),
             callback_on_step_end=lambda p, i, t, kw: seen.append(int(t)))
        assert seen == steps == few_step_grid(n, origin)
    assert few_step_grid(16, 50) == few_step_grid(16, 200) == [999 - 60*i for i in range(16)]


@torch.no_grad()
def test_guidance_is_embedded_as_it_is_and_the_last_denoised_is_decoded(at):
    pipe = open_pipe(at/"ms whole", frames=2)
    model, z, t = pipe.as_teacher(), torch.randn(1, 4, 2, 4, 4, generator=make_gen(0)), torch.tensor([999])
    emb, ctx, steps = w_embedding(torch.tensor([7.5])), model.encode_text(["a"]), []
    one = consistency_fn(z, model.denoise(z, t, ctx, emb)[0], t)
    torch.testing.assert_close(pipe("a", 1, 7.5, latents=z, output_type="latent").frames, one)
    pixels = pipe("a", 1, 7.5, latents=z, output_type="pt").frames
    torch.testing.assert_close(pixels, model.decode(one).transpose(1, 2), rtol=1e-3, atol=1e-4)
    last = pipe("a", 4, 7.5, generator=make_gen(1), output_type="latent",
                callback_on_step_end=lambda p, i, t, kw: steps.append(kw["denoised"])).frames
    assert torch.equal(last, steps[-1]) and len(steps) == 4


@pytest.mark.parametrize("name, dtype", [("ms whole", torch.bfloat16), ("ms adapters", torch.float16),
                                         ("vc2 merged", torch.bfloat16)])
def test_half_precision(at, name, dtype):
    more = SMALL if "vc2" in name else {}
    half, full = open_pipe(at/name, dtype=dtype, **more), open_pipe(at/name, **more)
    for part in (half.denoiser, half.vae, half.text_encoder):
        assert {p.dtype for p in part.parameters()} == {dtype}
    a, b = (p("a panda", 2, generator=make_gen(0), output_type="pt").frames for p in (half, full))
    assert a.dtype == torch.float32 and a.isfinite().all()
    assert (a - b).abs().mean() < .05


class Watch(ModelHook):
    "What offloading puts on a network: told before each use"
    execution_device = torch.device("cpu")
    def __init__(self, seen, name): self.seen, self.name = seen, name

    def pre_forward(self, module, *args, **kwargs):
        self.seen.append(self.name)
        return args, kwargs


def test_every_use_of_a_network_passes_the_offloading_hooks(at, monkeypatch):
    "In the order of `model_cpu_offload_seq`; and sampling itself moves no weights"
    pipe, seen = open_pipe(at/"ms whole", frames=2), []
    want = pipe("a", 2, generator=make_gen(0), output_type="pt").frames
    for n in ("text_encoder", "denoiser", "vae"):
        add_hook_to_module(getattr(pipe, n), Watch(seen, n))
    def moved(self, *args, **kwargs): raise AssertionError(f"{type(self).__name__} was moved")
    monkeypatch.setattr(torch.nn.Module, "to", moved)
    torch.testing.assert_close(pipe("a", 2, generator=make_gen(0), output_type="pt").frames, want)
    assert list(dict.fromkeys(seen)) == pipe.model_cpu_offload_seq.split("->")


def test_vae_slicing(at, monkeypatch):
    pipe = open_pipe(at/"ms whole", frames=3)
    want = pipe("a", 1, generator=make_gen(0), output_type="pt").frames
    pipe.vae.enable_slicing()
    sizes, plain = [], pipe.vae.decoder.forward
    monkeypatch.setattr(pipe.vae.decoder, "forward", lambda z, *a: sizes.append(len(z)) or plain(z, *a))
    torch.testing.assert_close(pipe("a", 1, generator=make_gen(0), output_type="pt").frames, want, rtol=1e-4, atol=1e-5)
    assert sizes == [1, 1, 1]


def test_sizes_of_the_call(at):
    pipe = open_pipe(at/"ms whole", frames=2)
    assert pipe("a", 1, num_frames=3, height=24, width=40, output_type="pt").frames.shape == (1, 3, 3, 24, 40)
    with pytest.raises(UserError, match="nearest is 24x40"): pipe("a", 1, height=25, width=40)
    with pytest.raises(UserError, match="num_frames -1"): pipe("a", 1, num_frames=-1)


def test_prompts_of_a_file(at, tmp_path):
    "One video a line; a video does not depend on the lines after it; all options reach the pipeline"
    (tmp_path/"p.txt").write_text("a panda\n\nan\n")
    more = dict(student=str(at/"ms whole"), steps=2, w=7.5, format="gif")
    paths = sample(SampleOptions(prompts=str(tmp_path/"p.txt"), out=str(tmp_path/"a"), **more))
    assert [p.name for p in paths] == ["000-a-panda.gif", "001-an.gif"]
    one, = sample(SampleOptions(prompt="a panda", out=str(tmp_path/"b"), slicing=1, offload=1, **more))
    assert one.read_bytes() == paths[0].read_bytes()
    v2, = sample(SampleOptions(prompt="a panda", out=str(tmp_path/"c"), origin=200, dtype="bfloat16",
                               **more | dict(steps=4)))
    assert v2.stat().st_size > 100
    with pytest.raises(UserError, match="float16"): SampleOptions(dtype="int8")


def test_a_pipeline_that_was_saved_comes_back(at, tmp_path):
    pipe = open_pipe(at/"vc2 whole", **SMALL, fps=8)
    pipe.save_pretrained(tmp_path/"p")
    again = open_pipe(tmp_path/"p")
    assert (again.config.height, again.config.width, again.config.num_frames, again.config.fps) == (16, 24, 3, 8)
    a, b = (p("an", 2, generator=make_gen(0), output_type="pt").frames for p in (pipe, again))
    torch.testing.assert_close(a, b)


def test_a_scaled_process_is_no_pipeline(at):
    teacher = load_teacher(at/"vc2", scale_x0=True, **SMALL)
    with pytest.raises(UserError, match="sample_student"): T2VTurboPipeline.from_student(Student(teacher, 2))


@pytest.mark.parametrize("base, more", [("ms", {}), ("vc2", dict(height=16, width=16, frames=4, fps=8))])
def test_distill_and_sample_commands(at, tmp_path, base, more):
    "One real optimisation step on a folder, then four steps of sampling from what it wrote"
    words = ["distill", "--teacher", str(at/base), "--out", str(tmp_path/"run"), "--steps", "1",
             "--batch", "1", "--rank", "2", "--beta_img", "0", "--beta_vid", "0", "--eval_every", "0"]
    for k, v in more.items(): words += [f"--{k}", str(v)]
    assert run(words)["student"] == str(tmp_path/"run/student")
    log = json.loads((tmp_path/"run/log.jsonl").read_text())
    assert log["step"] == 1 and log["grad_norm"] > 0
    path, = run(["sample", "--student", str(tmp_path/"run/student"), "--prompt", "an", "--out",
                 str(tmp_path/"v"), "--steps", "4"])
    assert path.stat().st_size > 100
    told = json.loads((tmp_path/"run/student/student.json").read_text())
    assert told["options"] == ({} if base == "ms" else dict(size=[16, 16], frames=4, fps=8))


def test_the_tiny_world_is_square(at, tmp_path):
    with pytest.raises(UserError, match="square"): Trainer(Config(teacher=str(at/"vc2"), reward="tiny-image,tiny-video", out=str(tmp_path/"r")))
    with pytest.raises(UserError, match="nearest is"): Trainer(Config(teacher=str(at/"ms"), reward="tiny-image,tiny-video", height=33, width=32))
