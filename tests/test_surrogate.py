"Any judge as a reward: a function without a gradient, its surrogate, and training with both"
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import launching
import pytest
import torch

from t2v_turbo.cli import main
from t2v_turbo.core import make_gen
from t2v_turbo.distill import Distillation, Objective
from t2v_turbo.files import UserError
from t2v_turbo.rewards.blackbox import BlackBox
from t2v_turbo.rewards.names import rewards_from
from t2v_turbo.standins import tiny_modelscope, tiny_sana, tiny_wan
from t2v_turbo.student import Student
from t2v_turbo.surrogate import (
    READS,
    Follower,
    NoFollower,
    Surrogate,
    follow,
    follower_of,
    hidden,
    next_block,
    trust,
)
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.train import Config, Trainer

VIDEO = Objective(k=50, beta_img=0., beta_vid=.5, shape="raw")


def redness(clips, prompts): return clips[:, 0].mean((1, 2, 3)) - clips[:, 2].mean((1, 2, 3))


def trainer(out, judge=redness, **kw):
    kw = dict(steps=3, batch=2, rank=2, seed=3, track="", objective=VIDEO, save_every=100) | kw
    return Trainer(Config(out=str(out), **kw), video_reward=BlackBox(judge.__name__, judge))


def rows_of(out): return [json.loads(l) for l in (out / "log.jsonl").read_text().splitlines()]


def test_a_linear_judge_is_learned():
    "Regression on answers finds the judge: on fresh latents the correlation is near 1"
    net, gen = Surrogate(4, 8), make_gen(0)
    opt = torch.optim.AdamW(net.parameters(), 3e-3)
    judge = lambda x: x[:, 0].mean((1, 2, 3)) * 30 + 2
    for _ in range(150):
        x = torch.randn(32, 4, 2, 8, 8, generator=gen)
        (net(x, torch.zeros(32, 8)) - (judge(x) - 2) / 3).square().mean().backward()
        opt.step(); opt.zero_grad()
    x = torch.randn(64, 4, 2, 8, 8, generator=gen)
    assert trust(torch.stack([net(x, torch.zeros(64, 8)).detach(), judge(x)], 1)) > .9


def test_without_a_judge_nothing_changes(tmp_path):
    t = Trainer(Config(out=str(tmp_path), steps=1, batch=2, rank=2, track="", objective=Objective(k=50, beta_img=0., beta_vid=0.)))
    assert isinstance(t.follower, NoFollower) and type(t.model).__name__ == "Distillation" and t.state()["follower"] is None
    t.backward(); t.update()
    assert not [k for k in t.told if k.startswith("judge")]


@pytest.mark.parametrize("more", [dict(), dict(ema=.5, accumulate=2, judge_every=2, judge_steps=2, save_memory="all"), dict(lambda_score=.3),
                                  dict(judge_reads="teacher", save_memory="all", accumulate=2)])
def test_stopped_and_resumed_to_the_bit(tmp_path, more):
    "Two steps and one more are three: student, surrogate, answers, the log"
    whole = trainer(tmp_path / "a", **more)
    for _ in whole.fit(): pass
    rows = trainer(tmp_path / "b", **more).fit(); next(rows); next(rows); rows.close()
    again = trainer(tmp_path / "b", **more)
    assert again.resume() and again.step == 2
    for _ in again.fit(): pass
    nets = [list(t.model.surrogate.parameters()) for t in (whole, again)]
    assert all(map(torch.equal, whole.params, again.params)) and all(map(torch.equal, *nets))
    keys = ("loss", "j_vid", "judge_loss", "judge_trust", "grad_norm")
    assert [[r[k] for k in keys] for r in rows_of(tmp_path / "a")] == [[r[k] for k in keys] for r in rows_of(tmp_path / "b")]
    assert not any(p.requires_grad for p in nets[0])
    with pytest.raises(UserError, match="made with other settings"): trainer(tmp_path / "b", **more | dict(judge_lr=.1)).resume()
    with pytest.raises(UserError, match="made with another video reward"): trainer(tmp_path / "b", lambda c, p: redness(c, p), **more).resume()


@pytest.mark.parametrize("reads", READS)
def test_the_pull_is_the_surrogates(tmp_path, reads):
    "The student's gradient changes with the surrogate, times the trust in it; the judge itself has none"
    t = trainer(tmp_path, judge_reads=reads)
    net = t.model.surrogate
    with torch.no_grad():
        for p in net.parameters(): p.normal_(0, .1, generator=make_gen(1))
    def gradient(trusted):
        t.model.trusted = trusted
        t.backward()
        g = torch.cat([p.grad.flatten() for p in t.params])
        t.engine.opt.zero_grad(); t.follower.seen = []
        return g
    none, half, whole, negative = map(gradient, (0., .5, 1., -1.))
    assert (whole - none).norm() > 1e-6 and torch.equal(none, negative)
    torch.testing.assert_close(half - none, (whole - none) / 2, rtol=1e-3, atol=1e-6)


KINDS = dict(modelscope=lambda p: load_teacher(tiny_modelscope(p / "m")), wan=lambda p: tiny_wan(),
             sana=lambda p: load_teacher(tiny_sana(p / "s"), frames=5, size=(32, 32)), tiny=lambda p: load_teacher("tiny"), flow=lambda p: load_teacher("tiny-flow"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_blocks_of_every_teacher_are_read(kind, tmp_path):
    "Tokens with a gradient in the latents, without adapters, and the rest of the network is not run"
    student = Student(KINDS[kind](tmp_path), rank=2)
    with torch.no_grad():
        for n, p in student.trainable().items(): p.normal_(0, .1, generator=make_gen(len(n)))
    ctx = student.teacher.encode_text(["a red fish moving left in the sea", ""])
    x = torch.randn(2, *student.teacher.latent_shape, generator=make_gen(0)).requires_grad_()
    ran, after = [], next_block(student.teacher.denoiser)
    hook = after.register_forward_hook(lambda *_: ran.append(1))
    with student.as_teacher() as teacher: h = hidden(teacher, x, ctx)
    assert h.ndim == 3 and len(h) == 2 and h.dtype == torch.float32 and not ran
    g, = torch.autograd.grad(h.square().sum(), x)
    assert g.flatten(1).norm(dim=1).min() > 0 and g.isfinite().all()
    with torch.no_grad():
        moved = hidden(student.teacher, x, ctx)
        teacher.denoise(x, torch.zeros(2, dtype=torch.long), ctx)
    hook.remove()
    assert not torch.allclose(h, moved) and ran


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path, dtype):
    "The head on the first blocks pulls as in float32"
    pulls = {}
    for d in ("float32", dtype):
        t = trainer(tmp_path / d, dtype=d, judge_reads="teacher")
        with torch.no_grad():
            for p in t.model.surrogate.parameters(): p.normal_(0, .1, generator=make_gen(1))
        teacher = t.student.teacher
        x = torch.randn(2, *teacher.latent_shape, generator=make_gen(0)).requires_grad_()
        ctx = teacher.encode_text(["a red fish moving left in the sea", "a blue cat spinning at night"])
        s = t.model.predicted(x, ctx)
        pulls[d], = torch.autograd.grad(s.sum(), x)
    a, b = pulls.values()
    assert torch.cosine_similarity(a.flatten(), b.flatten(), 0) > .99 and (b == 0).float().mean() < .01


def test_what_cannot_be_read_is_refused(tmp_path):
    for more in (dict(compile=1), dict(rank=0)):
        with pytest.raises(UserError, match="judge_reads teacher stops inside the teacher's denoiser"): trainer(tmp_path, judge_reads="teacher", **more)
    engine = SimpleNamespace(sharded=True, bare=follow(Distillation(Student(load_teacher("tiny"), rank=2), VIDEO, None, BlackBox("redness", redness)), 0, "teacher"))
    with pytest.raises(UserError, match="which FSDP and ZeRO do not allow"): follower_of(engine, None)
    with pytest.raises(UserError, match="judge_reads 'pixels'"): trainer(tmp_path, judge_reads="pixels")


@pytest.mark.parametrize("reads", READS)
def test_pieces_do_not_change_the_answers(tmp_path, reads):
    got = []
    for n in (1, 2):
        t = trainer(tmp_path / str(n), accumulate=n, judge_reads=reads)
        t.backward(); t.update()
        got.append(t.follower.answers)
    a, b = got
    torch.testing.assert_close(a.score, b.score, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.read, b.read, rtol=1e-2, atol=1e-2)


def test_a_judge_that_fails_is_named(tmp_path):
    t = trainer(tmp_path, lambda clips, prompts: [float("nan")] * len(clips))
    with pytest.raises(UserError, match="judge <lambda> returned scores .*return one finite number a clip"):
        for _ in t.fit(): pass


def test_predictions_that_are_nan_are_not_asked_about(tmp_path):
    t = trainer(tmp_path)
    t.backward()
    t.follower.seen = [(x * torch.nan, p, c) for x, p, c in t.follower.seen]
    t.update(skip=True)
    assert "judge" not in t.told and len(t.follower.answers) == 0


def test_noise_is_reported_and_redness_is_followed():
    class Engine:
        class accelerator: device = "cpu"; gather = staticmethod(lambda x: x)
    gen = make_gen(0)
    def noise(clips, prompts): return torch.rand(len(clips), generator=gen)
    for judge, followed in ((redness, True), (noise, False)):
        engine = Engine()
        engine.bare = follow(Distillation(Student(load_teacher("tiny"), rank=2), VIDEO, None, BlackBox(judge.__name__, judge)))
        f = Follower(engine)
        def run():
            for i in range(12):
                x0 = torch.randn(8, 16, 8, 8, 8, generator=make_gen(i)) * torch.rand(8, 1, 1, 1, 1, generator=make_gen(i))
                f.see(SimpleNamespace(x0=x0), [""] * 8, torch.zeros(8, 1, engine.bare.surrogate.words.in_features))
                f.learn(i)
        if followed: run()
        else:
            with pytest.warns(UserWarning, match="does not follow judge noise"): run()
        assert (f.model.trusted > .5) == followed


def test_on_the_command_line(tmp_path, capsys, monkeypatch):
    "Wrong names are refused before anything is written; a right one trains and its scores are in the log"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "votes.py").write_text("def count(clips, prompts): return [c.mean().item() for c in clips]\n")
    small = ["--steps", "2", "--batch", "2", "--rank", "2", "--repeats", "1", "--track", "", "--out", "o", "--beta_img", "0"]
    for reward, why in (("judge", "names no function"), ("judge=votes:no", "has no function 'no'"), ("judge=nowhere:f", "cannot be imported"),
                        ("tiny-video,judge=votes:count", "leave out tiny-video")):
        assert main(["distill", *small, "--reward", reward]) == 2 and why in capsys.readouterr().err
        assert not (tmp_path / "o").exists()
    assert rewards_from(["tiny-image=1", "judge=votes:count"])["video"].where == "votes:count"
    assert main(["distill", *small, "--reward", "judge=votes:count", "--dry_run"]) == 0


TWO = launching.MOVED + """from t2v_turbo.rewards.blackbox import BlackBox
def redness(clips, prompts): return clips[:, 0].mean((1, 2, 3)) - clips[:, 2].mean((1, 2, 3))
def new(): return Trainer(Config(out=where, steps=3, batch=4, seed=3, rank=2, lr=1e-4, track="", save_every=2,
                                 objective=Objective(k=50, beta_img=0., beta_vid=.5), **more), video_reward=BlackBox("redness", redness))
t = new()
rows = [dict(row) for row in t.fit()]
params = [whole(p.detach()) for p in t.params]
if t.accelerator.is_main_process:
    torch.save(dict(n=t.accelerator.num_processes, rows=rows, params=params, score=t.follower.answers.score), where + ".pt")
    t.store.path(3).unlink()
t.accelerator.wait_for_everyone()
again = new()
assert again.resume() and again.step == 2
rows_again = [dict(row) for row in again.fit()]
assert rows_again[-1]["loss"] == rows[-1]["loss"] and rows_again[-1]["judge_loss"] == rows[-1]["judge_loss"]
"""


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_share_their_answers(tmp_path, engine):
    "gloo, sharded or not: the answers, losses and weights of one process; resumed there to the bit"
    script = tmp_path / "two.py"
    script.write_text(TWO)
    words = lambda name: [str(tmp_path / name), "{}", str(Path(__file__).parent)]
    run = subprocess.run([sys.executable, script, *words("one")], env=launching.ENV, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr[-2000:]
    launching.launch(engine, script=script, more=words(engine), seconds=1800)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("one", engine))
    assert two["n"] == 2
    for a, b in zip(one["rows"], two["rows"]):
        for k in ("loss", "cd", "judge", "judge_loss"): assert abs(a[k] - b[k]) < 1e-3 * max(1., abs(a[k])), k
    torch.testing.assert_close(one["score"].sort()[0], two["score"].sort()[0], rtol=1e-3, atol=1e-4)
    assert sum((p - q).square().sum() for p, q in zip(one["params"], two["params"])) < 1e-4 * sum(p.square().sum() for p in one["params"])
