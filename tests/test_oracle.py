"Properties of the mathematics, measured against closed forms and against diffusers"
import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from t2v_turbo.consistency import (
    boundary,
    cd_loss,
    consistency_fn,
    few_step_grid,
    few_step_sample,
    pseudo_huber,
)
from t2v_turbo.core import make_gen
from t2v_turbo.files import UserError
from t2v_turbo.gaussian import Gaussian, Mixture
from t2v_turbo.schedule import Schedule, vp_abar
from t2v_turbo.solver import DDIM, ddim_grid, ddim_sample, guide, guided_step

SCHED = Schedule(vp_abar())
G = Gaussian(.5, .4, SCHED)
CONFIG = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear")


def full(n, v): return torch.full((n,), v, dtype=torch.long)


def teacher_step(ddim, z, i):
    "One DDIM step of the exact teacher"
    eps = G.eps(z, ddim.t(i))
    return ddim.step(SCHED.x0_from_eps(z, eps, ddim.t(i)), eps, i)


def walk(n, z):
    "The exact teacher from t=999 to t=0 in `n` DDIM steps"
    ddim = DDIM(SCHED, n)
    for i in range(n-1, -1, -1): z = teacher_step(ddim, z, full(len(z), i))
    return z


def pair_noise(n=8, shape=(4, 3, 5, 6), seed=0):
    "Clean data, noise and timesteps that include both ends"
    z0, noise = torch.randn(2, n, *shape, generator=make_gen(seed))
    t = torch.randint(1000, (n,), generator=make_gen(seed+1))
    t[0], t[-1] = 0, 999
    return z0, noise, t


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_round_trip(kind):
    z0, noise, t = pair_noise()
    zt = SCHED.add_noise(z0, noise, t)
    out = dict(epsilon=noise, v_prediction=SCHED.v(z0, noise, t), sample=z0)[kind]
    x0, eps = SCHED.x0_eps(zt, out, t, kind)
    assert_close(x0, z0, atol=2e-5, rtol=0)
    assert_close(eps, noise, atol=1e-4, rtol=0)
    assert_close(SCHED.add_noise(x0, eps, t), zt, atol=1e-5, rtol=0)


def test_half_precision_is_converted_in_float32():
    z0, noise, t = pair_noise()
    zt = SCHED.add_noise(z0.half(), noise.half(), t)
    x0, eps = SCHED.x0_eps(zt, noise.half(), t, "epsilon")
    assert (zt.dtype, x0.dtype, eps.dtype) == (torch.half, torch.float32, torch.float32)


def test_solver_is_first_order():
    z = torch.linspace(-2.5, 2.5, 101)[:, None]
    exact = G.flow(z, full(101, 999), full(101, 0))
    err = {n: (walk(n, z) - exact).abs().max() for n in (10, 100, 1000)}
    for a, b in ((10, 100), (100, 1000)):
        order = (err[a]/err[b]).log10()
        assert .85 < order < 1.15, f"order {order:.2f} from {a} to {b} steps"


def test_invert_undoes_step():
    z0, noise, _ = pair_noise()
    for n in (50, 200):
        ddim, i = DDIM(SCHED, n), torch.randint(n, (8,), generator=make_gen(3))
        zt = SCHED.add_noise(z0, noise, ddim.t(i))
        assert_close(ddim.invert(ddim.step(z0, noise, i), noise, ddim.t(i)), zt, atol=1e-5, rtol=0)


def test_boundary_is_the_identity_on_clean_data():
    z, x0, _ = pair_noise()
    assert_close(consistency_fn(z, x0, full(8, 0)), z, atol=0, rtol=0)
    assert_close(consistency_fn(z, x0, full(8, 19)), x0, atol=1e-4, rtol=0)
    assert boundary(torch.tensor([19]))[0] < 1e-5


def test_exact_map_is_self_consistent():
    z, t = torch.linspace(-2, 2, 50)[:, None], full(50, 999)
    end = G.consistency(z, t)
    for s in (0, 1, 19, 259, 759, 998):
        s = full(50, s)
        assert_close(G.consistency(G.flow(z, t, s), s), end, atol=1e-5, rtol=0)


def test_mixture_flow_agrees_with_the_gaussian_and_keeps_the_distribution():
    z, t, s = torch.linspace(-2, 2, 50)[:, None], full(50, 999), full(50, 0)
    assert_close(Mixture([.5], .4, [1.], SCHED).flow(z, t, s), G.flow(z, t, s), atol=1e-3, rtol=0)
    mix = Mixture([-1., 1.], .25, [.3, .7], SCHED)
    z = torch.randn(4000, 1, generator=make_gen(0))
    x = mix.flow(z, full(4000, 999), full(4000, 0), steps=60)
    assert_close((x > 0).float().mean(), torch.tensor(.7), atol=.03, rtol=0)


def target_error(k, n=2000):
    "How far one solver step of k timesteps leads off the curve, measured at its end"
    ddim, gen = DDIM(SCHED, 1000//k), make_gen(0)
    i = torch.randint(1, ddim.n, (n,), generator=gen)
    z0, noise = torch.randn(2, n, 1, generator=gen)
    z = SCHED.add_noise(G.mean + G.std*z0, noise, ddim.t(i))
    end = G.consistency(z, ddim.t(i))
    return (G.consistency(teacher_step(ddim, z, i), ddim.t_prev(i)) - end).abs().mean().item()


def test_target_bias_grows_with_the_skip():
    errs = [target_error(k) for k in (5, 10, 20, 50, 100)]
    assert errs == sorted(errs)
    assert errs[-1] > 10*errs[0]


MIX = Mixture([-1., 1.], .25, [.5, .5], SCHED)


def denoise(zt, t, ctx):
    "A conditional teacher: ctx holds the label, -1 for none"
    eps = MIX.eps(zt, t, ctx[:, 0])
    return SCHED.x0_from_eps(zt, eps, t), eps


def test_guided_step():
    ddim, z = DDIM(SCHED, 50), torch.randn(50, 1, generator=make_gen(0))
    i, cond, null = torch.arange(50), torch.ones(50, 1).long(), torch.tensor([[-1]])
    plain, free = [ddim.step(*denoise(z, ddim.t(i), c), i) for c in (cond, null.expand(50, 1))]
    assert_close(guided_step(ddim, denoise, z, i, 0., cond, null), plain)   # w=0: the teacher
    w = torch.linspace(0, 15, 50)
    got = guided_step(ddim, denoise, z, i, w, cond, null)
    assert_close(got, guide(plain, free, w), atol=1e-4, rtol=1e-4)          # eq. 7
    eps = guide(*[denoise(z, ddim.t(i), c)[1] for c in (cond, null.expand(50, 1))], w)
    assert_close(got, ddim.step(SCHED.x0_from_eps(z, eps, ddim.t(i)), eps, i), atol=1e-3, rtol=1e-4)


def test_sampler_reaches_the_prompt():
    z, cond = torch.randn(1000, 1, generator=make_gen(0)), torch.ones(1000, 1).long()
    *_, (i, z, x) = ddim_sample(DDIM(SCHED, 50), denoise, z, 0., cond, torch.tensor([[-1]]))
    assert i == 0
    assert_close(torch.stack([x.mean(), x.std()]), torch.tensor([1., .25]), atol=.04, rtol=0)


def test_loss_is_per_sample_and_stops_the_gradient():
    a, b = [x.requires_grad_() for x in torch.randn(2, 4, 3, 2, 5, 5, generator=make_gen(0))]
    loss = cd_loss(a, b)
    assert loss.shape == (4,)
    loss.mean().backward()
    assert a.grad is not None and b.grad is None
    assert_close(cd_loss(a, a), torch.zeros(4))
    assert pseudo_huber(a.half(), b.half()).dtype == torch.float32


def test_every_grid_ends_at_the_noise():
    "Ascending, evenly spaced up to one timestep, exactly even where n divides T"
    for T in (1000, 999, 37):
        for n in range(1, T + 1):
            grid = ddim_grid(n, T)
            assert grid[-1] == T - 1 and grid[0] == T//n - 1 and len(grid) == n
            assert set(grid.diff().tolist()) <= {T//n, -(-T//n)} if T % n else set(grid.diff().tolist()) <= {T//n}
    for n in (1, 4, 50, 200, 1000): assert ddim_grid(n).tolist() == [1000//n*(i+1) - 1 for i in range(n)]
    for n in (3, 7, 30, 64): assert few_step_grid(2, n)[0] == 999 and len(few_step_grid(n, n)) == n


@pytest.mark.parametrize("n", [60, 300, 600])
def test_any_grid_samples_the_data(n):
    "The exact Gaussian from pure noise; and a step ends where the next begins"
    ddim, i = DDIM(SCHED, n), torch.arange(n)
    assert torch.equal(ddim.t_prev(i[1:]), ddim.t(i[:-1])) and ddim.t_prev(i[:1]).item() == 0
    z = torch.randn(8000, 1, generator=make_gen(0))
    want = walk(1000, z)
    assert (walk(n, z) - want).abs().mean() < .01 + 2/n
    z0, noise = torch.randn(2, n, 3, generator=make_gen(1))
    zt = SCHED.add_noise(z0, noise, ddim.t(i))
    assert_close(ddim.invert(ddim.step(z0, noise, i), noise, ddim.t(i)), zt, atol=1e-4, rtol=0)


def test_few_step_grid():
    assert few_step_grid(1) == [999] and few_step_grid(2, 200) == [999, 499]
    for n in range(1, 51): assert len(few_step_grid(n)) == n
    for n in (0, -1, 51):
        with pytest.raises(UserError, match="choose 1 to 50"): few_step_grid(n)


def test_ddim_step_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    ref = diffusers.DDIMScheduler(**CONFIG, clip_sample=False, set_alpha_to_one=False)
    ref.set_timesteps(50)                       # its grid differs, a single step of 20 does not
    ours, (z, eps, _) = DDIM(Schedule.from_diffusers(ref), 50), pair_noise()
    for i in (1, 7, 25, 49):
        i = full(8, i)
        got = ours.step(ours.schedule.x0_from_eps(z, eps, ours.t(i)), eps, i)
        assert_close(got, ref.step(eps, ours.t(i)[0], z).prev_sample, atol=1e-5, rtol=1e-5)
    first = ref.step(eps, torch.tensor(19), z).prev_sample  # arrives at t=-1, for it abar_0
    i = full(8, 0)
    assert_close(ours.step(SCHED.x0_from_eps(z, eps, full(8, 19)), eps, i), first, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_few_steps_agree_with_diffusers(n):
    diffusers = pytest.importorskip("diffusers")
    ref = diffusers.LCMScheduler(**CONFIG, clip_sample=False, set_alpha_to_one=False,
                                 original_inference_steps=50, timestep_scaling=10.)
    steps = few_step_grid(n)
    ref.set_timesteps(timesteps=steps)          # its own spacing of few steps differs
    net = lambda z, t: .3*z + .1*torch.cos(t.view(-1, *[1]*(z.ndim-1))/100)
    f = lambda z, t: consistency_fn(z, SCHED.x0_from_eps(z, net(z, t), t), t)
    z, gen = pair_noise()[0], make_gen(9)
    noises = [torch.randn(z.shape, generator=gen) for _ in range(n-1)]
    gen, x = make_gen(9), z
    for (t, ours, _), tt in zip(few_step_sample(f, z, steps, SCHED, noises.__getitem__), ref.timesteps):
        out = ref.step(net(x, tt.expand(len(x))), tt, x, generator=gen)
        x = out.prev_sample
        assert t == tt
        assert_close(ours, out.denoised, atol=2e-5, rtol=1e-5)


class Student(nn.Module):
    "The teacher's data prediction plus a correction that starts at zero"
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(),
                                 nn.Linear(32, 1))
        gen = make_gen(0)
        for p in self.parameters():
            nn.init.normal_(p, 0, p.shape[-1]**-.5 if p.ndim == 2 else .1, generator=gen)
        for p in self.net[-1].parameters(): nn.init.zeros_(p)

    def forward(self, z, t):
        alpha, sigma = SCHED.alpha_sigma(t, z)
        fix = sigma*self.net(torch.cat([z, alpha, sigma], 1))  # without sigma it can run away
        return consistency_fn(z, SCHED.x0_from_eps(z, G.eps(z, t), t) + fix, t)


def distil(student, mu, steps=1500, batch=256):
    "Consistency distillation from the exact teacher; mu is the EMA rate of the target"
    ddim, gen, target = DDIM(SCHED, 50), make_gen(1), copy.deepcopy(student).requires_grad_(False)
    opt = torch.optim.Adam(student.parameters(), 2e-3)
    lr = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for _ in range(steps):
        i = torch.randint(50, (batch,), generator=gen)
        z0, noise = torch.randn(2, batch, 1, generator=gen)
        z = SCHED.add_noise(G.mean + G.std*z0, noise, ddim.t(i))
        with torch.no_grad(): goal = target(teacher_step(ddim, z, i), ddim.t_prev(i))
        opt.zero_grad()
        cd_loss(student(z, ddim.t(i)), goal).mean().backward()
        opt.step(); lr.step()
        for q, p in zip(target.parameters(), student.parameters()): q.lerp_(p.detach(), 1-mu)
    return student


@pytest.mark.parametrize("mu", [0., .95])
def test_student_learns_the_exact_map(mu):
    z, t = torch.randn(1000, 1, generator=make_gen(5)), full(1000, 999)
    error = lambda f: (f(z, t) - G.consistency(z, t)).abs().mean().item()
    before, after = error(Student()), error(distil(Student(), mu))
    print(f"mu={mu}: mean error {before:.3f} -> {after:.3f}")
    assert before > .25          # the teacher answers the mean
    assert after < .05           # the student answers the end of the curve
