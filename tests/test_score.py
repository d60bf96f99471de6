"The score term: closed forms on the oracle, four states of one set of weights, and training with it"
import itertools
import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import launching
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from t2v_turbo.consistency import consistency_fn
from t2v_turbo.core import make_gen
from t2v_turbo.critic import NoCritic
from t2v_turbo.distill import Objective
from t2v_turbo.files import UserError
from t2v_turbo.leash import kl
from t2v_turbo.memory import save_memory
from t2v_turbo.plan import Setup, predict
from t2v_turbo.saved import load_student
from t2v_turbo.schedule import Schedule, vp_abar
from t2v_turbo.score import Scored, ScoreDraw, draw_levels, draw_score, pull_loss, score_pull
from t2v_turbo.student import Student
from t2v_turbo.teachers.base import Teacher
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.teachers.wan import Flow
from t2v_turbo.train import Config, Trainer

ROOT = Path(__file__).resolve().parents[1]
PLAIN = Objective(beta_img=0., beta_vid=0.)
KINDS = dict(vp=(Schedule(vp_abar()), "epsilon"), flow=(Flow.shifted(3.), "flow_prediction"))
STD, AT = torch.tensor([1., .3]), 400                       # data N(0, STD^2), and the noise level of the term


# --- closed forms --------------------------------------------------------------------------------

def coefficients(schedule, kind, t):
    "alpha, sigma `(b, 1)` and the factor c of the perfect network, c z, in two coordinates `(b, 2)`"
    alpha, sigma = (v.reshape(-1, 1) for v in schedule.alpha_sigma(t, torch.zeros(len(t), 1)))
    c = (sigma if kind == "epsilon" else sigma - alpha*STD**2)/(alpha**2*STD**2 + sigma**2)
    return alpha, sigma, c


class Linear(nn.Module):
    "The perfect denoiser of Gaussian data as a network: a linear layer, which LoRA can change, times a known factor"
    dtype = torch.float32

    def __init__(self, schedule, kind):
        super().__init__()
        self.schedule, self.kind, self.t = schedule, kind, None
        self.layer, self.cond_proj = nn.Linear(2, 2, bias=False), nn.Linear(256, 2, bias=False)
        nn.init.eye_(self.layer.weight), nn.init.zeros_(self.cond_proj.weight)

    def forward(self, z, time, encoder_hidden_states, timestep_cond=None, return_dict=False):
        t = time if self.kind == "epsilon" else (self.schedule.sigma[:, None] - time/1000).abs().argmin(0)
        _, _, c = coefficients(self.schedule, self.kind, t.long())
        more = 0. if timestep_cond is None else self.cond_proj(timestep_cond)
        return (c*self.layer(z.flatten(1)) + more).view_as(z),


class Oracle(Teacher):
    "A teacher in closed form, of clips with two numbers"
    def __init__(self, name):
        nn.Module.__init__(self)
        self.schedule, self.prediction_type = KINDS[name]
        self.name, self.latent_shape, self.video_shape = "oracle", (2, 1, 1, 1), (3, 1, 8, 8)
        self.denoiser = Linear(self.schedule, self.prediction_type)
        self.requires_grad_(False)

    def fingerprints(self): return {}


def points(n):
    "All corners of a cube: their first and second moments are those of a standard normal"
    return torch.tensor(list(itertools.product([-1., 1.], repeat=n)))


def term(M, schedule):
    "KL of the noised student, x = M z, to the noised teacher"
    alpha, sigma = (v.item() for v in schedule.alpha_sigma(torch.tensor([AT]), torch.zeros(1)))
    noisy = lambda S: alpha**2*S + sigma**2*torch.eye(2)
    return kl(torch.zeros(2), noisy(M @ M.T), torch.zeros(2), noisy(torch.diag(STD**2))), noisy(M @ M.T)


@pytest.mark.parametrize("name", KINDS)
def test_gradient_is_the_closed_form_without_lora(name):
    "A student x = M z, and two denoisers that are formulas"
    schedule, _ = KINDS[name]
    M = torch.tensor([[.8, .2], [-.1, .5]], requires_grad=True)
    value, Q = term(M, schedule)
    want, = torch.autograd.grad(value, M)
    z, e = points(4).split(2, 1)
    t, x = torch.full((16,), AT), z @ M.T
    alpha, sigma = schedule.alpha_sigma(t, x)
    zt = (alpha*x + sigma*e).detach()
    mean = lambda S, V: zt @ torch.linalg.inv(V).T @ (alpha[0]*S).T           # the best guess of the data
    S, P = torch.diag(STD**2), alpha[0]**2*torch.diag(STD**2) + sigma[0]**2*torch.eye(2)
    g = score_pull(x, mean(S, P), mean((M @ M.T).detach(), Q.detach()), t, schedule, "exact")
    got, = torch.autograd.grad(2*pull_loss(x, g).mean(), M)                   # a mean over two elements
    assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_gradient_is_the_closed_form_with_lora(name):
    "The same through `Scored`: student and fake score are LoRA on the network that is the perfect teacher"
    teacher = Oracle(name)
    model = Scored(Student(teacher, rank=2), PLAIN, form="exact")
    student, schedule, kind = model.student, teacher.schedule, teacher.prediction_type
    layer = teacher.denoiser.layer
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.tensor([[.9, .3], [-.2, .8]]))
        size = .05 if name == "vp" else 1.                                   # an x0 out of noise is divided by alpha
        layer.lora_B["default"].weight.copy_(size*torch.tensor([[.5, -.2], [.1, .4]]))
        layer.lora_A["fake"].weight.copy_(torch.eye(2))
    A, B = (getattr(layer, f"lora_{k}")["default"].weight.detach().requires_grad_() for k in "AB")
    t = torch.tensor([999])
    x0 = lambda z: schedule.x0_eps(z, coefficients(schedule, kind, t)[2]*(z @ (torch.eye(2) + B @ A).T), t, kind)[0]
    M = consistency_fn(torch.eye(2), x0(torch.eye(2)), t.expand(2)).T        # the sampler with one call is linear
    value, Q = term(M, schedule)
    want = torch.autograd.grad(value, (A, B))
    alpha, sigma, c = coefficients(schedule, kind, torch.tensor([AT]))
    own = sigma*torch.eye(2) if kind == "epsilon" else sigma*torch.eye(2) - alpha*(M @ M.T)
    with torch.no_grad():                                                    # the perfect denoiser of these samples
        layer.lora_B["fake"].weight.copy_(own @ torch.linalg.inv(Q)/c.T - torch.eye(2))
    z, e = (v.view(16, 2, 1, 1, 1) for v in points(4).split(2, 1))
    d, ctx = ScoreDraw(z[None], torch.zeros(16), torch.full((16,), AT), e), torch.zeros(16, 1, 1)
    out = model(d, ctx, ctx)
    (2*out.loss.mean()).backward()
    for got, w in zip((layer.lora_A, layer.lora_B), want): assert_close(got["default"].weight.grad, w, rtol=0, atol=1e-5)
    assert layer.lora_B["fake"].weight.grad is None
    levels = torch.full((16,), AT), e                                        # and that denoiser is where the critic's loss is flat
    with student.as_fake(): (alpha.item()*model.denoising(out.x0, levels, ctx, d.w).mean()).backward()
    assert layer.lora_B["fake"].weight.grad.abs().max() < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_the_normalised_form_is_the_kls_in_units_of_the_teachers_error(name):
    schedule, gen = KINDS[name][0], make_gen(0)
    x, e, a, b = torch.randn(4, 3, 5, generator=gen)
    t = torch.tensor([50, 400, 900])
    alpha, sigma = schedule.alpha_sigma(t, x)
    x_T, x_F = x + sigma/alpha*(e - a), x + sigma/alpha*(e - b)              # noise predictions a and b
    error = (e - a).abs().mean(1, keepdim=True)
    for form, want in (("exact", alpha/sigma*(a - b)), ("kl", alpha/sigma*(a - b)/error), ("dmd", (a - b)/error)):
        assert_close(score_pull(x, x_T, x_F, t, schedule, form), want, rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="give one of kl, dmd, exact"): score_pull(x, x, x, t, schedule, "x0")


def test_the_loss_has_the_pull_as_gradient_and_half_its_square_as_value():
    x, g = torch.randn(2, 4, 3, 5, generator=make_gen(0))
    loss = pull_loss(x.requires_grad_(), g)
    loss.sum().backward()
    assert_close(x.grad, g/15); assert_close(loss, g.square().flatten(1).mean(1)/2)


# --- one set of weights --------------------------------------------------------------------------

def scored(again=False, teacher="tiny", size=.05, **kw):
    "A model whose student and fake score are away from their teacher"
    teacher = load_teacher(teacher)
    model = Scored(Student(teacher, rank=2), PLAIN, **kw)
    if again: save_memory(teacher)
    gen = make_gen(0)
    with torch.no_grad():
        for p in (*model.student.trainable().values(), *model.student.fake().values()): p.add_(size*torch.randn(p.shape, generator=gen))
    return model


def both_gradients(model, calls=2):
    teacher = model.student.teacher
    ctx = torch.randn(teacher.encode_text(["", ""]).shape, generator=make_gen(1))
    d = draw_score(PLAIN, teacher.latent_shape, [1, 2], 0, calls)
    out = model(d, ctx, ctx.flip(0))
    out.loss.mean().backward()
    assert all(p.grad is None for p in model.student.fake().values())
    mine = [p.grad.clone() for p in model.student.trainable().values()]
    with model.student.as_fake(): model.denoising(out.x0, (d.t, d.e), ctx, d.w).mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.student.trainable().values(), mine))
    return mine, [p.grad for p in model.student.fake().values()]


def test_recomputed_layers_use_the_same_adapter():
    "Gradient checkpointing runs a layer again in backward, with the LoRA that is active then"
    for kept, again in zip(both_gradients(scored()), both_gradients(scored(again=True))):
        assert all(map(torch.equal, kept, again)) and all(g.abs().max() > 0 for g in kept)


def test_a_gradient_through_the_last_call_alone(monkeypatch):
    model, graphs = scored(), []
    real = Student.forward
    monkeypatch.setattr(Student, "forward", lambda self, *a: graphs.append(torch.is_grad_enabled()) or real(self, *a))
    teacher = model.student.teacher
    ctx = teacher.encode_text([""])
    for calls in (1, 3):
        graphs.clear()
        assert model.simulate(draw_score(PLAIN, teacher.latent_shape, [1], 0, calls), ctx).requires_grad
        assert graphs == [False]*(calls - 1) + [True]
        with torch.no_grad(): assert not model.simulate(draw_score(PLAIN, teacher.latent_shape, [1], 0, calls), ctx).requires_grad


def test_clips_draw_alone_and_calls_together():
    all_, one = (draw_score(PLAIN, (2, 1, 2, 2), s, 7) for s in ([3, 4, 5], [4]))
    assert all(torch.equal(getattr(all_, n).select(1 if n == "noise" else 0, 1), getattr(one, n).select(1 if n == "noise" else 0, 0))
               for n in ("noise", "w", "t", "e"))
    assert {len(draw_score(PLAIN, (1,), [0], s).noise) for s in range(30)} == {1, 2, 3, 4}
    assert len(draw_score(replace(PLAIN, k=500), (1,), [0], 0).noise) <= 2   # a grid of two timesteps
    t, _ = draw_levels((1,), list(range(2000)))
    assert t.min() == 20 and t.max() == 979


def test_other_students_are_refused():
    from t2v_turbo.full import FullStudent
    with pytest.raises(UserError, match="give a LoRA rank"): Scored(FullStudent(load_teacher("tiny")), PLAIN)
    with pytest.raises(UserError, match="lambda_score is -1"): scored(lam=-1.)
    for bad, why in ((dict(lambda_score=-1.), "lambda_score is -1.0"), (dict(critic_lr=float("nan")), "critic_lr is nan"), (dict(critic_steps=0), "critic_steps is 0"),
                     (dict(lambda_score=1., rank=0), "rank 0 trains without LoRA")):
        with pytest.raises(UserError, match=why): Config(track="", **bad)


# --- training ------------------------------------------------------------------------------------

def trainer(out, **kw):
    kw = dict(steps=3, batch=2, rank=2, seed=3, lambda_score=.5, track="", objective=PLAIN, save_every=100) | kw
    return Trainer(Config(out=str(out), **kw))


def test_weight_zero_is_todays_loss_to_the_bit(tmp_path):
    "No second LoRA, no new row in the log; with a weight, the other terms of the first step keep their bits"
    off, on = trainer(tmp_path/"off", lambda_score=0.), trainer(tmp_path/"on")
    assert isinstance(off.critic, NoCritic) and type(off.model).__name__ == "Distillation" and off.state()["critic"] is None
    assert not [n for n, _ in off.student.named_parameters() if "fake" in n]
    a, b = off.backward(), on.backward()
    assert set(b) - set(a) == {"score"} and a["loss"] == a["cd"] == b["cd"]
    assert abs(b["loss"] - b["cd"] - .5*b["score"]) < 1e-6 and b["score"] > 0


def rows_of(out): return [json.loads(l) for l in (out/"log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("more", [dict(ema=.5, accumulate=2, save_memory="all", lr_schedule="linear", critic_steps=2, critic_lr=2e-3)])
def test_stopped_and_resumed_to_the_bit(tmp_path, more):
    "Two steps and one more are three: student, fake score, both optimisers, the log"
    whole = trainer(tmp_path/"a", **more)
    for _ in whole.fit(): pass
    rows = trainer(tmp_path/"b", **more).fit(); next(rows); next(rows); rows.close()
    again = trainer(tmp_path/"b", **more)
    assert again.resume() and again.step == 2
    for _ in again.fit(): pass
    assert all(map(torch.equal, whole.params, again.params)) and all(map(torch.equal, whole.critic.params, again.critic.params))
    assert all(p.abs().max() > 0 for p in whole.critic.params)
    keys = ("loss", "score", "critic", "critic_norm", "grad_norm")
    assert [[r[k] for k in keys] for r in rows_of(tmp_path/"a")] == [[r[k] for k in keys] for r in rows_of(tmp_path/"b")]
    file = tmp_path/"a/student/adapter_model.safetensors"
    assert not [n for n in load_file(file) if "fake" in n]
    assert type(load_student(tmp_path/"a/student")) is Student
    with pytest.raises(UserError, match="made with other settings"): trainer(tmp_path/"b", **more | dict(lambda_score=.4)).resume()


def test_pieces_do_not_change_the_gradients(tmp_path):
    got = []
    for n in (1, 2):
        t = trainer(tmp_path/str(n), accumulate=n)
        row = t.backward()
        mine = torch.cat([p.grad.flatten() for p in t.params])
        t.engine.opt.zero_grad()
        got.append((row, mine, t.critic._gradient(0), torch.cat([p.grad.flatten() for p in t.critic.params])))
    (r, g, c, f), (s, h, d, k) = got
    assert all(abs(r[n] - s[n]) < 1e-5 for n in r) and abs(c - d) < 1e-5
    assert (g - h).norm() < 1e-4*g.norm() and (f - k).norm() < 1e-4*f.norm()


def test_nan_ends_a_run_and_moves_nothing(tmp_path):
    "In the fake score's weights, it reaches the student's term; in its loss alone, the fake score stays"
    t = trainer(tmp_path/"a", max_skipped=2)
    with torch.no_grad(): t.critic.params[0].fill_(torch.nan)
    before = [p.clone() for p in t.params]
    with pytest.raises(UserError, match="no finite loss in 2 steps in a row, now step 2 .*score.*critic"):
        for _ in t.fit(): pass
    assert all(map(torch.equal, before, t.params)) and t.skipped == 2
    t = trainer(tmp_path/"b", max_skipped=2)
    t.model.denoising = lambda x, *_: Scored.denoising(t.model, x, *_)*torch.nan
    before = [p.clone() for p in t.critic.params]
    with pytest.raises(UserError, match=r"no finite loss in 2 steps in a row, now step 2 \(critic"):
        for _ in t.fit(): pass
    assert all(map(torch.equal, before, t.critic.params)) and t.skipped == 0


@pytest.mark.parametrize("how", ["bf16", "fp16", "float16"])
def test_half_precision(tmp_path, monkeypatch, how):
    "The launcher's autocast, and frozen weights in float16: gradients of student and fake score near those of float32; scales of their own in a checkpoint"
    def gradients(precision, dtype="float32"):
        AcceleratorState._reset_state(True)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        t = trainer(tmp_path/precision/dtype, dtype=dtype)
        with torch.no_grad():
            for p in (*t.params, *t.critic.params): p.add_(.02*torch.randn(p.shape, generator=make_gen(p.numel())))
        row = t.backward()
        mine = torch.cat([p.grad.flatten() for p in t.params])
        t.engine.opt.zero_grad()
        loss = t.critic._gradient(0)
        return t, row["score"], mine, loss, torch.cat([p.grad.flatten() for p in t.critic.params])
    try: _, a, g, c, f = gradients("no"); t, b, h, d, k = gradients(*(("no", how) if how == "float16" else (how,)))
    finally: monkeypatch.undo(); AcceleratorState._reset_state(True)
    assert abs(a - b) < .05*a and abs(c - d) < .05*c
    assert torch.cosine_similarity(g, h, 0) > .95 and torch.cosine_similarity(f, k, 0) > .95 and .9 < k.norm()/f.norm() < 1.1
    scaled = how != "bf16"
    assert (t.critic.precision.scaled, t.critic.state()["scale"] is not None) == (scaled, scaled)
    if not scaled: return
    t.critic.params[0].grad.fill_(torch.inf)                                 # an overflow halves the scale of the fake score alone
    before = t.critic.precision.scale, t.engine.precision.scale
    t.critic._update(1.)
    assert (2*t.critic.precision.scale, t.engine.precision.scale) == before and t.critic.in_a_row == 0


TWO = launching.MOVED + """def new(): return Trainer(Config(out=where, steps=2, batch=2, seed=3, rank=2, lr=1e-4, lambda_score=.5, track="", save_every=1,
                                 objective=Objective(beta_img=0., beta_vid=0.), **more))
t = new()
rows = [dict(row) for row in t.fit()]
params, fake = ([whole(p.detach()) for p in ps] for ps in (t.params, t.critic.params))
if t.accelerator.is_main_process:
    torch.save(dict(n=t.accelerator.num_processes, sharded=t.sharded, rows=rows, params=params, fake=fake), where + ".pt")
    t.store.path(2).unlink()
t.accelerator.wait_for_everyone()
again = new()
assert again.resume() and again.step == 1
again_rows = [dict(row) for row in again.fit()]
assert again_rows[-1]["loss"] == rows[-1]["loss"] and again_rows[-1]["critic"] == rows[-1]["critic"]
assert all(torch.equal(a, whole(b.detach())) for a, b in zip(params + fake, [*again.params, *again.critic.params]))
"""


def words_for(at, name): return list(map(str, (at/name, "{}", ROOT/"tests")))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "The script, and what one process makes with it"
    at = tmp_path_factory.mktemp("alone")
    script = at/"two.py"; script.write_text(TWO)
    run = subprocess.run([sys.executable, script, *words_for(at, "one")], env=launching.ENV, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr[-2000:]
    return script, torch.load(at/"one.pt", weights_only=True)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_take_the_steps_of_one(alone, tmp_path, engine):
    "gloo, sharded or not: losses, gradients and weights of one process; resumed there to the bit"
    (script, one), words = alone, words_for(tmp_path, engine)
    if engine == "fsdp2": launching.launch(engine, script=script, more=words, seconds=1800)
    else:
        with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = str(s.getsockname()[1])
        run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", port,
                              str(script), *words], env=launching.ENV, capture_output=True, text=True, timeout=1800)
        assert run.returncode == 0, run.stderr[-2000:]
    two = torch.load(tmp_path/f"{engine}.pt", weights_only=True)
    assert (two["n"], two["sharded"]) == (2, engine == "fsdp2")
    for a, b in zip(one["rows"], two["rows"]):
        for k in ("loss", "cd", "score", "critic"): assert abs(a[k] - b[k]) < 1e-4*max(1., abs(a[k])), k
        for k in ("grad_norm", "critic_norm"): assert abs(a[k] - b[k]) < 1e-3*a[k], k
    for n in ("params", "fake"):
        assert sum((p - q).square().sum() for p, q in zip(one[n], two[n])) < 1e-4*sum(p.square().sum() for p in one[n])


# --- plan ----------------------------------------------------------------------------------------

def test_memory_is_at_most_115_percent():
    "One base and two adapters: counted by the meter, at rank 4; a LoRA of a higher rank is a large part of so small a network"
    off, on = (predict(Setup("tiny", (), batch=2, dtype=torch.float32, rank=4, lambda_score=lam)) for lam in (0., 1.))
    assert on.total <= 1.15*off.total, (on.total, off.total)
    assert on.weights["adapters"] == 2*off.weights["adapters"] and on.weights["optimizer"] == 2*off.weights["optimizer"]
    assert {"simulate", "sample", "real score", "fake score", "score backward", "critic", "critic backward"} == on.phases.keys() - off.phases.keys()
