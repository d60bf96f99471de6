"What a diffusers user writes out of habit is used, or refused by name; nothing is ignored, and no NaN becomes a black video"
import math

import numpy as np
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image

from t2v_turbo.core import as_dtype, check_finite, make_gen, pick_dtype, write_video
from t2v_turbo.files import UserError
from t2v_turbo.pipeline import (
    T2VTurboPipeline,
    UnknownOption,
    captions,
    sample_student,
    sample_teacher,
)
from t2v_turbo.saved import load_student, save_student, student_id
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.teachers.tiny import WEIGHTS

A, B = "a red fish moving left in the sea", "a green cat growing in the meadow"


def opened(*args, **kwargs):
    pipe = T2VTurboPipeline.from_pretrained(*args, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(): return opened(WEIGHTS/"tiny-cd")


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("p")/"pipe"
    pipe.save_pretrained(folder)
    return folder


def latent(pipe, *args, seed=0, **more):
    args = args or (() if "prompt_embeds" in more else (A,))
    return pipe(*args, generator=make_gen(seed), output_type="latent", **more).frames


# --- callbacks -------------------------------------------------------------------------------------

def at(i, change):
    return lambda pipe, step, t, k: change(k) if step == i else {}


@pytest.mark.parametrize("name", ["latents", "denoised"])
@pytest.mark.parametrize("i", [0, 2, 3])
@pytest.mark.parametrize("in_place", [False, True])
def test_what_a_callback_changes_counts(pipe, name, i, in_place):
    def change(k): return k[name].mul_(.5) and None if in_place else {name: .5*k[name]}
    def change_in_place(k): k[name].mul_(.5)
    got, plain = latent(pipe, callback_on_step_end=at(i, change_in_place if in_place else change)), latent(pipe)
    assert not torch.equal(got, plain)
    if i == 3: torch.testing.assert_close(got, .5*plain)


def test_a_new_denoised_is_noised_as_the_old_one_was(pipe):
    "Its own values change nothing, to the bit; and what is returned unchanged changes nothing either"
    plain = latent(pipe)
    assert torch.equal(latent(pipe, callback_on_step_end=lambda p, i, t, k: k), plain)
    assert torch.equal(latent(pipe, callback_on_step_end=lambda p, i, t, k: {n: v.clone() for n, v in k.items()}), plain)
    seen = {}
    def swap(p, i, t, k):
        seen[i] = {n: v.clone() for n, v in k.items()}
        return {"denoised": torch.zeros_like(k["denoised"])} if i == 0 else {}
    latent(pipe, callback_on_step_end=swap, num_inference_steps=2)
    noise, abar = seen[0]["latents"], pipe.as_teacher().schedule.abar[499]
    eps = (noise - abar.sqrt()*seen[0]["denoised"])/(1 - abar).sqrt()
    x0 = pipe.as_teacher()
    z = (1 - abar).sqrt()*eps                                # of the zeros, with the same noise
    t, ctx = torch.tensor([499]), x0.encode_text([A])
    from t2v_turbo.consistency import consistency_fn, w_embedding
    with torch.no_grad(): want = consistency_fn(z, x0.denoise(z, t, ctx, w_embedding(torch.tensor([pipe.config.guidance_scale])))[0], t)
    torch.testing.assert_close(seen[1]["denoised"], want, rtol=1e-3, atol=1e-3)


def test_interrupt(pipe):
    "The last denoised is the result; the next call runs to its end"
    seen = []
    def stop(p, i, t, k): seen.append(k["denoised"].clone()); p._interrupt = i == 1
    assert torch.equal(latent(pipe, callback_on_step_end=stop), seen[-1]) and len(seen) == 2 and pipe.interrupt
    latent(pipe, callback_on_step_end=lambda p, i, t, k: seen.append(i))
    assert seen[2:] == [0, 1, 2, 3] and not pipe.interrupt


def test_inputs_of_callbacks(pipe):
    seen = []
    latent(pipe, callback_on_step_end=lambda p, i, t, k: seen.append(set(k)), callback_on_step_end_tensor_inputs=["latents"])
    assert seen == [{"latents"}]*4
    note = lambda p, i, t, k: None
    with pytest.raises(UserError, match="has 'prompt_embeds': give any of latents, denoised"):
        latent(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    with pytest.raises(UserError, match="has 'prompt_embeds'"): latent(pipe, callback_on_step_end=SDCFGCutoffCallback())
    with pytest.raises(UserError, match="give a function"): latent(pipe, callback_on_step_end=3)
    for bad, said in ((dict(noise=1), r"returned \['noise'\]"), (torch.ones(2), "give a dict"),
                      (dict(latents=torch.ones(2)), r"latents of callback_on_step_end is \(2,\)"), (dict(latents=0), "is int")):
        with pytest.raises(UserError, match=said): latent(pipe, callback_on_step_end=lambda p, i, t, k: bad)


# --- what is given -----------------------------------------------------------------------------------

def test_generators(pipe):
    gens = lambda *seeds: [make_gen(s) for s in seeds]
    both = latent_of = lambda prompts, g, **k: pipe(prompts, 2, generator=g, output_type="latent", **k).frames
    pair = both([A, B], gens(1, 2))
    torch.testing.assert_close(latent_of(B, gens(2)), pair[1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latent_of(B, tuple(gens(2))), pair[1:], rtol=1e-4, atol=1e-4)
    for prompts, n in (([A, B], 3), ([A, B, A], 2), (A, 2), ([A, B], 1), ([A, B], 0)):
        with pytest.raises(UserError, match=f"{n} generators for {1 if prompts == A else len(prompts)} clips"): both(prompts, gens(*range(n)))
    for bad in (0, [0], ["cpu", "cpu"], np.random.default_rng(0)):
        with pytest.raises(UserError, match="no torch.Generator"): both([A, B], bad)


def test_videos_per_prompt(pipe):
    "Copies of a prompt lie side by side, each with noise of its own"
    got = pipe([A, B], 2, generator=[make_gen(i) for i in range(4)], num_videos_per_prompt=2, output_type="latent").frames
    alone = [pipe(p, 2, generator=make_gen(i), output_type="latent").frames for i, p in enumerate((A, A, B, B))]
    torch.testing.assert_close(got, torch.cat(alone), rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="num_videos_per_prompt is 0"): pipe(A, num_videos_per_prompt=0)
    with pytest.raises(UserError, match="2 generators for 4 clips"): pipe([A, B], generator=[make_gen(0)]*2, num_videos_per_prompt=2)


def test_prompt_embeds(pipe):
    ctx = pipe.as_teacher().encode_text([A, B])
    torch.testing.assert_close(latent(pipe, prompt_embeds=ctx), latent(pipe, [A, B]))
    torch.testing.assert_close(latent(pipe, prompt_embeds=ctx.half(), prompt=None), latent(pipe, [A, B]), rtol=.1, atol=.1)
    for bad in (ctx[0], ctx[..., 1:], ctx[:, 1:], "a", [1.]):
        with pytest.raises(UserError, match="prompt_embeds is .* give a tensor of shape"): pipe(prompt_embeds=bad)
    for more in (dict(), dict(prompt=A, prompt_embeds=ctx)):
        with pytest.raises(UserError, match="either prompt or prompt_embeds"): pipe(**more)


def test_embeds_without_a_text_encoder(saved, pipe):
    bare = opened(saved, text_encoder=None, tokenizer=None)
    torch.testing.assert_close(latent(bare, None, prompt_embeds=pipe.as_teacher().encode_text([A])), latent(pipe))


def test_latents(pipe):
    z = torch.randn(1, *pipe.as_teacher().latent_shape, generator=make_gen(3))
    assert torch.equal(latent(pipe, latents=z), latent(pipe, latents=z.clone()))
    for bad in (z[0], z.repeat(2, 1, 1, 1, 1), z[:, :, 1:], 3):
        with pytest.raises(UserError, match=r"latents is .* give a tensor of shape \(1, 16, 8, 8, 8\)"): latent(pipe, latents=bad)


@pytest.mark.parametrize("bad, said", [([], "list of prompts is empty"), ((), "is empty"), (3, "prompt is 3"), ([A, 3], "prompt 3 is no text"),
                                       ([None], "prompt None is no text"), ([[A]], "is no text")])
def test_prompts(pipe, bad, said):
    for call in (pipe, captions):
        with pytest.raises(UserError, match=said): call(bad)
    with pytest.raises(UserError, match=said): sample_teacher(load_teacher("tiny"), bad, make_gen(0), 1)
    with pytest.raises(UserError, match=said): sample_student(load_student(WEIGHTS/"tiny-cd"), bad, make_gen(0), 1)


def test_one_caption_is_a_list_of_one():
    teacher = load_teacher("tiny")
    torch.testing.assert_close(*(sample_teacher(teacher, p, make_gen(0), 1) for p in (A, [A])))


@pytest.mark.parametrize("more, said", [
    (dict(num_inference_steps=0), "num_inference_steps is 0: give 1 to 16"), (dict(num_inference_steps=4.), "is 4.0: give 1 to 16"),
    (dict(num_inference_steps="4"), "is '4'"), (dict(num_inference_steps=8, origin_steps=5), "has 5 timesteps: give 1 to 5"),
    (dict(origin_steps=0), "origin_steps is 0"), (dict(guidance_scale=-1), "negative"), (dict(guidance_scale=math.nan), "nan is negative or no number"),
    (dict(guidance_scale="2"), "no number"), (dict(guidance_scale=math.inf), "no number"), (dict(output_type="tensor"), "output_type 'tensor': give one of np, pil, pt, latent")])
def test_numbers(pipe, more, said):
    with pytest.raises(UserError, match=said): pipe(A, **more)


@pytest.mark.parametrize("name, said", [
    ("negative_prompt", "guidance is distilled"), ("negative_prompt_embeds", "guidance is distilled"), ("guidance_rescale", "unguided"),
    ("timesteps", "give num_inference_steps"), ("sigmas", "give num_inference_steps"), ("eta", "always fresh"),
    ("cross_attention_kwargs", "LoRA is folded"), ("attention_kwargs", "LoRA"), ("clip_skip", "last layer"), ("callback", "callback_on_step_end"),
    ("callback_steps", "callback_on_step_end"), ("num_images_per_prompt", "num_videos_per_prompt"), ("fps", "export_to_video")])
def test_words_of_other_pipelines(pipe, name, said):
    with pytest.raises(UserError, match=f"takes no {name}: .*{said}"): pipe(A, **{name: 1})
    assert pipe(A, 1, **{name: None}).frames.shape == (1, 8, 64, 64, 3)           # nothing was asked for


def test_unknown_words(pipe, saved):
    with pytest.raises(UnknownOption, match="takes no nonsense: no such keyword; known are prompt, num_inference_steps"): pipe(A, nonsense=None)
    with pytest.raises(TypeError, match="nonsense"): pipe(A, nonsense=1)
    for folder in (WEIGHTS/"tiny-cd", saved):
        with pytest.raises(TypeError, match="takes no nonsense: no such keyword; known are dtype"): opened(folder, nonsense=1)
        for name in ("device_map", "revision", "token", "cache_dir", "quantization_config", "custom_pipeline", "safety_checker"):
            with pytest.raises(UserError, match=f"takes no {name}: "): opened(folder, **{name: "x"})
            assert opened(folder, **{name: None})
        with pytest.raises(UserError, match="takes no use_safetensors"): opened(folder, use_safetensors=False)
        assert opened(folder, use_safetensors=True, low_cpu_mem_usage=True)
    with pytest.raises(UserError, match="takes no vae"): opened(WEIGHTS/"tiny-cd", vae=None, scheduler=1)


# --- precision ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("where", ["student", "saved"])
def test_dtype_by_either_name(saved, where):
    folder = dict(student=WEIGHTS/"tiny-cd", saved=saved)[where]
    for more in (dict(dtype=torch.bfloat16), dict(torch_dtype=torch.bfloat16), dict(dtype="bfloat16"), dict(dtype=torch.bfloat16, torch_dtype=torch.bfloat16)):
        pipe = opened(folder, **more)
        for net in (pipe.vae, pipe.text_encoder): assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
        assert pipe.denoiser.blocks[0].down.weight.dtype == torch.bfloat16
    assert opened(folder, dtype="auto").vae.dtype == pick_dtype()
    with pytest.raises(UserError, match="give one of them"): opened(folder, dtype=torch.float16, torch_dtype=torch.bfloat16)
    for bad in ("int8", 8, torch.int8, dict(vae=torch.float16)):
        with pytest.raises(UserError, match="give auto, float32, bfloat16, float16"): opened(folder, dtype=bad)


def test_native_precision(monkeypatch):
    assert pick_dtype("cpu") == pick_dtype("mps") == torch.float32
    for capability, want in (((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((8, 9), torch.bfloat16), ((7, 5), torch.float16), ((7, 0), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        assert pick_dtype("cuda") == want == as_dtype("auto", "cuda")


# --- what comes out ----------------------------------------------------------------------------------

def test_output_types(pipe):
    one = lambda kind: pipe([A, B], 2, generator=make_gen(0), output_type=kind).frames
    pt, arrays, images = one("pt"), one("np"), one("pil")
    assert isinstance(arrays, np.ndarray) and arrays.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(arrays).permute(0, 1, 4, 2, 3), pt)
    assert isinstance(images[1][7], Image.Image) and len(images) == 2 and len(images[0]) == 8
    assert np.abs(np.asarray(images[0][0])/255 - arrays[0, 0]).max() < .01
    assert np.array_equal(pipe([A, B], 2, generator=make_gen(0), return_dict=False)[0], arrays)


@pytest.mark.parametrize("kind", ["np", "pil"])
def test_diffusers_own_export(pipe, tmp_path, kind):
    pytest.importorskip("imageio_ffmpeg")
    from diffusers.utils import export_to_gif, export_to_video
    video = pipe(A, 1, output_type=kind).frames[0]
    export_to_video(video, str(tmp_path/"a.mp4"), fps=8)
    assert (tmp_path/"a.mp4").stat().st_size > 500
    if kind == "pil": export_to_gif(video, str(tmp_path/"a.gif"))


def poisoned(net, value=math.nan):
    net = getattr(net, "decoder", net)                       # of a VAE: sampling needs no other part
    with torch.no_grad(): next(p for p in net.parameters() if p.ndim > 1).fill_(value)


@pytest.mark.parametrize("part, said", [("denoiser", "student's answer"), ("vae", "decoded clip")])
def test_nan_is_told(part, said, tmp_path):
    pipe, student, teacher = opened(WEIGHTS/"tiny-cd", dtype=torch.float16), load_student(WEIGHTS/"tiny-cd"), load_teacher("tiny")
    poisoned(getattr(pipe, part))
    for kind in ("np", "pil", "pt"):
        with pytest.raises(UserError, match=f"{said} is NaN or infinite in float16: load the weights in bfloat16 or float32"): pipe(A, 1, output_type=kind)
    if part == "denoiser":
        with pytest.raises(UserError, match="float16"): latent(pipe)
    for t in (student.teacher, teacher): poisoned(getattr(t, part) if part == "vae" or t is teacher else t.denoiser)
    for call in (lambda: sample_student(student, [A], make_gen(0), 1), lambda: sample_teacher(teacher, [A], make_gen(0), 1)):
        with pytest.raises(UserError, match="is NaN or infinite in float32: take another copy of the weights"): call()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_black_videos(tmp_path, value):
    clip = torch.zeros(3, 4, 32, 32)
    write_video(tmp_path/"a.mp4", clip)
    before = (tmp_path/"a.mp4").read_bytes()
    clip[0, 3, 1, 1] = value
    for name in ("a.mp4", "b.gif"):
        with pytest.raises(UserError, match=f"{name}' is NaN or infinite"): write_video(tmp_path/name, clip)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"] and (tmp_path/"a.mp4").read_bytes() == before
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(UserError, match=f"x is NaN or infinite in {str(dtype)[6:]}: load"): check_finite(clip.to(dtype), "x", dtype)


# --- identity ----------------------------------------------------------------------------------------

def test_fingerprints_read_every_number(saved):
    a, b = opened(WEIGHTS/"tiny-cd"), opened(saved)
    assert a.fingerprint() == b.fingerprint() != opened(saved, dtype=torch.float16).fingerprint()
    for net in (b.denoiser, b.vae, b.text_encoder):
        p, own = list(net.parameters())[-1].data.flatten(), b.fingerprint()
        p[-1] += 1.
        assert b.fingerprint() != own


def test_another_student_under_the_same_path(tmp_path):
    student = load_student(WEIGHTS/"tiny-cd")
    own = student_id(student)
    save_student(student, tmp_path/"a")
    assert student_id(load_student(tmp_path/"a")) == own
    with torch.no_grad(): list(student.trainable().values())[3].view(-1)[-1] += 1e-3
    assert student_id(student) != own
