"""The small networks of nbs/17_leash.ipynb, five seeds for each weight of the reward, and the front page's picture

    python bench/leash.py [OUT]            # train what is missing in OUT (default: nbs/leash.csv), about ten minutes on one core
    python bench/leash.py --picture        # nbs/images/leash.svg from nbs/leash.csv

A line of the file is one network. A group of networks that are trained side by side is written when it is done; a run that was stopped
goes on with the next group. To train a group again, delete its lines.
"""
import argparse
import csv
import sys
import time
from pathlib import Path

import torch

from t2v_turbo.files import atomic
from t2v_turbo.gaussian import Gaussian, Mixture
from t2v_turbo.leash import Leash, fit, landing, measure, price, stiffness
from t2v_turbo.schedule import Schedule, vp_abar

NBS = Path(__file__).resolve().parents[1] / "nbs"
SEEDS, LAM, GAINS = 5, 2., (.1, .25, .5, .75, 1.)
FIELDS = "arm loss lam beta seed gain kl off x y sx sy right".split()
sched = Schedule(vp_abar())
thin, a = Gaussian(torch.zeros(2), torch.tensor([1., .1]), sched), torch.ones(2)/2**.5
two, one_d = Mixture([-1., 1.], .4, [.5, .5], sched), torch.ones(1)
levels = torch.arange(19, 200, 20)
hold = LAM*stiffness(sched, levels, thin.std)
earn = price(landing(a, hold), a, thin.std)[0].item()           # reward for each unit of beta


def groups():
    "-> (arm without a reward or None, arm with one, settings, weights of the reward)"
    yield "CD", "CD + R", Leash(thin, a, levels), (0., *GAINS)
    yield "CD + score", "CD + score + R", Leash(thin, a, levels, LAM, steps=2000), (0., *(g/earn for g in GAINS))
    yield None, "CD (pseudo-Huber) + R", Leash(thin, a, levels, loss="huber", steps=2500, lr=5e-3), (.4, .6, 1., 1.4)
    yield None, "CD (pseudo-Huber) + score + R", Leash(thin, a, levels, LAM, loss="huber", steps=2500), (.4, 1., 1.4)
    yield None, "CD + R everywhere", Leash(thin, a, levels, every=True), (.1, .2)
    yield None, "mixture: CD + R", Leash(two, one_d, levels), (.5, 1.)
    yield None, "mixture: CD + score + R", Leash(two, one_d, torch.arange(19, 400, 20), 1., cd=.02, steps=2000), (.25, .5)


def train(out):
    "Train the groups that are missing and write each when it is done"
    rows = list(csv.DictReader(out.open(encoding="utf-8"))) if out.exists() else []
    for none, arm, l, betas in groups():
        if any(r["arm"] == arm for r in rows): continue
        start = time.time()

        def progress(k):
            if k % 20 == 19 or k == l.steps - 1:
                print(f"\r{arm}: {k+1}/{l.steps} steps, {time.time()-start:.0f} s", end="", file=sys.stderr, flush=True)
        beta = torch.tensor(betas).repeat(SEEDS)
        found = measure(l, fit(l, beta, progress=progress))
        print(file=sys.stderr)
        for i, r in enumerate(found):
            b = betas[i % len(betas)]
            name = none if none and not b else arm
            rows.append(dict(arm=name, loss=l.loss, lam=l.lam, beta=f"{b:.6g}", seed=i//len(betas)) | {k: f"{v:.5g}" for k, v in r.items()})
        with atomic(out) as tmp, open(tmp, "w", newline="", encoding="utf-8") as f:
            w = csv.DictWriter(f, FIELDS, lineterminator="\n")
            w.writeheader()
            w.writerows(rows)


def picture(table, path=NBS / "images/leash.svg"):
    "Draw where students of equal reward land, and the reward against the KL"
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    plt.rcParams |= {"svg.hashsalt": "leash", "font.size": 11}
    rows = [r | {k: float(r[k]) for k in ("beta", "gain", "kl", "off", "x", "y", "sx", "sy") if r[k]} for r in csv.DictReader(table.open(encoding="utf-8"))]
    blue, orange, green, grey = "#0072B2", "#D55E00", "#00735A", "#555555"
    arms = [("CD + R", landing(a), orange, "s", "plain CD + reward"), ("CD + score + R", landing(a, hold), blue, "o", "CD + score + reward")]
    fig, (left, right) = plt.subplots(2, 1, figsize=(5.6, 5.6), height_ratios=(1, 1.15), layout="constrained", facecolor="white")   # legible on a phone
    u = torch.linspace(0, 2*torch.pi, 200)

    def around(mean, std, k=2, **kw): left.plot(mean[0] + k*std[0]*u.cos(), mean[1] + k*std[1]*u.sin(), **kw)
    left.fill(2*u.cos(), .2*u.sin(), color=grey, alpha=.15, lw=0)
    for k in (1, 2): around((0, 0), (1, .1), k, c=grey, lw=.8)
    around(.5/.505*a*thin.std**2, thin.std, c=green, ls=":", lw=1.5)
    for name, shift, c, _, label in arms:
        at = [r for r in rows if r["arm"] == name and abs(r["beta"]*price(shift, a, thin.std)[0].item() - .5) < 1e-3]
        for r in at:
            around((r["x"], r["y"]), (r["sx"], r["sy"]), c=c, lw=1, alpha=.8)
            left.plot(r["x"], r["y"], "o", c=c, ms=3)
        off = sum(r["off"] for r in at)/len(at)
        y = {"CD + R": .68, "CD + score + R": -.48}[name]
        left.text(-2.3, y, f"{label}: {off:.2f} std off the data", color=c)
    left.text(-2.3, -.74, "optimum (dotted): 0.70 std", color=green)
    left.text(2, -.36, "teacher", color=grey)
    left.annotate("", (2.15, .9), (1.9, .65), arrowprops=dict(arrowstyle="->", color=grey))
    left.text(1.98, .52, "reward", color=grey)
    left.set(xlim=(-2.4, 2.75), ylim=(-.95, 1.15), title="same reward: where samples lie", xlabel="along the data", ylabel="off the data")
    left.set_aspect("equal")
    g = torch.linspace(.02, 1.1, 100)
    for shift, c, ls in ((a*thin.std**2, green, ":"), *((s, c, "-") for _, s, c, _, _ in arms)):
        one, nats, _ = price(shift, a, thin.std)
        right.plot(g, nats*(g/one)**2, c=c, ls=ls, lw=1.2)
    for name, _, c, mark, _ in arms:
        at = [r for r in rows if r["arm"] == name]
        right.scatter([r["gain"] for r in at], [r["kl"] for r in at], c=c, marker=mark, s=14, alpha=.7, lw=0)
    right.set(yscale="log", xlim=(0, 1.1), ylim=(3e-3, 60), title="reward against distance", xlabel="gain in reward", ylabel="KL to the teacher, nats")
    for x, y, label, c in ((.42, 13, "plain CD", orange), (.72, 2.3, "with the score term", blue), (.62, .1, "optimum", green)): right.text(x, y, label, color=c, ha="right" if c != green else "left")
    with atomic(path) as tmp: fig.savefig(tmp, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("out", nargs="?", type=Path, default=NBS / "leash.csv", help="the file of results")
    p.add_argument("--picture", action="store_true", help="draw nbs/images/leash.svg instead")
    args = p.parse_args()
    picture(args.out) if args.picture else train(args.out)
