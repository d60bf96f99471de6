"""The table of the paper in miniature: teacher 50 and 4 steps, plain CD, +R_img, +R_vid, both; three seeds.
And both with J = R instead of J = log sigmoid(R).

    python bench/three_seeds.py runs/seeds            # everything; goes on where it was
    python bench/three_seeds.py runs/seeds --jobs 2   # two trainings at a time, one thread each

Writes OUT/rows.json (one row per model, steps and seed) and OUT/looks.json (rewards and judges over training).
Evaluation is always done alone, on all threads, so that seconds per video can be compared.
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

VARIANTS = {"cd": (0, 0, "log_sigmoid"), "cd + R_img": (1, 0, "log_sigmoid"), "cd + R_vid": (0, 1, "log_sigmoid"),
            "turbo (both)": (1, 1, "log_sigmoid"), "turbo, raw R": (1, 1, "raw")}
TRAIN = """
import json, sys
from pathlib import Path
from t2v_turbo.cli import DistillOptions, watch
from t2v_turbo.train import Config, Objective, Trainer, claim
out, seed, steps, kw = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
trainer = Trainer(Config(out=out, seed=seed, steps=steps, objective=Objective(**kw)))
with claim(out):
    trainer.resume()
    watch(trainer, DistillOptions(eval_every=25))
(Path(out) / "done").touch()
"""


def run_name(variant, seed):
    "A folder name for one run"
    return "-".join("".join(c if c.isalnum() else " " for c in f"{variant} {seed}").split())


def train_all(out, a):
    "All trainings, `jobs` at a time, each in a process of its own"
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, os.cpu_count() // a.jobs)), "OMP_WAIT_POLICY": "PASSIVE"}
    todo = [(v, s) for s in range(a.seeds) for v in VARIANTS if not (out / run_name(v, s) / "done").is_file()]
    live = []
    while todo or live:
        while todo and len(live) < a.jobs:
            v, s = todo.pop(0)
            kw = dict(beta_img=VARIANTS[v][0] * a.beta_img, beta_vid=VARIANTS[v][1] * a.beta_vid, shape=VARIANTS[v][2])
            folder = out / run_name(v, s); folder.mkdir(parents=True, exist_ok=True)
            log = (folder / "stderr.txt").open("w")
            live.append((v, s, subprocess.Popen([sys.executable, "-c", TRAIN, str(folder), str(s), str(a.steps),
                                                 json.dumps(kw)], env=env, stdout=log, stderr=log)))
        v, s, p = live.pop(0)
        if p.wait(): sys.exit(f"{run_name(v, s)} failed: see {out / run_name(v, s) / 'stderr.txt'}")
        print("trained", v, "seed", s, flush=True)


def main():
    from t2v_turbo.core import make_gen, write_json
    from t2v_turbo.evaluate import Sampler, evaluate, load_judges, print_table, summarise
    from t2v_turbo.pipeline import sample_student, sample_teacher
    from t2v_turbo.student import load_student
    from t2v_turbo.teachers.tiny import load_teacher
    from t2v_turbo.train import Config, Objective
    from t2v_turbo.world import caption, combos
    p = argparse.ArgumentParser(); p.add_argument("out", type=Path)
    p.add_argument("--seeds", type=int, default=3); p.add_argument("--jobs", type=int, default=1)
    p.add_argument("--steps", type=int, default=Config.steps); p.add_argument("--repeats", type=int, default=4)
    p.add_argument("--beta_img", type=float, default=Objective.beta_img)
    p.add_argument("--beta_vid", type=float, default=Objective.beta_vid)
    p.add_argument("--w", type=float, default=4.)
    p.add_argument("--sweep", default="1,2,4,6", help="guidance scales tried for the 50-step teacher")
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    train_all(a.out, a)
    net, prompts = load_judges(), [caption(*c) for c in combos("heldout").tolist()]
    path = a.out / "rows.json"; rows = json.loads(path.read_text()) if path.is_file() else []
    have = lambda **k: any(all(r.get(n) == v for n, v in k.items()) for r in rows)
    def add(sampler, seed, **more):
        if have(model=sampler.model, steps=sampler.steps, seed=seed, **more): return
        rows.append(evaluate(sampler, prompts, net, seed=seed, repeats=a.repeats) | more)
        write_json(path, rows); print_table(rows[-1:])
    teacher = load_teacher("tiny")
    T = lambda steps, w: Sampler("teacher", steps, 2 * steps, lambda q, seed: sample_teacher(
        teacher, q, make_gen(seed), steps, w))
    for w in map(float, a.sweep.split(",")): add(T(50, w), 0, w=w)
    best = max((r for r in rows if r["steps"] == 50 and r["seed"] == 0), key=lambda r: r["mean"])["w"]
    for seed in range(a.seeds):
        for steps in (50, 4): add(T(steps, best), seed, w=best)
        for v in VARIANTS:
            student = load_student(a.out / run_name(v, seed) / "student")
            add(Sampler(v, 4, 4, lambda q, s: sample_student(student, q, make_gen(s), 4, a.w)), seed, w=a.w)
    looks = [dict(json.loads(l), model=v, seed=s) for v in VARIANTS for s in range(a.seeds)
             for l in (a.out / run_name(v, s) / "looks.jsonl").read_text().splitlines()]
    write_json(a.out / "looks.json", looks)
    print_table(summarise([r for r in rows if r["w"] in (best, a.w) and not (r["model"] == "teacher" and r["w"] != best)]))


if __name__ == "__main__": main()
