"Which frames the rewards see: keys and frames, windows of a causal decoder, and how many a video reward looks at"
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.testing import assert_close

from t2v_turbo.cli import main
from t2v_turbo.core import make_gen, step_gen
from t2v_turbo.distill import Distillation, Draw, Objective, draw, video_frames_of
from t2v_turbo.files import UserError
from t2v_turbo.memory import save_memory
from t2v_turbo.meter import Meter
from t2v_turbo.plan import _most_frames, metered
from t2v_turbo.rewards.base import (
    CLOCK,
    Facts,
    agreed_frames,
    frames_wanted,
    mix,
    place,
    random_frames,
    strided_frames,
    window_start,
)
from t2v_turbo.rewards.internvideo2 import INTERNVIDEO2
from t2v_turbo.rewards.names import named_frames
from t2v_turbo.standins import tiny_wan
from t2v_turbo.student import Student
from t2v_turbo.teachers.tiny import load_teacher
from t2v_turbo.teachers.wan import as_history, reach_of
from t2v_turbo.train import Config, Trainer
from t2v_turbo.watch import Watcher

TICKS = [-(-CLOCK*i//400) for i in range(400)] + [CLOCK - 1]


def colour(x, prompts): return x.mean((1, 2, 3, 4))


class Looks(torch.nn.Module):
    "A video reward that looks at so many frames"
    def __init__(self, frames, name="looks"):
        super().__init__()
        self.facts, self.seen = Facts(name, frames, 0, 0, "none", "none"), []

    def forward(self, x, prompts):
        self.seen.append(x.shape[2])
        return colour(x, prompts)


# ---- keys

def test_a_key_points_to_each_place_as_often():
    got = torch.tensor([place(5, k) for k in TICKS[:-1]])
    assert got.bincount().tolist() == [80]*5 and place(5, CLOCK - 1) == 4 and place(1, CLOCK - 1) == 0
    assert place(7, torch.tensor([CLOCK - 1])) == 6


@pytest.mark.parametrize("t, n", [(8, 4), (5, 2), (21, 8), (81, 8), (4, 4), (1, 1)])
def test_frames_are_functions_of_their_key(t, n):
    for f in (random_frames, strided_frames):
        got = {k: f(t, n, k) for k in TICKS}
        for k, ids in got.items():
            assert torch.equal(ids, f(t, n, torch.tensor([k]))) and torch.equal(ids, ids.unique()) and len(ids) == n
        seen = torch.cat(list(got.values())).unique()
        assert (seen.min(), seen.max()) == (0, t - 1)
    assert all((strided_frames(t, n, k).diff() == t//n).all() for k in TICKS)


def test_windows_lie_everywhere_in_the_clip():
    starts = [window_start(81, 21, k) for k in TICKS]
    assert set(starts) == set(range(61)) and starts == sorted(starts)
    held = torch.tensor([sum(s <= f < s + 21 for s in starts)/len(starts) for f in (0, 40, 80)])
    assert held.min() > .1 and held[1] == held.max()             # the ends are not forgotten
    assert {window_start(8, 8, k) for k in TICKS} == {0}


def test_a_step_looks_into_one_window():
    cfg, seen = Objective(image_frames=6, video_frames=8), set()
    for i in range(300):
        d = draw(cfg, (1, 1, 21, 1, 1), make_gen(i)).resolve(81, cfg, 21)
        ids = torch.cat([d.image_frames, d.video_frames])
        assert len(d.image_frames) == 6 and len(d.video_frames) == 8 and ids.max() - ids.min() < 21
        seen |= {*ids.tolist()}
    assert seen == set(range(81))


def test_without_a_window_frames_are_of_the_whole_clip():
    cfg = Objective(image_frames=3, video_frames=4)
    for i in range(50):
        d = draw(cfg, (2, 1, 8, 1, 1), make_gen(i))
        at = d.resolve(8, cfg)
        assert torch.equal(at.image_frames, random_frames(8, 3, d.image_frames))
        assert torch.equal(at.video_frames, strided_frames(8, 4, d.video_frames)) and at.video_frames.diff().unique() == 2
        assert at.window is None and at.resolve(81, cfg, 21) is at               # frames stay what they are


def test_keys_are_not_made_of_one_another_and_stay_on_the_cpu():
    keys = torch.stack([torch.cat([d.image_frames, d.video_frames, d.window]) for d in
                        (draw(Objective(), (1, 1, 1, 1, 1), make_gen(i)) for i in range(400))]).double()
    assert torch.corrcoef(keys.T).fill_diagonal_(0).abs().max() < .2 and keys.unique().numel() == keys.numel()
    d = draw(Objective(), (4, 1, 2, 2, 2), make_gen(0))
    part = d.rows(slice(1, 3)).to("meta")
    assert part.noise.is_meta and part.noise.shape[0] == 2 and torch.equal(part.window, d.window)


@pytest.mark.parametrize("other", [make_gen(3), *(step_gen(3, 7, s) for s in ("clips", "order", "mix", "dice", "samples", "looks")),
                                   step_gen(3, 8, "noise"), step_gen(4, 7, "noise")])
def test_noise_of_a_step_is_not_what_others_draw(other):
    shape = (2, 16, 8, 8, 8)
    first, noise = torch.randn(3*4096, generator=other), draw(Objective(), shape, step_gen(3, 7, "noise")).noise.flatten()
    assert not torch.isin(noise, first).float().mean() > .01
    assert_close(noise.std(), torch.ones(()), atol=.05, rtol=0)


def test_streams_of_a_step_are_apart():
    got = [torch.randn(64, generator=step_gen(*of)) for of in ((0, 3, "noise"), (0, 3, "clips"), (3, 0, "noise"), (0, 4, "noise"))]
    assert torch.corrcoef(torch.stack(got)).fill_diagonal_(0).abs().max() < .5
    assert torch.equal(got[0], torch.randn(64, generator=step_gen(0, 3, "noise")))


def test_a_step_can_be_given_its_frames():
    model = Distillation(Student(tiny_wan(frames=17), 2), Objective(image_frames=2, video_frames=3), colour, colour)
    keys = draw(model.cfg, (1, *model.student.teacher.latent_shape), make_gen(4))
    d = keys.resolve(17, model.cfg, 17)
    given = Draw(d.noise, d.index, d.w, d.image_frames, d.video_frames)
    x0 = torch.randn(1, *model.student.teacher.latent_shape, generator=make_gen(0))
    with torch.no_grad():
        for a, b in zip(model.rewards(x0, ["a"], keys), model.rewards(x0, ["a"], given)): assert torch.equal(a, b)
        other = replace(given, image_frames=(d.image_frames + 1) % 17)
        assert model.rewards(x0, ["a"], other)[0] != model.rewards(x0, ["a"], given)[0]


# ---- the causal decoder

@pytest.fixture(scope="module")
def clip():
    "Wan's classes in small at 81 frames: latents, the whole clip, and what passed the decoder with and without gradient"
    teacher, calls = tiny_wan(frames=81, size=(16, 16)), []
    teacher.vae.decoder.register_forward_pre_hook(lambda module, inputs: calls.append(torch.is_grad_enabled()))
    z = torch.randn(1, *teacher.latent_shape, generator=make_gen(0))
    with torch.no_grad(): whole = teacher.decode(z)
    return SimpleNamespace(teacher=teacher, z=z, whole=whole, calls=calls)


@pytest.mark.parametrize("start", [0, 1, 3, 4, 5, 22, 43, 59, 60])
def test_a_window_decodes_as_the_whole_clip(clip, start, monkeypatch):
    grads = []
    forward = clip.teacher.vae.decoder.conv_in.forward
    monkeypatch.setattr(clip.teacher.vae.decoder.conv_in, "forward", lambda *a: (grads.append(torch.is_grad_enabled()), forward(*a))[1])
    frames = torch.arange(start, start + 21)
    leaf = clip.z.clone().requires_grad_()
    x = clip.teacher.decode(leaf, frames)
    assert_close(x, clip.whole[:, :, frames], atol=1e-6, rtol=0)
    first, last = -(-start//4), -(-(start + 20)//4)
    assert grads == [False]*first + [True]*(last + 1 - first) and sum(grads) == 6
    x.sum().backward()
    assert leaf.grad.abs().sum((0, 1, 3, 4)).gt(0).tolist() == [first <= i <= last for i in range(21)]


@pytest.mark.parametrize("frames", [[0], [80], [0, 80], [3, 1], [77, 78], [4, 5], [8, 9]])
def test_frames_keep_their_numbers(clip, frames):
    with torch.no_grad(): assert_close(clip.teacher.decode(clip.z, torch.tensor(frames)), clip.whole[:, :, frames], atol=1e-6, rtol=0)


def test_the_gradient_in_the_window_is_that_of_a_full_decode(clip):
    frames, probe = torch.arange(33, 54), torch.randn(1, 3, 21, 16, 16, generator=make_gen(1))
    def gradient(decode):
        leaf = clip.z.clone().requires_grad_()
        return torch.autograd.grad((decode(leaf)*probe).sum(), leaf)[0]
    cut = gradient(lambda z: clip.teacher.decode(z, frames))
    full = gradient(lambda z: clip.teacher.decode(z)[:, :, frames])
    scale = full.abs().max()
    assert_close(cut[:, :, 9:]/scale, full[:, :, 9:]/scale, atol=1e-5, rtol=0)
    assert cut[:, :, :9].abs().max() == 0 < full[:, :, :9].abs().max()
    inside = torch.cosine_similarity(cut[:, :, 9:].flatten(), full[:, :, 9:].flatten(), 0)
    assert inside > .9999


def test_memory_is_saved_in_a_window_too(clip):
    frames = torch.tensor([43, 50, 61])
    def run():
        leaf = clip.z.clone().requires_grad_()
        x = clip.teacher.decode(leaf, frames)
        return x.detach(), torch.autograd.grad(x.square().sum(), leaf)[0]
    plain = run()
    save_memory(clip.teacher, denoiser=False)
    try: assert_close(run(), plain, rtol=1e-4, atol=1e-6)
    finally: save_memory(clip.teacher, denoiser=False, decode=0)


def test_history_leaves_nothing_behind(clip):
    "What backward waits for does not grow with the place of the window"
    def kept(start):
        leaf = clip.z.clone().requires_grad_()
        with Meter("cpu") as m, m.phase("decode"): x = clip.teacher.decode(leaf, torch.arange(start, start + 21))
        return m.phases["decode"]["kept"] + 0*x.numel()
    early, late = kept(5), kept(60)
    assert early == pytest.approx(late, rel=.05)


@pytest.mark.parametrize("start", [0, 1, 5, 9, 43, 60])
def test_a_short_history_starts_in_the_middle(clip, start, monkeypatch):
    "Two latents of warm-up: their frames are dropped, and all others have their own numbers"
    seen, real, teacher = [], clip.teacher.vae.decode, clip.teacher
    monkeypatch.setattr(teacher, "warm_up", 2)
    monkeypatch.setattr(teacher.vae, "decode", lambda z: seen.append(z.shape[2]) or real(z))
    frames = torch.arange(start, start + 21)
    first = max(0, -(-start//4) - 2)
    with torch.no_grad():
        got = teacher.decode(clip.z, frames)
        alone = teacher.decode(clip.z[:, :, first:])[:, :, frames - 4*first]
    assert_close(got, alone, atol=1e-6, rtol=0)
    assert seen[0] <= 8
    error = (got - clip.whole[:, :, frames]).abs().max()
    assert error < 1e-6 if first == 0 else 1e-4 < error
    monkeypatch.setattr(teacher, "warm_up", 0)
    with pytest.raises(UserError, match="warm_up is 0: give 1 or more"): teacher.decode(clip.z, frames)


def test_a_longer_history_is_better(clip, monkeypatch):
    vae = clip.teacher.vae
    weights = {n: p.clone() for n, p in vae.state_dict().items()}
    try:
        for m in vae.decoder.modules():                      # the present has most of the weight
            if isinstance(m, torch.nn.Conv3d) and m.kernel_size[0] > 1: m.weight.data[:, :, :-1] *= .1
        with torch.no_grad(): whole, got = clip.teacher.decode(clip.z), []
        for n in (1, 2, 4, 6, None):
            monkeypatch.setattr(clip.teacher, "warm_up", n)
            with torch.no_grad(): got.append((clip.teacher.decode(clip.z, torch.arange(41, 62)) - whole[:, :, 41:62]).square().mean().item())
    finally: vae.load_state_dict(weights)
    assert got == sorted(got, reverse=True) and got[3] < .01*got[0] and got[4] < 1e-12


def test_the_decoder_is_itself_again(clip):
    decoder = clip.teacher.vae.decoder
    with pytest.raises(ZeroDivisionError), as_history(decoder, 3): 1/0
    assert "forward" not in vars(decoder)
    with torch.no_grad(): assert_close(clip.teacher.decode(clip.z), clip.whole, atol=0, rtol=0)


@pytest.mark.parametrize("kind, reach", [(dict(dim_mult=[1, 1], num_res_blocks=0, temperal_downsample=[True]), 19.),
                                         (dict(dim_mult=[1, 1, 1], num_res_blocks=0, temperal_downsample=[True, True]), 20.5)])
def test_reach_is_what_a_changed_latent_shows(kind, reach):
    "Counted by hand, and the latent just within it changes the last frame, the one beyond it does not"
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, latents_mean=[0.]*4, latents_std=[1.]*4, **kind).double().eval().requires_grad_(False)
    assert reach_of(vae) == reach
    z = torch.randn(1, 4, 26, 2, 2, generator=make_gen(0), dtype=torch.float64).requires_grad_()
    x = vae.decode(z).sample[:, :, -1]
    hit = torch.autograd.grad(x.square().sum(), z)[0].abs().sum((0, 1, 3, 4)).nonzero().flatten()
    assert 0 <= reach - (25 - hit.min()) < 1


def test_every_latent_gets_a_gradient_of_the_rewards():
    teacher = tiny_wan(frames=49, size=(16, 16))
    model = Distillation(Student(teacher, 2), Objective(image_frames=1, video_frames=2, window=9), colour, colour)
    reached = torch.zeros(13)
    for i in range(40):
        x0 = (.1*torch.randn(1, *teacher.latent_shape, generator=make_gen(i))).requires_grad_()
        j_img, j_vid, *_ = model.rewards(x0, ["a"], draw(model.cfg, (1, *teacher.latent_shape), make_gen(i)))
        now = torch.autograd.grad((j_img + j_vid).sum(), x0)[0].abs().sum((0, 1, 3, 4))
        assert (now > 0).sum() <= 3                                                  # a window of 9 frames is 3 latents
        reached += now
    assert (reached > 0).all()


# ---- how many

def test_the_number_is_the_reward_s_own():
    assert [video_frames_of(Objective(), r) for r in (Looks(8), Looks(16), Looks(0), Looks(1), colour, None)] == [8, 16, 4, 4, 4, 4]
    assert video_frames_of(Objective(video_frames=6), Looks(0)) == 6 and video_frames_of(Objective(video_frames=8), Looks(8)) == 8
    inside = mix({mix({Looks(8): 1., colour: 2.}): 1., Looks(0, "any"): 1.})
    assert frames_wanted(inside) == {"looks": 8, "any": 0} and video_frames_of(Objective(), inside) == 8
    with pytest.raises(UserError, match="a: 8, b: 16"): frames_wanted(None) or agreed_frames(dict(a=8, b=16))
    with pytest.raises(UserError, match="looks looks at 8 frames but video_frames is 4: give --video_frames 8"):
        video_frames_of(Objective(video_frames=4), inside)
    with pytest.raises(UserError, match="image_frames is 0"): Objective(image_frames=0)


@pytest.fixture(scope="module")
def student(): return Student(load_teacher("tiny"), 2)


def test_a_wrong_number_is_refused_when_the_step_is_built(student):
    assert Distillation(student, Objective(), Looks(8), Looks(8)).cfg.video_frames == 8       # an image reward may state what it likes
    for more, words in ((dict(video_frames=4), "give --video_frames 8"), (dict(window=4), "give --window 8 or more, up to 8"),
                        (dict(window=9), "window 9 does not fit a clip of 8"), (dict(image_frames=9), "image_frames 9 does not fit a clip of 8")):
        with pytest.raises(UserError, match=words): Distillation(student, Objective(**more), colour, Looks(8))
    with pytest.raises(UserError, match="video_frames 16 does not fit a clip of 8.*--frames 16 or more"):
        Distillation(student, Objective(), colour, Looks(16))
    assert Distillation(student, Objective(beta_vid=0, video_frames=4), colour, Looks(16)).cfg.beta_vid == 0   # never asked


def test_the_step_gives_the_reward_its_frames(student):
    rm = Looks(8)
    model = Distillation(student, Objective(beta_img=0), None, rm)
    x0 = torch.randn(2, *student.teacher.latent_shape, generator=make_gen(0))
    with torch.no_grad(): model.rewards(x0, ["a", "b"], draw(model.cfg, x0.shape, make_gen(0)))
    assert rm.seen == [8]


def test_names_are_enough_to_refuse(tmp_path, capsys):
    "Before the teacher, of which no more is there than its kind, and the weights of the reward are looked for"
    (tmp_path/"none/unet").mkdir(parents=True)
    (tmp_path/"none/unet/config.json").write_text('{"_class_name": "UNet3DConditionModel"}')
    assert named_frames(["hpsv2.1=2", "internvideo2@file.pt"]) == INTERNVIDEO2.frames == 8
    with pytest.raises(UserError, match="internvideo2 looks at 8 frames but video_frames is 4"):
        Trainer(Config(out=str(tmp_path/"o"), teacher=str(tmp_path/"none"), reward="hpsv2.1,internvideo2", track="",
                       objective=Objective(video_frames=4)))
    assert not (tmp_path/"o").exists()
    assert main(["distill", "--teacher", str(tmp_path/"none"), "--reward", "viclip-l14", "--video_frames", "4",
                 "--out", str(tmp_path/"o"), "--track", ""]) == 2
    assert "give --video_frames 8, or leave it out" in capsys.readouterr().err


def test_looks_give_the_reward_its_frames(student):
    rm = Looks(8)
    model = SimpleNamespace(image_reward=None, video_reward=rm)
    trainer = SimpleNamespace(model=model, cfg=SimpleNamespace(objective=Objective()),
                              accelerator=SimpleNamespace(unwrap_model=lambda m: m, device=torch.device("cpu")))
    assert Watcher._trained(SimpleNamespace(trainer=trainer), False) == dict(r_vid=(rm, 8))


# ---- what is planned

@pytest.mark.parametrize("t, window, m, M", [(81, 21, 8, 2), (81, 21, 16, 6), (81, 21, 21, 21), (16, 16, 8, 2), (8, 8, 1, 1)])
def test_the_plan_is_made_for_the_widest_frames(t, window, m, M):
    model = SimpleNamespace(cfg=Objective(video_frames=m, image_frames=M), window=window,
                            student=SimpleNamespace(teacher=SimpleNamespace(video_shape=(3, t))))
    got = _most_frames(model)
    both = torch.cat([*got.values()]).unique()
    assert (len(got["video_frames"]), len(got["image_frames"])) == (m, M) and len(both) == min(window, m + M)
    assert both.max() == t - 1 and (both.min() == t - window or len(both) == 1)
    model.cfg = replace(model.cfg, beta_vid=0)
    alone = _most_frames(model)
    assert len(alone["video_frames"]) == 0 and len(alone["image_frames"].unique()) == M and alone["image_frames"].min() == t - window


def test_the_plan_holds_for_any_step():
    teacher = tiny_wan(frames=33, size=(16, 16))
    model = Distillation(Student(teacher, 2), Objective(window=9), colour, colour)
    most = metered(replace_functions(model)).phases["decode"]["kept"]
    def kept(d):
        x0 = torch.randn(1, *teacher.latent_shape, generator=make_gen(0)).requires_grad_()
        with Meter("cpu") as m, m.phase("decode"):
            x = teacher.decode(x0, torch.cat([d.image_frames, d.video_frames]).unique())
        return m.phases["decode"]["kept"] + 0*x.numel()
    each = [kept(draw(model.cfg, (1, 1, 1, 1, 1), make_gen(i)).resolve(33, model.cfg, 9)) for i in range(8)]
    assert max(each) <= most*1.02 < 3*max(each)


def replace_functions(model):
    "The same step with modules for rewards, as the meter needs them"
    return Distillation(model.student, model.cfg, Looks(1), Looks(0))
