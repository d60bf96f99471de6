"SANA-Video: the stock pipeline's numbers with random weights, one run of the commands, and the folders that are refused"
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaVideoPipeline
from torch.testing import assert_close

from t2v_turbo.cli import main
from t2v_turbo.consistency import w_embedding
from t2v_turbo.core import make_gen
from t2v_turbo.files import UserError
from t2v_turbo.memory import save_memory
from t2v_turbo.pipeline import T2VTurboPipeline, sample_student
from t2v_turbo.saved import load_student
from t2v_turbo.solver import DDIM, ddim_sample
from t2v_turbo.standins import tiny_sana
from t2v_turbo.student import Student
from t2v_turbo.teachers.folders import defaults_of, load_teacher
from t2v_turbo.teachers.sana import INSTRUCTION, GuidedSana, SanaTeacher

SIZES = dict(frames=9, size=(32, 64))
CALL = dict(frames=9, height=32, width=64, use_resolution_binning=False)
PROMPTS = ["  A red Cat", "a dog & a HORSE run"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tiny_sana(tmp_path_factory.mktemp("sana") / "sana")


@pytest.fixture
def teacher(folder): return load_teacher(folder, **SIZES)


@pytest.fixture
def stock(folder):
    pipe = SanaVideoPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_as_short_as_promised():
    notebook = json.loads((Path(__file__).parents[1] / "nbs/27_sana.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    lines = [l for s in cells if s.startswith("#| export") for l in s.splitlines() if l.strip() and not l.lstrip().startswith("#")]
    assert 50 < len(lines) <= 100 and max(map(len, lines)) <= 100


def test_folder_has_the_published_classes_and_keys(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert {k: v[1] for k, v in index.items() if isinstance(v, list)} == dict(
        scheduler="DPMSolverMultistepScheduler", text_encoder="Gemma2Model", tokenizer="GemmaTokenizer",
        transformer="SanaVideoTransformer3DModel", vae="AutoencoderKLWan")
    published = {"attention_bias", "attention_head_dim", "caption_channels", "cross_attention_dim", "cross_attention_head_dim", "dropout",
                 "guidance_embeds", "guidance_embeds_scale", "in_channels", "interpolation_scale", "mlp_ratio", "norm_elementwise_affine",
                 "norm_eps", "num_attention_heads", "num_cross_attention_heads", "num_layers", "out_channels", "patch_size", "qk_norm",
                 "rope_max_seq_len", "sample_size"}                     # of the hub's transformer/config.json
    assert published <= json.loads((folder / "transformer/config.json").read_text()).keys()


def test_its_own_numbers(folder):
    t = load_teacher(folder)
    assert type(t) is SanaTeacher and (t.video_shape, t.latent_shape, t.fps, t.tokens) == ((3, 81, 480, 832), (16, 21, 60, 104), 16, 300)
    assert_close(t.schedule.shift, 8., atol=1e-3, rtol=0)
    assert defaults_of(str(folder)) == defaults_of(t) and defaults_of(t).guidance == 5.


@pytest.mark.parametrize("more, says", [(dict(frames=80), "the nearest is 81"), (dict(size=(480, 848)), "multiples of 32, the nearest is 480x864"),
                                        (dict(size=(40, 64)), "nearest is 32x64|nearest is 48x64"), (dict(fps=.5), "fps 0.5 is not possible")])
def test_clips_that_sana_cannot_take(folder, more, says):
    with pytest.raises(UserError, match=says) as e: load_teacher(folder, **more)
    assert "\n" not in str(e.value)


def edited(folder, at, file, **more):
    shutil.copytree(folder, at)
    (at / file).write_text(json.dumps(json.loads((at / file).read_text()) | more))
    return at


@pytest.mark.parametrize("file, more, says", [
    ("vae/config.json", dict(_class_name="AutoencoderKLLTX2Video"), "is not SANA-Video 2B at 480p .VAE AutoencoderKLLTX2Video, "),
    ("transformer/config.json", dict(guidance_embeds=True), "guidance_embeds True.: give a copy of Efficient-Large-Model/SANA-Video_2B_480p"),
    ("transformer/config.json", dict(_class_name="SanaVideoCausalTransformer3DModel"), "SanaVideoCausalTransformer3DModel, which is no teacher here"),
    ("scheduler/scheduler_config.json", dict(use_flow_sigmas=False), "is no scheduler of a flow")])
def test_other_models_of_the_family_are_refused(folder, tmp_path, file, more, says):
    with pytest.raises(UserError, match=says): load_teacher(edited(folder, tmp_path / "other", file, **more), **SIZES)


# ---- the stock pipeline's numbers

def test_network_is_its_parent_plus_w(teacher, stock):
    net, own = stock.transformer, teacher.denoiser
    z, ctx, t = torch.randn(2, *teacher.latent_shape, generator=make_gen(0)), torch.randn(2, 7, 32, generator=make_gen(1)), torch.tensor([990., 40.])
    mask = torch.tensor([[1]*7, [1]*3 + [0]*4])
    with torch.no_grad():
        want = net(z, ctx, t, encoder_attention_mask=mask).sample
        for w in (None, w_embedding(torch.tensor([2., 6.]))): assert_close(own(z, t, ctx*mask[..., None], w).sample, want, atol=0, rtol=0)
        assert (net(z, ctx, t).sample - want)[1].abs().max() > 1e-4           # the mask matters
        own.time_embed.cond_proj.weight.normal_(std=.1, generator=make_gen(2))
        assert (own(z, t, ctx*mask[..., None], w).sample - want).abs().amax((1, 2, 3, 4)).min() > 1e-3
        for i in range(2):                                       # w as a bias of the second time layer of a stock network
            last = net.time_embed.emb.timestep_embedder.linear_2
            bias = last.bias.clone()
            last.bias += own.time_embed.cond_proj(w[i])
            assert_close(net(z, ctx, t, encoder_attention_mask=mask).sample[i], own(z, t, ctx*mask[..., None], w).sample[i], atol=1e-5, rtol=0)
            last.bias.copy_(bias)


@pytest.mark.parametrize("prompt", [*PROMPTS, "a " * 200])
@pytest.mark.filterwarnings("ignore:the prompt")
def test_text_is_that_of_the_stock_pipeline(teacher, stock, prompt):
    ctx, null = teacher.encode_text([prompt, ""])                      # both kinds in one batch
    want, mask, want_null, null_mask = stock.encode_prompt(prompt, complex_human_instruction=INSTRUCTION.split("\n"))
    for got, hidden, m in ((ctx, want, mask), (null, want_null, null_mask)):
        assert_close(got, (hidden*m[..., None])[0], atol=1e-5, rtol=0)
        assert (got != 0).any(-1).sum() == m.sum()
    assert ctx.shape == (300, 32) and (null != 0).any(-1).sum() == 1   # <bos>
    assert teacher.tokenizer.padding_side == "right"                   # Gemma's own is left


def test_a_long_prompt_is_named(teacher):
    with pytest.warns(UserWarning, match="^the prompt 'a bb.* takes 299"): teacher.encode_text(["A " + "b"*400])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher.encode_text(["a cat", ""])


@pytest.mark.parametrize("published", [True, False], ids=["DPM-Solver", "Euler"])
def test_latents_and_frames_of_the_stock_pipeline(teacher, stock, published):
    n, w, start = 4, 5., torch.randn(2, *teacher.latent_shape, generator=make_gen(3))
    ctx, null = teacher.encode_text(PROMPTS), teacher.encode_text([""]*2)
    more, scheduler = dict(num_inference_steps=n), stock.scheduler
    if not published:
        stock.scheduler, more = FlowMatchEulerDiscreteScheduler(shift=8.), dict(sigmas=(torch.arange(n, 0, -1)/n).tolist())
    theirs = [stock(PROMPTS, latents=start.clone(), guidance_scale=1 + w, output_type=k, **CALL, **more).frames for k in ("latent", "pt")]
    with torch.no_grad():
        if published:                                              # its multistep solver, with integer times
            scheduler.set_timesteps(n)
            x0 = start
            for s in scheduler.timesteps:
                yes, no = (teacher.denoiser(x0, s.expand(2), c).sample for c in (ctx, null))
                x0 = scheduler.step(no + (1 + w)*(yes - no), s, x0, return_dict=False)[0]
        else: *_, (_, _, x0) = ddim_sample(DDIM(teacher.schedule, n), teacher.denoise, start, w, ctx, null)
        assert_close(x0, theirs[0], atol=1e-4, rtol=1e-4)
        assert_close(teacher.decode(x0), theirs[1].transpose(1, 2), atol=1e-3, rtol=0)


# ---- the recipe

def test_lora_goes_to_linear_layers_and_points(teacher):
    names = set(teacher.lora_targets())
    assert {"transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn2.to_out.0", "transformer_blocks.0.ff.conv_inverted",
            "transformer_blocks.0.ff.conv_point", "time_embed.emb.timestep_embedder.linear_2", "time_embed.linear", "proj_out"} <= names
    assert not {n for n in names if n.endswith(("conv_depth", "conv_temp", "patch_embedding", "cond_proj"))}


def test_little_memory_same_gradient(folder):
    def gradient(saved):
        student = Student(load_teacher(folder, **SIZES), 2)
        for p in student.trainable().values(): torch.nn.init.normal_(p, std=.1, generator=make_gen(p.numel()))
        if saved: save_memory(student.teacher)
        t = student.teacher
        z, ctx = torch.randn(1, *t.latent_shape, generator=make_gen(0)), t.encode_text(["a cat"])
        out = student(z, torch.tensor([700]), ctx, torch.tensor([4.]))
        return torch.autograd.grad((out**2).sum(), [*student.trainable().values()])
    plain, saved = gradient(False), gradient(True)
    assert all(g.any() for g in plain)
    for a, b in zip(saved, plain): assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_spares_gemma(folder, teacher, dtype):
    half = load_teacher(folder, dtype=dtype, **SIZES)
    assert half.denoiser.dtype == dtype and half.text_encoder.dtype == half.vae.dtype == torch.bfloat16
    z, t = torch.randn(1, *half.latent_shape, generator=make_gen(0)), torch.tensor([700])
    x0, want = (m.denoise(z, t, m.encode_text(["a cat"]), w_embedding(torch.ones(1)))[0] for m in (half, teacher))
    assert x0.dtype == torch.float32 and (x0 - want).norm() < .05*want.norm()
    assert half.decode(half.encode(torch.rand(1, *half.video_shape))).dtype == torch.float32


def test_commands(folder, tmp_path, monkeypatch):
    "Two steps; clips; the student again, as a pipeline and as a saved pipeline; another teacher is refused"
    monkeypatch.chdir(tmp_path)
    small = ["--reward", "tiny-image,tiny-video", "--frames", "9", "--height", "32", "--width", "32", "--image_frames", "1"]
    assert main(["distill", "--teacher", str(folder), *small, "--rank", "2", "--batch", "1", "--steps", "2", "--eval_every", "0", "--track", "",
                 "--vocabulary", "", "--out", "run"]) == 0
    assert main(["sample", "--student", "run/student", "--prompt", "a cat", "--dtype", "bfloat16", "--out", "videos"]) == 0
    assert sorted(p.suffix for p in (tmp_path / "videos").iterdir()) == [".csv", ".mp4"]
    student = load_student("run/student")
    assert type(student.teacher) is SanaTeacher and student.w_projection.weight.any()
    assert student.fingerprints == load_teacher(folder, frames=9, size=(32, 32)).fingerprints()
    want = sample_student(student, ["a cat"], make_gen(0), steps=4, w=3.)
    pipe = T2VTurboPipeline.from_student(student)
    pipe.save_pretrained("pipe")
    for p in (pipe, T2VTurboPipeline.from_pretrained("pipe"), T2VTurboPipeline.from_pretrained("run/student")):
        assert type(p.denoiser) is GuidedSana
        frames = p("a cat", guidance_scale=3., generator=make_gen(0), output_type="pt").frames
        assert_close(frames.transpose(1, 2), want, atol=1e-3, rtol=0)
    with pytest.raises(UserError, match="belongs to another teacher"):
        load_student("run/student", load_teacher(tiny_sana(tmp_path / "b", seed=1), frames=9, size=(32, 32)))


def test_minimum_diffusers_has_the_class():
    "The network has been in diffusers since 0.36, so the package needs no newer version than it names"
    about = (Path(__file__).parents[1] / "settings.ini").read_text()
    least = next(w for w in about.split() if w.startswith("diffusers>="))
    assert [int(n) for n in least.removeprefix("diffusers>=").split(".")[:2]] >= [0, 36]
