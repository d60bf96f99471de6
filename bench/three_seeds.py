"""The table of the paper in miniature: teacher 50 and 4 steps, plain CD, +R_img, +R_vid, both; three seeds.
And both with J = R instead of J = log sigmoid(R).

    python bench/three_seeds.py runs/seeds            # everything; continues where it was stopped
    python bench/three_seeds.py runs/seeds --jobs 2   # two trainings at a time
    python bench/three_seeds.py runs/flow --teacher tiny-flow --seeds 2 --variants cd "turbo (both)" --w 4 --w_min 2 --w_max 6

`ablate` does the training; this file adds what it has no columns for: the teacher, seconds a video, intervals over prompts.
Writes OUT/rows.json (one row per model, steps and seed), OUT/looks.json (rewards and judges over training) and four clips.
Evaluation is always done alone, on all threads, so that seconds per video can be compared.
"""
import argparse
import json
from pathlib import Path

VARIANTS = {  # beta_img, beta_vid, shape of J, learning rate; plain CD diverges at the rate of the others
    "cd": (0, 0, "log_sigmoid", 2e-4), "cd, lr 1e-3": (0, 0, "log_sigmoid", 1e-3),
    "cd + R_img": (1, 0, "log_sigmoid", 1e-3), "cd + R_vid": (0, 1, "log_sigmoid", 1e-3),
    "turbo (both)": (1, 1, "log_sigmoid", 1e-3), "turbo, raw R": (1, 1, "raw", 1e-3)}


def folder(variant):
    "A folder name for the runs of a variant"
    return "-".join("".join(c if c.isalnum() else " " for c in variant).split())


def grid(a, variant):
    "What `ablate` trains for a variant: one setting, all seeds"
    from t2v_turbo.ablate import AblateOptions
    from t2v_turbo.train import Config, Objective
    image, video, shape, lr = VARIANTS[variant]
    cfg = Config(out=str(a.out / folder(variant)), teacher=a.teacher, steps=a.steps, objective=Objective(w_min=a.w_min, w_max=a.w_max))
    over = f"beta_img={image * a.beta_img} beta_vid={video * a.beta_vid} shape={shape} lr={lr}"
    return cfg, AblateOptions(over=over, seeds=",".join(map(str, range(a.seeds))), jobs=a.jobs)


def runs(a, variant):
    "The folder of each seed's run"
    from t2v_turbo.ablate import cell_config, cells
    cfg, o = grid(a, variant)
    return [Path(cell_config(cfg, cell).out) for cell in cells(o, cfg)]


def train_all(a):
    "All trainings by `ablate`, which continues where it was stopped"
    from t2v_turbo.ablate import ablate
    from t2v_turbo.watch import WatchOptions
    looks = WatchOptions(eval_every=50, on_hacking="off", student_w=a.w)
    for v in sorted(a.variants, key=lambda v: VARIANTS[v][2] == "raw"):          # the side question last
        ablate(*grid(a, v), looks)
        print("trained", v, flush=True)


def options(argv=None):
    "What may be chosen on the command line"
    from t2v_turbo.train import Config, Objective
    p = argparse.ArgumentParser(); p.add_argument("out", type=Path)
    p.add_argument("--seeds", type=int, default=3); p.add_argument("--jobs", type=int, default=0, help="trainings at a time; 0: one a GPU, or else one a CPU core")
    p.add_argument("--steps", type=int, default=Config.steps); p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--beta_img", type=float, default=Objective.beta_img)
    p.add_argument("--beta_vid", type=float, default=Objective.beta_vid)
    p.add_argument("--w", type=float, default=2., help="guidance scale given to the students")
    p.add_argument("--sweep", default="0,1,2,4", help="guidance scales tried for the 50-step teacher")
    p.add_argument("--teacher", default="tiny", help="tiny or tiny-flow")
    p.add_argument("--w_min", type=float, default=Objective.w_min); p.add_argument("--w_max", type=float, default=Objective.w_max)
    p.add_argument("--variants", nargs="*", default=list(VARIANTS), help="students to train; default: all")
    a = p.parse_args(argv)
    if odd := [v for v in a.variants if v not in VARIANTS]: p.error(f"{odd[0]!r}: give some of {', '.join(VARIANTS)}")
    return a


class Rows:
    "The rows of the table, in a file; a row that is there is not made again"
    def __init__(self, a):
        from t2v_turbo.judges import load_judges
        from t2v_turbo.world import caption, combos
        self.path, self.repeats, self.net = a.out / "rows.json", a.repeats, load_judges()
        self.prompts = [caption(*c) for c in combos("heldout").tolist()]
        self.rows = json.loads(self.path.read_text()) if self.path.is_file() else []

    def add(self, sampler, seed, w):
        from t2v_turbo.evaluate import evaluate, print_table
        from t2v_turbo.files import write_json
        new = dict(model=sampler.model, steps=sampler.steps, seed=seed, w=w)
        if any(all(r.get(k) == v for k, v in new.items()) for r in self.rows): return
        self.rows.append(evaluate(sampler, self.prompts, self.net, seed=seed, repeats=self.repeats) | dict(w=w))
        write_json(self.path, self.rows); print_table(self.rows[-1:])


def teacher_rows(a, rows):
    "The sweep over w with seed 0, then 50 and 4 steps at the best w with all seeds"
    from t2v_turbo.core import make_gen
    from t2v_turbo.evaluate import Sampler
    from t2v_turbo.pipeline import sample_teacher
    from t2v_turbo.teachers.folders import load_teacher
    teacher = load_teacher(a.teacher)
    T = lambda steps, w: Sampler("teacher", steps, 2 * steps, lambda q, seed: sample_teacher(
        teacher, q, make_gen(seed), steps, w))
    for w in map(float, a.sweep.split(",")): rows.add(T(50, w), 0, w)
    swept = [r for r in rows.rows if r["model"] == "teacher" and r["steps"] == 50 and r["seed"] == 0]
    best = max(swept, key=lambda r: r["mean"])["w"]
    for seed in range(a.seeds):
        for steps in (50, 4): rows.add(T(steps, best), seed, best)
    return best


def student_rows(a, rows):
    "Every trained student in 4 steps"
    from t2v_turbo.core import make_gen
    from t2v_turbo.evaluate import Sampler
    from t2v_turbo.pipeline import sample_student
    from t2v_turbo.saved import load_student
    for v in a.variants:
        for seed, run in enumerate(runs(a, v)):
            student = load_student(run / "student")
            rows.add(Sampler(v, 4, 4, lambda q, s: sample_student(student, q, make_gen(s), 4, a.w)), seed, a.w)


def write_clips(a):
    "Four clips of the first student with both rewards, to look at"
    from safetensors.torch import save_file

    from t2v_turbo.core import make_gen
    from t2v_turbo.pipeline import sample_student
    from t2v_turbo.saved import load_student
    from t2v_turbo.world import caption, combos
    prompts = [caption(*c) for c in combos("heldout")[[1, 9, 15, 20]].tolist()]
    clips = sample_student(load_student(runs(a, "turbo (both)")[0] / "student"), prompts, make_gen(0), 4, a.w)
    save_file({"both": (clips * 255).round().byte().contiguous()}, a.out / "clips.safetensors")


def main():
    from t2v_turbo.evaluate import print_table, summarise
    from t2v_turbo.files import write_json
    a = options(); a.out.mkdir(parents=True, exist_ok=True)
    train_all(a)
    rows = Rows(a); best = teacher_rows(a, rows); student_rows(a, rows)
    rows.rows.sort(key=lambda r: -1 if r["model"] == "teacher" else list(VARIANTS).index(r["model"]))
    write_json(rows.path, rows.rows)
    looks = [dict(json.loads(l), model=v, seed=s) for v in a.variants for s, run in enumerate(runs(a, v))
             for l in (run / "looks.jsonl").read_text().splitlines()]
    write_json(a.out / "looks.json", looks)
    write_clips(a)
    print_table(summarise([r for r in rows.rows if r["model"] != "teacher" or r["w"] == best]))


if __name__ == "__main__": main()
