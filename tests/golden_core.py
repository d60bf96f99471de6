"The method: schedule, solver, losses, sampler"
import re

import torch
from golden_files import near
from safetensors import safe_open
from safetensors.torch import load_file

from t2v_turbo.consistency import (
    boundary,
    consistency_fn,
    few_step_grid,
    few_step_sample,
    pseudo_huber,
    w_embedding,
)
from t2v_turbo.schedule import Schedule, vp_abar
from t2v_turbo.solver import DDIM, ddim_grid


def check_schedule(d):
    near(vp_abar(T=len(d["alphas_cumprod"])), d["alphas_cumprod"])


def check_guidance(d):
    for key in [k for k in d if k.startswith("guidance.emb")]:
        near(w_embedding(d["guidance.w"], dim=int(key.removeprefix("guidance.emb"))), d[key])


def check_boundary(d):
    c_skip, c_out = boundary(d["boundary.t"])
    near(c_skip, d["boundary.c_skip"])
    near(c_out, d["boundary.c_out"])


def check_huber(d):
    for key in [k for k in d if k.startswith("huber.loss_c")]:
        c = float(key.removeprefix("huber.loss_c"))
        near(pseudo_huber(d["huber.pred"], d["huber.target"], c=c).mean(), d[key])


def check_x0eps(d):
    sched, z, out, t = Schedule(d["alphas_cumprod"]), *(d[f"x0eps.{k}"] for k in ("z", "eps", "t"))
    x0, eps = sched.x0_eps(z, out, t, "epsilon")
    near(x0, d["x0eps.x0_from_eps"])
    near(eps, out)
    x0, eps = sched.x0_eps(z, out, t, "v_prediction")
    near(x0, d["x0eps.x0_from_v"])
    near(eps, d["x0eps.eps_from_v"])


def check_ddim(d, n):
    p, ddim = f"ddim{n}.", DDIM(Schedule(d["alphas_cumprod"]), n)
    assert ddim_grid(n, len(d["alphas_cumprod"])).tolist() == d[p+"timesteps"].tolist()
    near(ddim.step(d[p+"x0"], d[p+"eps"], d[p+"index"]), d[p+"x_prev"])
    near(ddim.invert(d[p+"rev_in"], d[p+"eps"], d[p+"rev_t"]), d[p+"rev_out"])


CORE = dict(alphas_cumprod=check_schedule, guidance=check_guidance, boundary=check_boundary,
            huber=check_huber, x0eps=check_x0eps)


def core_parts(path):
    "One test per group of keys; a group we do not know must not pass unseen"
    d = load_file(path)
    for group in sorted({k.split(".")[0] for k in d}):
        n = re.fullmatch(r"ddim(\d+)", group)
        check = (lambda d, n=int(n[1]): check_ddim(d, n)) if n else CORE.get(group)
        yield group, (lambda check=check: check(d)) if check else None


def scheduler_parts(path):
    "One test per trajectory: same timesteps, same latents at every stage"
    with safe_open(path, "pt") as f: formula = (f.metadata() or {}).get("model")
    m = re.fullmatch(r"eps = ([\d.]+) \* z \+ ([\d.]+) \* cos\(t/(\d+)\)", formula or "")
    assert m, f"{path.name}: unknown model formula {formula!r}"
    a, b, c = map(float, m.groups())
    d, sched = load_file(path), Schedule(vp_abar())

    def f(z, t):
        eps = a*z + b*torch.cos(t.view(-1, *[1]*(z.ndim-1))/c)
        return consistency_fn(z, sched.x0_from_eps(z, eps, t), t)

    def check(origin, n):
        p = f"o{origin}.n{n}."
        steps = few_step_grid(n, origin)
        assert steps == d[p+"timesteps"].tolist()
        noise = lambda i: d[f"{p}noise{i}"]
        for i, (t, x, z) in enumerate(few_step_sample(f, d[p+"z_init"], steps, sched, noise)):
            near(x, d[f"{p}denoised{i}"])
            if i < n-1: near(z, d[f"{p}z{i}"])  # the last z is never used: the sample is `denoised`
        assert i == n-1

    for key in sorted(k for k in d if k.endswith(".timesteps")):
        o, n = map(int, re.fullmatch(r"o(\d+)\.n(\d+)\.timesteps", key).groups())
        yield f"o{o}.n{n}", lambda o=o, n=n: check(o, n)


PARTS = dict(core=core_parts, scheduler=scheduler_parts)
