"Reward hacking in closed form: formulas against autograd, samples and trained networks; the picture to drag against the formulas"
import csv
import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from t2v_turbo.consistency import pseudo_huber
from t2v_turbo.core import make_gen
from t2v_turbo.gaussian import Gaussian, Mixture
from t2v_turbo.leash import (
    Leash,
    draw,
    fit,
    kl,
    kl_grad,
    landing,
    measure,
    price,
    score_loss,
    stiffness,
    threshold,
    tilt_linear,
    tilt_mixture,
    tilt_quadratic,
)
from t2v_turbo.schedule import Schedule, vp_abar
from t2v_turbo.solver import ddim_grid
from t2v_turbo.teachers.wan import Flow

ROOT = Path(__file__).resolve().parents[1]
VP, FLOW = Schedule(vp_abar()), Flow.shifted(3.)
THIN, A = Gaussian(torch.zeros(2), torch.tensor([1., .1]), VP), torch.ones(2)/2**.5
S, LEVELS = torch.diag(THIN.std**2), torch.arange(19, 200, 20)


def spd(seed, d=3):
    "A covariance and a mean, float64"
    x, m = torch.randn(d, d, generator=make_gen(seed)).double(), torch.randn(d, generator=make_gen(seed+9)).double()
    return m, x @ x.T + .3*torch.eye(d)


# --- formulas ------------------------------------------------------------------------------------

def test_gradient_of_kl_is_autograds():
    (m, C), (m0, C0) = spd(0), spd(1)
    m.requires_grad_(), C.requires_grad_()
    assert_close(kl_grad(m, C, m0, C0), torch.autograd.grad(kl(m, C, m0, C0), (m, C)))
    N = torch.distributions.MultivariateNormal
    assert_close(kl(m, C, m0, C0), torch.distributions.kl_divergence(N(m, C), N(m0, C0)))


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_the_tilt_is_the_optimum(kind):
    "At the optimum the gradient of KL - beta E[r] is 0, in the mean and in the covariance; beside it, it is not"
    (m0, C0), (c, A), beta = spd(2), spd(3), .7
    a = torch.randn(3, generator=make_gen(4)).double()
    m, C = tilt_linear(m0, C0, a, beta) if kind == "linear" else tilt_quadratic(m0, C0, A, c, beta)
    m, C = m.clone().requires_grad_(), C.clone().requires_grad_()
    reward = a @ m if kind == "linear" else -((m-c) @ A @ (m-c) + (A @ C).trace())/2
    for g in torch.autograd.grad(kl(m, C, m0, C0) - beta*reward, (m, C)): assert_close(g, torch.zeros_like(g), atol=1e-9, rtol=0)
    assert kl_grad(m + .1, C, m0, C0)[0].abs().max() > .01


def test_tilts_agree_with_weighted_samples():
    "Importance sampling: teacher's samples, weighted by e^(beta r)"
    x, beta = draw(THIN, 400_000, make_gen(0)), 1.2
    w = (beta*(x @ A)).softmax(0)[:, None]
    m, C = tilt_linear(THIN.mean, S, A, beta)
    assert_close((w*x).sum(0)/THIN.std, m/THIN.std, atol=.02, rtol=0)
    assert_close((w*(x-m)**2).sum(0)/THIN.std**2, C.diag()/THIN.std**2, atol=.03, rtol=0)
    best, curve = torch.tensor([1., .5]), torch.tensor([[2., .5], [.5, 3.]])
    w = (-beta*((x-best) @ curve*(x-best)).sum(1)/2).softmax(0)[:, None]
    m, C = tilt_quadratic(THIN.mean, S, curve, best, beta)
    assert_close((w*x).sum(0)/THIN.std, m/THIN.std, atol=.02, rtol=0)
    assert_close(w.T*(x-m).T @ (x-m), C, atol=.01, rtol=.03)
    two = Mixture([-1., 1.], .4, [.3, .7], VP)
    x, t = draw(two, 400_000, make_gen(1)), tilt_mixture(two, torch.ones(1), beta)
    w = (beta*x).softmax(0)
    assert_close((w*x).sum(), t.weights @ t.means[:, 0], atol=.01, rtol=0)
    assert_close((w*x**2).sum(), t.weights @ (t.means[:, 0]**2 + t.std**2), atol=.015, rtol=0)


@pytest.mark.parametrize("loss", ["square", "huber"])
@pytest.mark.parametrize("hold", [0., .4, 20.])
def test_forces_balance_where_the_student_lands(loss, hold):
    "Gradient of the library's own loss, the second leash and the reward: they sum to 0"
    push = torch.tensor([.1, -.24, .02]).double()                   # below 1/3, the threshold of three elements
    d = landing(push, hold, loss).requires_grad_()
    cd = (d**2).mean() if loss == "square" else ((d**2 + 1e-6).sqrt() - 1e-3).mean()
    assert_close(pseudo_huber(d[None], 0*d[None])[0], ((d**2 + 1e-6).sqrt() - 1e-3).mean().float(), atol=1e-6, rtol=1e-4)
    force, = torch.autograd.grad(cd + hold*(d**2).sum()/2 - push @ d, d)
    assert_close(force, torch.zeros(3).double(), atol=1e-7, rtol=0)


def test_the_threshold_of_the_constant_force():
    b = threshold(A)
    assert b == pytest.approx(2**-.5)
    assert landing(.999*b*A, loss="huber").max() < .03 and landing(1.001*b*A, loss="huber").isinf().all()
    held = landing(1.001*b*A, .1, "huber")                           # the weakest second leash ends the escape
    assert held.isfinite().all()
    one_sided = landing(torch.tensor([.6, .3]), loss="huber")        # each element by itself
    assert one_sided[0].isinf() and one_sided[1] < 2e-3


def test_equal_reward_in_standard_deviations():
    g, nats, off = price(landing(.5*A), A, THIN.std)
    assert (g.item(), off.item()) == pytest.approx((.5, 3.553), abs=1e-3) and nats.item() == pytest.approx(off.item()**2/2)
    g, nats, off = price(tilt_linear(THIN.mean, S, A, .5/.505)[0], A, THIN.std)
    assert (g.item(), off.item()) == pytest.approx((.5, .7036), abs=1e-3)
    assert nats.item() == pytest.approx(kl(.5/.505*(S @ A), S, THIN.mean, S).item(), abs=1e-5)


def test_no_step_along_the_data_is_cheaper_than_the_optimum():
    best = price(S @ A, A, THIN.std)
    for seed in range(20):
        other = price(torch.randn(2, generator=make_gen(seed)), A, THIN.std)
        assert other[1]/other[0]**2 >= best[1]/best[0]**2 - 1e-6


# --- the score term ------------------------------------------------------------------------------

def noised(schedule, t, std):
    alpha, sigma = [x.double().squeeze() for x in schedule.alpha_sigma(torch.tensor([t]), torch.zeros(1, 1))]
    return alpha, torch.diag((alpha*std)**2 + sigma**2)


@pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("weight", ["kl", "x0"])
@pytest.mark.parametrize("t", [9, 199, 500, 900])
def test_gradient_of_the_score_term(schedule, weight, t):
    "With exact scores it is the gradient of the KL between the noised Gaussians, in the mean and the standard deviations"
    m0, s0 = torch.tensor([.3, -.2]).double(), torch.tensor([1., .1]).double()
    mu = torch.tensor([.5, .1]).double().requires_grad_()
    std = torch.tensor([.7, .2]).double().requires_grad_()
    nodes = torch.cartesian_prod(*[torch.tensor([-1., 1.]).double()]*4)  # exact for polynomials of degree 3
    u, e, at = nodes[:, :2], nodes[:, 2:], torch.full((16,), t)
    teacher, own = Gaussian(m0, s0, schedule), Gaussian(mu.detach(), std.detach(), schedule)
    got = torch.autograd.grad(score_loss(mu + std*u, e, at, teacher.eps, own.eps, schedule, weight).mean(), (mu, std))
    alpha, C0 = noised(schedule, t, s0)
    _, C = noised(schedule, t, std)
    k = 1. if weight == "kl" else ((C0[0, 0] - (alpha*s0[0])**2)/alpha**2).item()
    want = torch.autograd.grad(k*kl(alpha*mu, C, alpha*m0, C0), (mu, std))
    assert_close(got, want, atol=1e-6, rtol=1e-6)
    assert max(g.abs().max() for g in got) > 1e-4


def test_stiffness_is_the_slope_of_that_gradient():
    for schedule in (VP, FLOW):
        for weight in ("kl", "x0"):
            x, t = torch.zeros(2, 2).double(), torch.tensor([50, 300])
            own = Gaussian(torch.tensor([1., 1.]).double(), THIN.std.double(), schedule)
            zero = Gaussian(torch.zeros(2).double(), THIN.std.double(), schedule)
            y = (x + 1).requires_grad_()
            g, = torch.autograd.grad(score_loss(y, 0*x, t, zero.eps, own.eps, schedule, weight).sum(), y)
            assert_close(g.mean(0).float(), stiffness(schedule, t, THIN.std, weight), rtol=1e-5, atol=1e-6)


def test_only_samples_get_a_gradient():
    net = torch.nn.Linear(2, 2)
    x = torch.randn(4, 2, generator=make_gen(0)).requires_grad_()
    score_loss(x, 0*x.detach(), torch.full((4,), 500), THIN.eps, lambda z, t: net(z), VP).sum().backward()
    assert x.grad.abs().sum() > 0 and net.weight.grad is None


# --- networks ------------------------------------------------------------------------------------

def test_a_trained_student_lands_where_the_formula_says():
    l = Leash(THIN, A, LEVELS, steps=500, batch=32, lr=5e-3, pool=5000)
    for b, r in zip((0., .5), measure(l, fit(l, torch.tensor([0., .5])), 4000)):
        g, _, off = price(landing(b*A), A, THIN.std)
        assert r["gain"] == pytest.approx(g.item(), abs=.03)
        assert r["off"] == pytest.approx(off.item(), abs=.25)         # of 0 and 3.55 standard deviations


def test_a_student_on_the_mixture_moves_both_modes():
    "CD + reward: every sample by beta/2, however the modes lie"
    two = Mixture([-1., 1.], .4, [.5, .5], VP)
    l = Leash(two, torch.ones(1), LEVELS, steps=300, batch=32, lr=1e-2, pool=2000)
    r, = measure(l, fit(l, torch.tensor([.8])), 2000)
    assert r["gain"] == pytest.approx(.4, abs=.03)


def test_the_score_term_holds_the_thin_direction():
    l = Leash(THIN, A, LEVELS, 2., steps=500, batch=32, lr=4e-3, pool=5000)
    r, = measure(l, fit(l, torch.tensor([2.5])), 4000)
    want = landing(2.5*A, 2*stiffness(VP, LEVELS, THIN.std))
    assert r["y"]/.1 == pytest.approx(want[1].item()/.1, abs=.3) and want[1] < .1    # without it: 17 standard deviations
    assert r["x"] == pytest.approx(want[0].item(), abs=.15)


def rows():
    with (ROOT / "nbs/leash.csv").open(encoding="utf-8") as f: return list(csv.DictReader(f))


def mean_of(arm, key):
    "-> {beta: mean over seeds}"
    found = {}
    for r in rows():
        if r["arm"] == arm: found.setdefault(float(r["beta"]), []).append(float(r[key]))
    assert found and all(len(v) >= 5 for v in found.values()), arm
    return {b: sum(v)/len(v) for b, v in found.items()}


@pytest.mark.parametrize("arm, lam, loss, links, within", [
    ("CD", 0, "square", 1, .01), ("CD + R", 0, "square", 1, .01), ("CD + score", 2, "square", 1, .03), ("CD + score + R", 2, "square", 1, .06),
    ("CD (pseudo-Huber) + score + R", 2, "huber", 1, .06), ("CD + R everywhere", 0, "square", 4, .02)])
def test_stored_rewards_agree_with_the_formulas(arm, lam, loss, links, within):
    "nbs/leash.csv, made by bench/leash.py: mean over five seeds of each weight"
    hold = lam*stiffness(VP, LEVELS, THIN.std)
    for b, gain in mean_of(arm, "gain").items():
        want = links*price(landing(b*A, hold, loss), A, THIN.std)[0].item()
        assert gain == pytest.approx(want, abs=within), (arm, b)


def test_stored_frontier():
    "At equal reward the score term costs a fraction of the KL, and each curve is its closed form"
    hold = 2*stiffness(VP, LEVELS, THIN.std)
    for arm, h, far in (("CD + R", 0., .1), ("CD + score + R", hold, .35)):
        for b, nats in mean_of(arm, "kl").items():
            assert nats == pytest.approx(price(landing(b*A, h), A, THIN.std)[1].item(), rel=far, abs=.15), (arm, b)
    plain, held = [sorted(mean_of(arm, "kl").items()) for arm in ("CD + R", "CD + score + R")]
    assert all(h < p/4 for (_, p), (_, h) in zip(plain[1:], held[1:]))


def test_stored_mixture():
    "CD + R moves and does not choose; with the score term students choose as the optimum does, to 0.04, and move less for more reward"
    two = Mixture([-1., 1.], .4, [.5, .5], VP)
    for b, gain in mean_of("mixture: CD + R", "gain").items(): assert gain == pytest.approx(b/2, abs=.01)
    held = {k: mean_of("mixture: CD + score + R", k) for k in ("gain", "right", "off")}
    for b, right in held["right"].items():
        t = tilt_mixture(two, torch.ones(1), b)
        assert right == pytest.approx((t.weights @ torch.special.ndtr(t.means[:, 0]/t.std)).item(), abs=.04)
        assert held["gain"][b] == pytest.approx((t.weights @ t.means).item(), rel=.25) and held["off"][b] < .45*held["gain"][b]/two.std
    plain = {k: mean_of("mixture: CD + R", k) for k in ("gain", "right", "off")}
    assert plain["right"][1.] < .6 < held["right"][.25] and plain["gain"][1.] < held["gain"][.5] and plain["off"][1.] > 2*held["off"][.5]


def test_stored_escape():
    "The pseudo-Huber loss: below the threshold within 0.2 standard deviations, above it far away"
    for b, y in mean_of("CD (pseudo-Huber) + R", "y").items():
        if b < threshold(A): assert abs(y)/.1 < .2, b
        else: assert y/.1 > 10, b


def test_the_method_does_without_it():
    users = [p.name for p in (ROOT / "t2v_turbo").rglob("*.py") if re.search(r"import.*\bleash\b|from \.*leash", p.read_text(encoding="utf-8"))]
    assert not users, users


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_leash", ROOT / "bench/leash.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    l = Leash(THIN, A, LEVELS, steps=2, batch=4, pool=50)
    some = [("CD", "CD + R", l, (0., .5)), (None, "more", l, (.1,))]
    monkeypatch.setattr(bench, "groups", lambda: some[:1])
    bench.train(tmp_path / "out.csv")
    first = (tmp_path / "out.csv").read_text()
    assert first.count("CD,") == 5 and first.count("CD + R,") == 5
    seen = []
    monkeypatch.setattr(bench, "groups", lambda: some)
    monkeypatch.setattr(bench, "fit", lambda *a, **kw: seen.append(1) or fit(*a, **kw))
    bench.train(tmp_path / "out.csv")
    assert len(seen) == 1 and (tmp_path / "out.csv").read_text().startswith(first)
    assert {tuple(r) for r in csv.DictReader((tmp_path / "out.csv").open())} == {tuple(bench.FIELDS)}


# --- the picture to drag -------------------------------------------------------------------------

@pytest.fixture
def visit(browser, tmp_path):
    "The picture on a page of its own, from a file; errors and requests are collected in `tab.wrong`"
    k, script = stiffness(VP, LEVELS, THIN.std), (ROOT / "nbs/explore/leash.js").read_text(encoding="utf-8")
    page = tmp_path / "leash.html"
    page.write_text('<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width"><title>t</title>'
                    f'<div class="leash" data-k="{k[0]:.9f},{k[1]:.9f}"></div><script>{script}</script>', encoding="utf-8")
    contexts = []

    def visit(**kw):
        contexts.append(browser.new_context(**(dict(viewport=dict(width=1000, height=900)) | kw)))
        tab = contexts[-1].new_page()
        tab.wrong = []
        tab.on("pageerror", lambda e: tab.wrong.append(str(e)))
        tab.on("console", lambda m: tab.wrong.append(m.text) if m.type in ("error", "warning") else None)
        tab.on("request", lambda q: tab.wrong.append(q.url) if not q.url.startswith(("file:", "data:")) else None)
        tab.goto(page.as_uri())
        return tab
    yield visit
    wrong = [w for c in contexts for p in c.pages for w in p.wrong]
    for c in contexts: c.close()
    assert not wrong, wrong


def press(tab, name, steps):
    "Move a slider by key, from its left end"
    tab.locator(f"input[name={name}]").focus()
    tab.keyboard.press("Home")
    for _ in range(steps): tab.keyboard.press("ArrowRight")


def read(tab, name):
    s = tab.locator(f"[data-name={name}]").inner_text().replace("\u2212", "-")
    return math.inf if s == "\u221e" else float(s)


@pytest.mark.parametrize("loss", ["square", "huber"])
def test_numbers_of_the_picture(visit, loss):
    "Sliders set by key; reward, KL and place are those of the library to 1e-3"
    tab, hold = visit(), stiffness(VP, LEVELS, THIN.std)
    if loss == "huber":
        tab.locator("input[type=radio]").first.focus()
        tab.keyboard.press("ArrowRight")
    for beta, lam in ((10, 0), (15, 0), (40, 20), (0, 3), (16, 1)):
        press(tab, "beta", beta), press(tab, "lam", lam)
        d = landing(.05*beta*A, .1*lam*hold, loss)
        g, nats, off = price(d, A, THIN.std)
        for name, want in dict(reward=g, kl=nats, off=off, along=d[0], thin=d[1]).items():
            assert read(tab, name) == pytest.approx(want.item(), abs=1e-3), (name, beta, lam)
        if g.isfinite(): assert read(tab, "best") == pytest.approx(price(tilt_linear(THIN.mean, S, A, g.item()/.505)[0], A, THIN.std)[1].item(), abs=1e-3)
        shown = tab.locator("ellipse.student")
        assert shown.count() == int(g.isfinite()) and tab.locator("ellipse.best").count() == int(g.isfinite())
        if g.isfinite():                                              # the ellipse is where the numbers are
            box = tab.evaluate("(e => [+e.getAttribute('cx'), +e.getAttribute('rx')/2])(document.querySelector('ellipse.student'))")
            zero = tab.evaluate("+document.querySelector('ellipse.teacher').getAttribute('cx')")
            assert (box[0] - zero)/box[1] == pytest.approx(d[0].item(), abs=1e-3)


def test_the_picture_says_when_nothing_holds(visit):
    tab = visit()
    tab.locator("input[value=huber]").check()
    for steps, away in ((14, False), (15, True)):                     # 0.70 and 0.75, around 0.707
        press(tab, "beta", steps)
        assert ("runs away" in tab.locator(".leash-verdict").inner_text()) == away
    press(tab, "lam", 1)
    assert "runs away" not in tab.locator(".leash-verdict").inner_text() and math.isfinite(read(tab, "kl"))


def test_the_picture_on_a_phone(visit):
    "It fits, fingers move it, nothing moves by itself"
    tab = visit(viewport=dict(width=390, height=844), has_touch=True, reduced_motion="reduce", color_scheme="dark")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    box = tab.locator("input[name=beta]").bounding_box()
    before = read(tab, "reward")
    tab.touchscreen.tap(box["x"] + .8*box["width"], box["y"] + box["height"]/2)
    assert read(tab, "reward") > before + 1
    sizes = tab.evaluate("[...document.querySelectorAll('.leash text')].map(e => e.getBoundingClientRect().height)")
    assert sizes and min(sizes) >= 9
    assert not tab.evaluate("document.getAnimations().length")


def test_the_page_holds_this_picture():
    "The stored output of the notebook has the script of nbs/explore and the stiffness of today"
    cells = json.loads(next((ROOT / "nbs").glob("*_leash.ipynb")).read_text(encoding="utf-8"))["cells"]
    html, = ["".join(o["data"]["text/html"]) for c in cells for o in c.get("outputs", []) if "text/html" in o.get("data", {})]
    assert (ROOT / "nbs/explore/leash.js").read_text(encoding="utf-8") in html, "execute the notebook"
    k = [float(v) for v in re.search(r'data-k="([^"]+)"', html)[1].split(",")]
    assert k == pytest.approx(stiffness(VP, LEVELS, THIN.std).tolist(), rel=1e-6)


def test_stiffness_of_all_levels_is_as_stated():
    "The page's claim: the difference of data predictions never holds the thin direction harder than 1"
    t = torch.arange(1, 1000)
    each = torch.stack([stiffness(VP, u[None], THIN.std, "x0") for u in t])
    assert each.max() <= 1 and stiffness(VP, ddim_grid(20), THIN.std)[1] < 3
