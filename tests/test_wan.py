"Linear flow and Wan: closed forms, the real classes in small, one step of the recipe, and the way back to stock diffusers"
import json
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from t2v_turbo.cli import main
from t2v_turbo.consistency import consistency_fn, few_step_grid, few_step_sample, w_embedding
from t2v_turbo.core import expand_to, make_gen
from t2v_turbo.distill import Distillation, Objective, draw
from t2v_turbo.files import UserError
from t2v_turbo.gaussian import Gaussian
from t2v_turbo.memory import save_memory
from t2v_turbo.pipeline import T2VTurboPipeline, sample_student, sample_teacher
from t2v_turbo.saved import load_student, save_student
from t2v_turbo.schedule import Schedule
from t2v_turbo.solver import DDIM, ddim_sample, ddim_step
from t2v_turbo.standins import tiny_wan, tiny_wan22
from t2v_turbo.student import Student
from t2v_turbo.teachers.folders import defaults_of, load_teacher
from t2v_turbo.teachers.networks import ANGLES, TinyFlowDenoiser, flow_angle
from t2v_turbo.teachers.tiny import WEIGHTS, save_teacher, shared_with
from t2v_turbo.teachers.wan import (
    Flow,
    FlowTeacher,
    GuidedWan,
    check_clip,
    flow_scheduler,
    guided_wan,
    load_wan,
    save_wan,
    save_wan_lora,
    stock_scheduler,
    wan_lora,
)

SHIFTS = pytest.mark.parametrize("shift", [1., 3., 5.])


def full(n, v): return torch.full((n,), v, dtype=torch.long)


def velocity(g, z, t):
    "E[noise - x0 | z] of Gaussian data by Bayes' rule, without any method of Flow"
    s = g.schedule.sigma[t].view(-1, 1).double()
    var = (1 - s)**2 * g.std**2 + s**2
    return ((s - (1 - s) * g.std**2) / var * (z.double() - (1 - s) * g.mean) - g.mean).float()


def random_student(seed=0, config=None, make=tiny_wan, folder=None, **more):
    "A student of `tiny_wan` in which nothing is zero; of a teacher in `folder` if one is given"
    teacher = make(**more)
    student, gen = Student(load_wan(save_wan(teacher, folder)) if folder else teacher, 4, config=config), make_gen(seed)
    with torch.no_grad():
        for p in student.trainable().values(): p.copy_(.1 * torch.randn(p.shape, generator=gen))
    return student


# ---- the flow

@SHIFTS
def test_flow_table_is_that_of_diffusers(shift):
    flow = Flow.shifted(shift)
    euler = FlowMatchEulerDiscreteScheduler(shift=shift)
    assert_close(flow.time(torch.arange(1000)), euler.timesteps.flip(0), atol=1e-3, rtol=0)
    assert_close(flow.shift, shift, atol=1e-4, rtol=0)
    unipc = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
    for s in (euler, unipc, FlowMatchLCMScheduler(shift=shift)):
        assert_close(Flow.from_diffusers(s).sigma, euler.sigmas.flip(0), atol=1e-6, rtol=0)
    assert len(flow) == 1000 and flow.sigma[-1] == 1 and isinstance(flow, Schedule)


@SHIFTS
def test_flow_noises_as_diffusers_does(shift):
    flow, scheduler = Flow.shifted(shift), FlowMatchEulerDiscreteScheduler(shift=shift)
    z0, noise = torch.randn(2, 5, 3, 4, 2, generator=make_gen(0))
    t = torch.tensor([0, 19, 499, 900, 999])
    theirs = scheduler.scale_noise(z0, scheduler.timesteps.flip(0)[t], noise)
    assert_close(flow.add_noise(z0, noise, t), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["flow_prediction", "epsilon", "sample"])
def test_flow_round_trip(kind):
    flow = Flow.shifted(3.)
    z0, noise = torch.randn(2, 4, 3, 5, generator=make_gen(0))
    t = torch.tensor([3, 200, 700, 990])
    zt = flow.add_noise(z0, noise, t)
    out = dict(flow_prediction=flow.v(z0, noise, t), epsilon=noise, sample=z0)[kind]
    for got, want in zip(flow.x0_eps(zt, out, t, kind), (z0, noise)): assert_close(got, want, atol=3e-4, rtol=0)
    got = flow.x0_eps(zt.half(), out.half(), t, kind)
    assert all(v.dtype == torch.float32 for v in got)


@SHIFTS
def test_ddim_step_is_the_euler_step(shift):
    flow, t = Flow.shifted(shift), torch.arange(1000)
    z, v = torch.randn(2, 1000, 4, generator=make_gen(0))
    for s in (t.flip(0), (t - 20).clamp_min(0)):
        euler = z + (flow.sigma[s] - flow.sigma[t])[:, None] * v
        assert_close(ddim_step(flow, *flow.x0_eps(z, v, t), s), euler, atol=2e-6, rtol=0)


@SHIFTS
def test_walk_with_the_exact_velocity_is_first_order(shift):
    g = Gaussian(.5, .4, Flow.shifted(shift))
    z, none = torch.linspace(-2.5, 2.5, 101)[:, None], torch.zeros(101, 1)
    denoise = lambda z, t, ctx: g.schedule.x0_eps(z, velocity(g, z, t), t)
    assert_close(denoise(z, full(101, 700), none)[1], g.eps(z, full(101, 700)), atol=1e-5, rtol=0)
    def walk(n):
        for _, z_end, _ in ddim_sample(DDIM(g.schedule, n), denoise, z, 0., none, none[:1]): pass
        return z_end
    exact = g.flow(z, full(101, 999), full(101, 0))
    err = {n: (walk(n) - exact).abs().max() for n in (20, 200)}
    assert .85 < (err[20] / err[200]).log10() < 1.15, err


def test_stock_euler_walks_the_same_way():
    g, n = Gaussian(.5, .4, Flow.shifted(3.)), 50
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.)
    scheduler.set_timesteps(sigmas=(torch.arange(n, 0, -1) / n).tolist())
    z = theirs = torch.linspace(-2.5, 2.5, 11)[:, None]
    ddim = DDIM(g.schedule, n)
    for i in range(n - 1, 0, -1):                 # the last step of diffusers goes to 0, not to t = 0
        t = ddim.t(full(11, i))
        z = ddim.step(*g.schedule.x0_eps(z, velocity(g, z, t), t), full(11, i))
        now = scheduler.timesteps[n - 1 - i]
        assert_close(now, g.schedule.time(t)[0], atol=1e-3, rtol=0)
        theirs = scheduler.step(velocity(g, theirs, t), now, theirs).prev_sample
    assert_close(z, theirs, atol=1e-5, rtol=0)


def test_boundary_on_the_flow():
    g = Gaussian(.5, .4, Flow.shifted(5.))
    z = torch.randn(64, 1, generator=make_gen(0))
    x0, _ = g.schedule.x0_eps(z, velocity(g, z, full(64, 0)), full(64, 0))
    assert_close(consistency_fn(z, x0, full(64, 0)), z, atol=0, rtol=0)
    assert (g.consistency(z, full(64, 0)) - z).abs().max() < .02      # t = 0 is next to the data


@pytest.mark.parametrize("scheduler, says", [
    (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "shifts by size"),
    (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "runs backwards"),
    (UniPCMultistepScheduler(), "no scheduler of a flow"),
    (UniPCMultistepScheduler(prediction_type="flow_prediction"), "no scheduler of a flow"),
    (UniPCMultistepScheduler(use_flow_sigmas=True), "no scheduler of a flow")])
def test_other_schedulers_are_refused(scheduler, says):
    with pytest.raises(UserError, match=says): Flow.from_diffusers(scheduler)


# ---- the network

def test_guided_wan_is_its_parent_plus_w():
    net = tiny_wan().denoiser
    stock = WanTransformer3DModel.from_config(net.config)
    stock.load_state_dict({k: v for k, v in net.state_dict().items() if k != "cond_proj.weight"})
    z, t, ctx = torch.randn(2, 16, 3, 4, 4, generator=make_gen(0)), torch.tensor([900., 30.]), torch.randn(2, 5, 32)
    w = w_embedding(torch.tensor([2., 6.]))
    with torch.no_grad():
        want = stock(z, t, ctx).sample
        for cond in (None, w): assert_close(net(z, t, ctx, cond).sample, want, atol=0, rtol=0)
        net.cond_proj.weight.normal_(std=.1, generator=make_gen(1))
        heard = net(z, t, ctx, w).sample
        assert (heard - want).abs().amax((1, 2, 3, 4)).min() > 1e-3
        for i in range(2):                                   # w as a bias of the second time layer
            stock.condition_embedder.time_embedder.linear_2.bias.copy_(
                net.condition_embedder.time_embedder.linear_2.bias + net.cond_proj(w[i]))
            assert_close(stock(z, t, ctx).sample[i], heard[i], atol=1e-5, rtol=0)
        assert_close(net(z, t, ctx).sample, want, atol=0, rtol=0)          # the hook is gone


# ---- VAE and text

def test_prefix_decodes_as_the_whole_clip():
    teacher = tiny_wan(frames=17)
    assert type(teacher.vae) is AutoencoderKLWan and teacher.latent_shape == (16, 5, 4, 4)
    z = torch.randn(1, *teacher.latent_shape, generator=make_gen(0))
    cfg = teacher.vae.config
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (cfg.latents_mean, cfg.latents_std))
    with torch.no_grad():
        whole = teacher.vae.decode(z * std + mean).sample / 2 + .5
        assert_close(teacher.decode(z), whole, atol=1e-6, rtol=0)
        for k in range(1, 6): assert_close(teacher.decode(z[:, :, :k]), whole[:, :, :4*k - 3], atol=1e-6, rtol=0)
        for ids in ([0], [0, 3, 4], [5], [2, 9, 16]):
            assert_close(teacher.decode(z, torch.tensor(ids)), whole[:, :, ids], atol=1e-6, rtol=0)


@pytest.mark.parametrize("frame, latents", [(0, 1), (1, 2), (4, 2), (5, 3), (8, 3), (9, 4), (16, 5)])
def test_no_more_is_decoded_than_needed(frame, latents, monkeypatch):
    teacher, seen = tiny_wan(frames=17), []
    real = teacher.vae.decode
    monkeypatch.setattr(teacher.vae, "decode", lambda z: seen.append(z.shape[2]) or real(z))
    with torch.no_grad(): teacher.decode(torch.zeros(1, *teacher.latent_shape), torch.tensor([frame]))
    assert seen == [latents]


def test_a_later_latent_alone_is_another_clip():
    teacher = tiny_wan(frames=17)
    z = torch.randn(1, *teacher.latent_shape, generator=make_gen(0))
    with torch.no_grad(): alone, whole = teacher.decode(z[:, :, 2:3]), teacher.decode(z)
    assert (alone - whole[:, :, 5:9]).abs().amax((0, 1, 3, 4)).min() > 1e-3


def test_encode_normalises():
    teacher = tiny_wan()
    clips, cfg = torch.rand(2, *teacher.video_shape, generator=make_gen(0)), teacher.vae.config
    with torch.no_grad(): raw = teacher.vae.encode(clips * 2 - 1).latent_dist.mode()
    z = teacher.encode(clips)
    for c in (0, 7, 15):
        assert_close(z[:, c], (raw[:, c] - cfg.latents_mean[c]) / cfg.latents_std[c], atol=1e-6, rtol=1e-5)
    assert (teacher.encode(clips, make_gen(0)) - z).abs().max() > 1e-3


@pytest.mark.parametrize("prompt", ["a red cat", "", "  a  cat &amp;amp;\n a dog ", "a" * 60])
@pytest.mark.filterwarnings("ignore:the prompt")
def test_text_is_that_of_the_stock_pipeline(prompt, monkeypatch):
    import diffusers.pipelines.wan.pipeline_wan as stock
    if not hasattr(stock, "ftfy"):        # without ftfy the stock pipeline cannot clean; it leaves plain ASCII as it is
        monkeypatch.setattr(stock, "ftfy", type("ftfy", (), dict(fix_text=staticmethod(str))), raising=False)
    teacher = tiny_wan(tokens=24)
    pipe = WanPipeline(teacher.tokenizer, teacher.text_encoder, teacher.vae, teacher.scheduler)
    want, _ = pipe.encode_prompt([prompt], do_classifier_free_guidance=False, max_sequence_length=24)
    got = teacher.encode_text([prompt])
    assert_close(got, want, atol=1e-6, rtol=0)
    assert got.shape == (1, 24, 32) and (got[0] == 0).all(-1).sum() == 24 - min(24, len(teacher.tokenizer(
        " ".join(prompt.replace("&amp;amp;", "&").split()))["input_ids"]))


@pytest.mark.parametrize("frames, size, says", [
    (80, (32, 32), "nearest is 81"), (2, (32, 32), "nearest is 1"), (0, (32, 32), "nearest is 1"),
    (17, (40, 32), "nearest is 32x32|nearest is 48x32"), (17, (32, 3), "nearest is 32x16")])
def test_clips_that_wan_cannot_take(frames, size, says):
    with pytest.raises(UserError, match=says): check_clip(frames, size)
    with pytest.raises(UserError, match=says): tiny_wan(frames=frames, size=size)


def test_lora_goes_to_linear_layers_only():
    teacher = tiny_wan()
    names, layers = set(teacher.lora_targets()), dict(teacher.denoiser.named_modules())
    assert "cond_proj" not in names and "patch_embedding" not in names
    assert {"blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.0.ffn.net.2", "proj_out",
            "condition_embedder.time_embedder.linear_2"} <= names
    assert all(isinstance(layers[n], torch.nn.Linear) for n in names)


# ---- the recipe, unchanged

def test_one_step_of_the_recipe_and_four_of_the_sampler():
    student = Student(tiny_wan(frames=17), 4)
    teacher = student.teacher
    mean_colour = lambda x, prompts: x.mean((1, 2, 3, 4))
    model = Distillation(student, Objective(image_frames=2, video_frames=5, shape="raw"), mean_colour, mean_colour)
    z0 = teacher.encode(torch.rand(2, *teacher.video_shape, generator=make_gen(0)))
    prompts = ["a cat", "a dog"]
    ctx, null = teacher.encode_text(prompts), teacher.encode_text([""] * 2)
    d = draw(model.cfg, z0.shape, make_gen(1))
    with torch.no_grad():
        zt = teacher.schedule.add_noise(z0, d.noise, model.ddim.t(d.index))
        start = student(zt, model.ddim.t(d.index), ctx, d.w)
    before = {n: p.detach().clone() for n, p in student.trainable().items()}
    opt = torch.optim.AdamW(student.trainable().values(), 1e-3)
    out = model(z0, ctx, null, prompts, d)
    assert_close(out.x0, start, atol=1e-5, rtol=0)
    out.loss.mean().backward(); opt.step()
    assert torch.isfinite(out.loss).all() and (out.cd > 0).all() and (out.r_img != out.r_vid).all()
    moved = {n for n, p in student.trainable().items() if (p != before[n]).any()}
    assert "cond_proj.weight" in moved and any("lora_B" in n for n in moved)
    clips = sample_student(student, prompts, make_gen(0), 4)
    assert clips.shape == (2, *teacher.video_shape) and 0 <= clips.min() and clips.max() <= 1
    with student.as_teacher(): assert sample_teacher(teacher, prompts, make_gen(0), 4).shape == clips.shape


def test_the_target_is_the_euler_step_with_guidance():
    "The consistency loss of one step, written out with the network's own velocity"
    student = random_student()
    t, gen = student.teacher, make_gen(2)
    z0, prompts = torch.randn(2, *t.latent_shape, generator=gen), ["a cat", "a dog"]
    ctx, null = t.encode_text(prompts), t.encode_text([""] * 2)
    model = Distillation(student, Objective(beta_img=0, beta_vid=0, video_frames=5))
    d = draw(model.cfg, z0.shape, gen)
    s, r = (t.schedule.sigma[i].view(2, 1, 1, 1, 1) for i in (20*d.index + 19, (20*d.index - 1).clamp_min(0)))
    wide = lambda v: v.view(2, 1, 1, 1, 1)
    with torch.no_grad():
        z = (1 - s) * z0 + s * d.noise
        net = lambda z, s, c, w=None: t.denoiser(z, 1000 * s.flatten(), c, w).sample
        with student.as_teacher(): yes, no = net(z, s, ctx), net(z, s, null)
        z_prev = z + (r - s) * (yes + wide(d.w) * (yes - no))
        emb = w_embedding(d.w)
        f = lambda z, s, i: consistency_fn(z, z - s * net(z, s, ctx, emb), i)
        diff = f(z, s, 20*d.index + 19) - f(z_prev, r, (20*d.index - 1).clamp_min(0))
        want = ((diff**2 + 1e-6).sqrt() - 1e-3).mean((1, 2, 3, 4))
        assert_close(model(z0, ctx, null, prompts, d).cd, want, atol=1e-6, rtol=1e-4)


# ---- folders

def test_folder_round_trip(tmp_path):
    teacher = tiny_wan(3, frames=9, size=(32, 48))
    again = load_wan(save_wan(teacher, tmp_path / "wan"))
    for k, v in teacher.denoiser.state_dict().items(): assert_close(again.denoiser.state_dict()[k], v, atol=0, rtol=0)
    assert (again.video_shape, again.latent_shape, again.fps, again.tokens) == ((3, 9, 32, 48), (16, 3, 4, 6), 16, 512)
    assert again.fingerprint() == teacher.fingerprint() and type(again.denoiser) is GuidedWan
    assert load_wan(tmp_path / "wan", frames=5, size=(16, 32), fps=8).video_shape == (3, 5, 16, 32)
    assert json.loads((tmp_path / "wan/transformer/config.json").read_text())["_class_name"] == "WanTransformer3DModel"
    assert type(WanPipeline.from_pretrained(tmp_path / "wan").transformer) is WanTransformer3DModel
    for more, words in ((dict(frames=8), "nearest is 9"), (dict(frames=0), "nearest is 1"), (dict(frames=4.6), "nearest is 5"),
                        (dict(fps=0), "fps 0 is not possible.*nearest is 1"), (dict(fps=7.5), "nearest is 8"),
                        (dict(size=(30, 48)), "nearest is 32x48"), (dict(size=()), "height and width")):
        with pytest.raises(UserError, match=words): load_wan(tmp_path / "wan", **more)
    half = load_wan(tmp_path / "wan", dtype=torch.bfloat16)
    x0, _ = half.denoise(torch.zeros(1, *half.latent_shape), full(1, 500), half.encode_text(["a"]), w_embedding(torch.ones(1)))
    assert half.denoiser.dtype == torch.bfloat16 and x0.dtype == torch.float32
    assert half.decode(half.encode(torch.rand(1, *half.video_shape))).dtype == torch.float32


def test_flow_teacher_of_the_tiny_world(tmp_path):
    "Its weights are those of `tiny`; a saved copy is a complete folder"
    teacher, tiny = load_teacher("tiny-flow"), load_teacher("tiny")
    assert not (WEIGHTS / "tiny-flow/vae").exists() and shared_with(WEIGHTS / "tiny-flow") == WEIGHTS / "tiny"
    for k, v in tiny.denoiser.state_dict().items(): assert torch.equal(teacher.denoiser.state_dict()[k], v)
    assert teacher.fingerprint() != tiny.fingerprint()                    # the same weights, but read in another way
    save_teacher(teacher, tmp_path / "flow")
    again = load_teacher(tmp_path / "flow")
    assert type(again) is FlowTeacher and isinstance(again.schedule, Flow) and type(again.denoiser) is TinyFlowDenoiser
    assert again.fingerprint() == teacher.fingerprint() and again.video_shape == (3, 8, 64, 64)
    z, ctx = torch.randn(1, *again.latent_shape, generator=make_gen(0)), again.encode_text(["a red fish moving left in the sea"])
    for a, b in zip(again.denoise(z, full(1, 700), ctx), teacher.denoise(z, full(1, 700), ctx)): assert_close(a, b)
    save_student(Student(again, 4), tmp_path / "student")
    student = load_student(tmp_path / "student", load_teacher(tmp_path / "flow"))
    assert sample_student(student, ["a red fish moving left in the sea"], make_gen(0), 4).shape == (1, 3, 8, 64, 64)
    with pytest.raises(UserError, match="belongs to another teacher"): load_student(tmp_path / "student", tiny)


def test_both_readings_have_the_same_paths():
    "At equal angles x0 of the flow is that of the VP teacher, so that their ODE paths are the same"
    flow, tiny = load_teacher("tiny-flow"), load_teacher("tiny")
    ctx, t = tiny.encode_text(["a blue car bouncing by the wall"]*4), torch.tensor([19, 499, 899, 998])
    z, phi = torch.randn(4, *tiny.latent_shape, generator=make_gen(0)), ANGLES[t]
    time = phi.sin() / (phi.sin() + phi.cos())                            # tan(phi) = time / (1 - time)
    s = expand_to(flow_angle(time)[1], z)
    with torch.no_grad():
        u = flow.denoiser(z*s, 1000*time, ctx).sample
        x0, noise = tiny.denoise(z, t, ctx)
    assert_close(z*s - expand_to(time, z)*u, x0, atol=1e-3, rtol=0)
    assert_close(u, noise - x0, atol=1e-3, rtol=0)


def test_a_transformer_of_images_is_refused(tmp_path):
    teacher = tiny_wan()
    teacher.denoiser = guided_wan(WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, in_channels=36, text_dim=32,
                                                        freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32))
    with pytest.raises(UserError, match="36 channels for latents of 16: give Wan 2.1 T2V or"): load_wan(save_wan(teacher, tmp_path / "i2v"))


def pickled(folder):
    "A pickle with a function beside its tensors, instead of safetensors"
    file = next(folder.glob("*.safetensors"))
    torch.save(load_file(file) | dict(code=print), file.with_suffix(".bin")); file.unlink()


def edited(folder):
    "One tensor less, the second of another shape, and one more"
    file = next(folder.glob("*.safetensors"))
    state = load_file(file)
    a, b = sorted(state)[2:4]
    state.pop(a); state[b] = torch.zeros(*state[b].shape, 1)
    save_file(state | {"extra.weight": torch.zeros(1)}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("spoil, says", [
    (lambda d: edited(d / "transformer"), "of a WanTransformer3DModel: 1 missing .* 1 unknown .extra.weight., 1 of another shape"),
    (lambda d: edited(d / "vae"), "of a AutoencoderKLWan: 1 missing .* 1 unknown .extra.weight., 1 of another shape"),
    (lambda d: edited(d / "text_encoder"), "of a UMT5EncoderModel: 1 missing .* 1 unknown .extra.weight., 1 of another shape"),
    (lambda d: (d / "transformer/config.json").unlink(), "has no transformer/config.json"),
    (lambda d: (d / "vae/config.json").unlink(), "has no vae/config.json"),
    (lambda d: next((d / "vae").glob("*.safetensors")).write_bytes(b"12345678"), "vae' cannot be loaded as a AutoencoderKLWan"),
    (lambda d: pickled(d / "transformer"), "cannot be read as tensors: it holds more than tensors"),
    (lambda d: (d / "transformer/config.json").write_text('{"_class_name": "UNet3DConditionModel"}'), "holds a UNet3DConditionModel")])
def test_a_folder_that_is_no_wan(tmp_path, spoil, says):
    spoil(save_wan(tiny_wan(), tmp_path / "wan"))
    with pytest.raises(UserError, match=says): load_wan(tmp_path / "wan")


# ---- Wan 2.2 TI2V-5B

@pytest.fixture(scope="module")
def wan22(tmp_path_factory):
    "The published layout: the keys of the hub's model_index.json and vae/config.json, and no teacher.json"
    folder = save_wan(tiny_wan22(), tmp_path_factory.mktemp("wan22") / "wan")
    (folder / "teacher.json").unlink()
    for file, more in (("model_index.json", dict(boundary_ratio=None, transformer_2=[None, None])), ("vae/config.json", dict(clip_output=False))):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | more))
    return folder


def test_wan22_has_its_own_numbers(wan22):
    index = json.loads((wan22 / "model_index.json").read_text())
    assert index["expand_timesteps"] is True and index["_class_name"] == "WanPipeline"
    t = load_teacher(wan22)
    assert (t.video_shape, t.latent_shape, t.fps) == ((3, 121, 704, 1280), (48, 31, 44, 80), 24)
    assert_close(t.schedule.shift, 5., atol=1e-4, rtol=0)
    assert load_teacher(wan22, frames=9, size=(64, 96), fps=12).latent_shape == (48, 3, 4, 6)
    assert defaults_of(str(wan22)) == defaults_of(t) and defaults_of(t).guidance == 5.


@pytest.mark.parametrize("more, says", [
    (dict(frames=120), "120 frames are not possible: .* the nearest is 121"), (dict(fps=23.976), "fps 23.976 .* the nearest is 24"),
    (dict(size=(720, 1280)), "multiples of 32, the nearest is 736x1280"), (dict(size=(64, 48)), "the nearest is 64x64")])
def test_clips_that_wan22_cannot_take(wan22, more, says):
    with pytest.raises(UserError, match=says) as e: load_teacher(wan22, **more)
    assert "\n" not in str(e.value)


def test_wan22_encodes_and_decodes():
    "48 channels of 16x16 pixels; frames alone are those of the whole clip"
    t = tiny_wan22()
    clips = torch.rand(2, *t.video_shape, generator=make_gen(0))
    z = t.encode(clips)
    assert z.shape == (2, 48, 5, 4, 4)
    mean, std = (torch.tensor(v).view(1, 48, 1, 1, 1) for v in (t.vae.config.latents_mean, t.vae.config.latents_std))
    with torch.no_grad():
        assert_close(z, (t.vae.encode(2*clips - 1).latent_dist.mode() - mean) / std)
        whole = t.decode(z)
        assert_close(whole, t.vae.decode(z*std + mean).sample / 2 + .5, atol=1e-6, rtol=0)
        assert whole.shape == clips.shape and whole.std() > .05
        for ids in ([0], [0, 3, 4], [5], [2, 9, 16]): assert_close(t.decode(z, torch.tensor(ids)), whole[:, :, ids], atol=1e-6, rtol=0)


def test_wan22_with_little_memory_has_the_same_gradient():
    t, leaf = tiny_wan22(frames=9), torch.randn(1, 48, 3, 4, 4, generator=make_gen(0)).requires_grad_()
    grad = lambda: torch.autograd.grad((t.decode(leaf, torch.tensor([2, 7]))**2).sum(), leaf)[0]
    plain = grad()
    save_memory(t)
    assert plain.abs().sum((0, 1, 3, 4)).gt(0).tolist() == [False, True, True] and t.vae.decoder.pieces == 1
    assert_close(grad(), plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scheduler", [flow_scheduler(5.), FlowMatchEulerDiscreteScheduler(shift=5.)], ids=["UniPC", "Euler"])
def test_wan22_in_the_stock_pipeline(wan22, scheduler):
    "The stock loop gives every token a time; with one time per clip our network reaches the same latents"
    t, n, w = load_teacher(wan22, frames=9, size=(64, 96)), 4, 4.
    pipe = WanPipeline.from_pretrained(wan22)
    pipe.set_progress_bar_config(disable=True)
    ctx, null = t.encode_text(["a red cat"]), t.encode_text([""])
    start = torch.randn(1, *t.latent_shape, generator=make_gen(1))
    euler = type(scheduler) is FlowMatchEulerDiscreteScheduler
    if euler:                                        # at the times of the library's own grid
        own = scheduler.set_timesteps
        scheduler.set_timesteps = lambda n, device=None: own(sigmas=(torch.arange(n, 0, -1) / n).tolist(), device=device)
    pipe.scheduler, times = scheduler, []
    pipe.transformer.register_forward_pre_hook(lambda m, args, kwargs: times.append(kwargs["timestep"].shape), with_kwargs=True)
    theirs = pipe(prompt_embeds=ctx, negative_prompt_embeds=null, latents=start.clone(), num_inference_steps=n, guidance_scale=1 + w,
                  height=64, width=96, num_frames=9, output_type="latent").frames
    assert set(times) == {(1, 3*2*3)} and len(times) == 2*n
    with torch.no_grad():
        if euler: *_, (_, _, ours) = ddim_sample(DDIM(t.schedule, n), t.denoise, start, w, ctx, null)
        else:
            scheduler.set_timesteps(n)
            ours = start
            for s in scheduler.timesteps:
                yes, no = (t.denoiser(ours, s[None], c).sample for c in (ctx, null))
                ours = scheduler.step(no + (1 + w)*(yes - no), s, ours, return_dict=False)[0]
    assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (ours - start).abs().max() > .1


def test_lora_of_wan22_in_the_stock_pipeline(wan22, tmp_path):
    "A file for the published folder, which gives each token a time"
    student = Student(load_teacher(wan22, frames=5, size=(64, 64)), 4)
    t, gen, w = student.teacher, make_gen(0), 3.
    with torch.no_grad():
        for p in student.trainable().values(): p.copy_(.1 * torch.randn(p.shape, generator=gen))
    save_wan_lora(t.denoiser, tmp_path / "lora", w)
    pipe = WanPipeline.from_pretrained(wan22)
    pipe.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    pipe.scheduler = stock_scheduler(t.scheduler, 4)
    pipe.set_progress_bar_config(disable=True)
    z, ctx = torch.randn(1, *t.latent_shape, generator=gen), t.encode_text(["a cat"])
    with torch.no_grad():
        torch.manual_seed(0)
        f = lambda z, s: student(z, s, ctx, torch.tensor([w]))
        *_, (_, x0, _) = few_step_sample(f, z, few_step_grid(4), t.schedule, lambda i: torch.randn(z.shape))
        torch.manual_seed(0)
        frames = pipe(prompt_embeds=ctx, latents=z, num_inference_steps=4, guidance_scale=1., height=64, width=64, num_frames=5,
                      output_type="pt").frames
        assert_close(frames.transpose(1, 2), t.decode(x0), atol=1e-4, rtol=0)


def test_wan22_is_distilled_by_the_commands(wan22, tmp_path, monkeypatch, capsys):
    "Two steps, four-step clips, the same student again; the student of another teacher is refused"
    monkeypatch.chdir(tmp_path)
    small = ["--reward", "tiny-image,tiny-video", "--frames", "9", "--height", "64", "--width", "64", "--image_frames", "1"]
    assert main(["distill", "--teacher", str(wan22), *small, "--rank", "2", "--batch", "1", "--steps", "2", "--eval_every", "0", "--track", "",
                 "--vocabulary", "", "--out", "run"]) == 0
    student = load_student("run/student")
    assert type(student.teacher).__name__ == "WanTeacher" and student.teacher.video_shape == (3, 9, 64, 64) and student.w_projection.weight.any()
    assert student.fingerprints == load_teacher(wan22, frames=9, size=(64, 64)).fingerprints()
    assert main(["sample", "--student", "run/student", "--prompt", "a cat", "--dtype", "bfloat16", "--out", "videos"]) == 0
    assert sorted(p.suffix for p in (tmp_path / "videos").iterdir()) == [".csv", ".mp4"]
    with pytest.raises(UserError, match="belongs to another teacher"): load_student("run/student", tiny_wan22(seed=1, frames=9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [tiny_wan, tiny_wan22])
def test_a_merged_student_samples_in_half_precision(make, dtype, tmp_path):
    "The time layers stay in float32 while the merged w-projection has the precision of the blocks"
    save_student(random_student(make=make, frames=5, folder=tmp_path / "wan"), tmp_path / "student")
    full, half = (T2VTurboPipeline.from_pretrained(tmp_path / "student", dtype=d) for d in (torch.float32, dtype))
    assert half.denoiser.cond_proj.weight.dtype == dtype and half.denoiser.condition_embedder.time_embedder.linear_2.weight.dtype == torch.float32
    a, b = (p("a cat", 1, generator=make_gen(0), output_type="latent").frames for p in (full, half))
    assert b.isfinite().all() and (a - b).norm() < .1 * a.norm()


def test_two_transformers_are_refused(wan22, tmp_path):
    "Wan 2.2 A14B has the class names of Wan 2.1, so it would load, and be half a model"
    folder = shutil.copytree(wan22, tmp_path / "a14b")
    index = json.loads((folder / "model_index.json").read_text()) | dict(transformer_2=["diffusers", "WanTransformer3DModel"], boundary_ratio=.875)
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="has two transformers, .* give Wan 2.1 or Wan 2.2 TI2V-5B"): load_teacher(folder)


# ---- back to stock diffusers

@SHIFTS
@pytest.mark.parametrize("steps, origin", [(1, 50), (2, 50), (3, 50), (4, 50), (8, 50), (16, 50), (4, 200), (4, 20)])
def test_stock_scheduler_has_our_grid(shift, steps, origin):
    lcm, flow = stock_scheduler(flow_scheduler(shift), steps, origin), Flow.shifted(shift)
    lcm.set_timesteps(steps)
    assert type(lcm) is FlowMatchLCMScheduler
    assert_close(lcm.timesteps, flow.time(torch.tensor(few_step_grid(steps, origin))), atol=2e-3, rtol=0)


@pytest.mark.parametrize("w", [0., 3., 6.5])
def test_lora_in_the_stock_pipeline(tmp_path, w):
    "Stock weights, stock classes, stock loader and sampling loop: the frames of our student"
    save_wan(tiny_wan(), tmp_path / "wan")
    student = random_student()
    net, t = student.teacher.denoiser, student.teacher
    file = save_wan_lora(net, tmp_path / "lora", w)
    assert {k.split(".")[0] for k in load_file(file)} == {"transformer"}
    pipe = WanPipeline.from_pretrained(tmp_path / "wan")
    z, ctx = torch.randn(1, *t.latent_shape, generator=make_gen(5)), t.encode_text(["a cat"])
    with torch.no_grad(): plain = pipe.transformer(z, torch.tensor([700.]), ctx).sample
    pipe.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    pipe.scheduler = stock_scheduler(t.scheduler, 4)
    pipe.set_progress_bar_config(disable=True)
    emb = w_embedding(torch.tensor([w]))
    with torch.no_grad():
        ours, theirs = net(z, torch.tensor([700.]), ctx, emb).sample, pipe.transformer(z, torch.tensor([700.]), ctx).sample
        assert_close(theirs, ours, atol=1e-5, rtol=0)
        assert (theirs - plain).abs().max() > .1
        torch.manual_seed(0)
        f = lambda z, s: student(z, s, ctx, torch.tensor([w]))
        *_, (_, x0, _) = few_step_sample(f, z, few_step_grid(4), t.schedule, lambda i: torch.randn(z.shape))
        torch.manual_seed(0)
        frames = pipe(prompt_embeds=ctx, latents=z, num_inference_steps=4, guidance_scale=1., height=32, width=32,
                      num_frames=17, output_type="pt").frames
        assert_close(frames.transpose(1, 2), t.decode(x0), atol=1e-4, rtol=0)
    pipe.fuse_lora(); pipe.unload_lora_weights()             # merged for good, as people do
    with torch.no_grad(): assert_close(pipe.transformer(z, torch.tensor([700.]), ctx).sample, ours, atol=1e-5, rtol=0)


CONFIGS = dict(
    alpha=dict(r=4, lora_alpha=7), weak=dict(r=8, lora_alpha=2), root=dict(r=4, lora_alpha=3, use_rslora=True),
    layers=dict(r=4, lora_alpha=4, rank_pattern={"to_q": 2, "ffn.net.2": 6}, alpha_pattern={"to_q": 5, "to_k": 1}),
    bias=dict(r=4, lora_alpha=6, lora_bias=True), few=dict(r=4, lora_alpha=6, target_modules=["to_q", "to_v"]))

@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.filterwarnings("ignore:Adapter 'default'")      # peft takes every bias for a broken matrix
def test_any_rank_and_alpha_in_the_stock_pipeline(tmp_path, config):
    "peft's factor of each layer goes into the file, which stock diffusers reads with a factor of one"
    config = LoraConfig(**dict(target_modules=tiny_wan().lora_targets()) | config)
    student = random_student(config=config)
    net, t, w = student.teacher.denoiser, student.teacher, 4.5
    factors = {m.scaling["default"] for m in net.modules() if isinstance(m, BaseTunerLayer)}
    assert factors != {1.} and (config.rank_pattern == {} or len(factors) >= 3)
    save_wan(tiny_wan(), tmp_path / "wan")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    save_wan_lora(net, tmp_path / "lora", w)
    for k, v in net.state_dict().items(): assert torch.equal(v, before[k]), k
    pipe = WanPipeline.from_pretrained(tmp_path / "wan")
    pipe.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    pipe.scheduler = stock_scheduler(t.scheduler, 2)
    pipe.set_progress_bar_config(disable=True)
    z, ctx, s = torch.randn(1, *t.latent_shape, generator=make_gen(5)), t.encode_text(["a cat"]), torch.tensor([700.])
    with torch.no_grad():
        want = net(z, s, ctx, w_embedding(torch.tensor([w]))).sample
        assert_close(pipe.transformer(z, s, ctx).sample, want, atol=1e-5, rtol=0)
        torch.manual_seed(0)
        f = lambda z, s: student(z, s, ctx, torch.tensor([w]))
        *_, (_, x0, _) = few_step_sample(f, z, few_step_grid(2), t.schedule, lambda i: torch.randn(z.shape))
        torch.manual_seed(0)
        frames = pipe(prompt_embeds=ctx, latents=z, num_inference_steps=2, guidance_scale=1., height=32, width=32,
                      num_frames=17, output_type="pt").frames
        assert_close(frames.transpose(1, 2), t.decode(x0), atol=1e-4, rtol=0)
    pipe.fuse_lora(); pipe.unload_lora_weights()
    with torch.no_grad(): assert_close(pipe.transformer(z, s, ctx).sample, want, atol=1e-5, rtol=0)


def test_what_is_no_student_of_wan():
    with pytest.raises(UserError, match="carries no LoRA"): wan_lora(tiny_wan().denoiser)
    with pytest.raises(UserError, match="w -1.0 is negative"): wan_lora(random_student().teacher.denoiser, -1.)


def test_two_scales_give_two_files():
    net = random_student().teacher.denoiser
    a, b = wan_lora(net, 2.), wan_lora(net, 5.)
    assert {k for k in a if not torch.equal(a[k], b[k])} == {
        "transformer.condition_embedder.time_embedder.linear_2.lora_B.bias"}


def test_saved_pipeline_opens_again(tmp_path):
    "As `T2VTurboPipeline`, with the class of its network, and with the same frames"
    pipe = T2VTurboPipeline.from_student(random_student(frames=5))
    want = pipe("a cat", 2, generator=make_gen(0), output_type="pt").frames
    pipe.save_pretrained(tmp_path / "pipe")
    again = T2VTurboPipeline.from_pretrained(tmp_path / "pipe")
    assert type(again.denoiser) is GuidedWan and again.denoiser.cond_proj.weight.any()
    assert_close(again("a cat", 2, generator=make_gen(0), output_type="pt").frames, want, atol=1e-5, rtol=0)
