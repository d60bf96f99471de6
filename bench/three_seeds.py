"""The table of the paper in miniature: teacher in 50 and in 4 steps, plain CD, + image reward, + video reward, both; both with J = R in
the place of J = log sigmoid(R), and both with another video reward. Any number of seeds, in any number of pieces.

    python bench/three_seeds.py runs/seeds                                # three seeds of everything
    python bench/three_seeds.py runs/seeds --seeds 5                      # two more seeds, another day
    python bench/three_seeds.py runs/seeds --only cd "turbo (both)"       # some of the runs; the others another time
    python bench/three_seeds.py runs/flow --teacher tiny-flow --set "w_min=2 w_max=6" --w 4
    python bench/three_seeds.py runs/score --seeds 5 --repeats 1 --only "cd + score" "turbo + score" pushed "pushed + score"  # and the score term
    python bench/three_seeds.py runs/seeds --sample_steps 16,8,1,2 --repeats 1  # trains nothing: other numbers of steps, OUT/steps.json
    python bench/three_seeds.py runs/seeds --gather                       # trains nothing: the table of what is there

Stop it at any time, by any signal: a training resumes at its last checkpoint, a finished run is a row in OUT/rows/RUN/row.json and is
not made again. Several processes may work in one OUT; a run that another process works on is passed over. OUT/rows.json gathers the
rows, OUT/looks.json rewards and judges over training, OUT/clips.safetensors two clips of every model's first seed (with `--clips`).
Seconds a video are measured where and when a row is made: compare them only if the machine was idle.
"""
import argparse
import contextlib
import itertools
import json
import shutil
from dataclasses import asdict
from pathlib import Path

VARIANTS = {  # settings that differ from the teacher's own; a rival is one more line
    "cd": dict(beta_img=0., beta_vid=0.), "cd + R_img": dict(beta_vid=0.), "cd + R_vid": dict(beta_img=0.), "turbo (both)": {},
    "turbo, raw R": dict(shape="raw"), "turbo, tube R": dict(reward="tiny-image=1,tiny-tube=1")}
BOTH, RIVAL = "turbo (both)", "rival"  # the rival is trained by rival.py
SCORE, PUSH = dict(lambda_score=1.), dict(beta_img=.2, beta_vid=.2, shape="raw")  # the score term; both rewards ten times as strong, and never satisfied
MORE = {  # trained only if they are named
    "cd + score": VARIANTS["cd"] | SCORE, "turbo + score": SCORE, "pushed": PUSH, "pushed + score": PUSH | SCORE}
AGAIN = 1000  # added to a row's seed for its second evaluation
TUNED = 48  # the first held-out captions chose betas, rates and draws, with judges of another seed; looks see them too. They are not judged here.
SHOWN = ("a yellow fish moving right in the sea", "a pink rocket growing at night", "a blue house shrinking in the meadow", "a white cat bouncing by the wall")  # held out


def folder(*words):
    "A folder name for a run"
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in " ".join(map(str, words))).split())


def options(argv=None):
    "What may be chosen on the command line"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--seeds", type=int, default=3, help="how many"); p.add_argument("--first", type=int, default=0, help="the first of them")
    p.add_argument("--only", nargs="*", metavar="RUN", help=f"teacher, or some of: {', '.join(VARIANTS | MORE)}; default: all but the last {len(MORE)}")
    p.add_argument("--teacher", default="tiny", help="tiny or tiny-flow")
    p.add_argument("--set", default="", metavar="'NAME=VALUE ..'", help="settings of every training, such as 'steps=800 beta_img=.2'")
    p.add_argument("--lr_cd", type=float, help="learning rate of plain CD; default: that of the others")
    p.add_argument("--w", type=float, help="guidance scale given to the students; default: the teacher's")
    p.add_argument("--sweep", default="0,1,2,4", help="guidance scales tried for the 50-step teacher, with the first seed")
    p.add_argument("--captions", type=int, default=96, help="held-out captions that are judged"); p.add_argument("--repeats", type=int, default=2, help="clips of each")
    p.add_argument("--eval_every", type=int, default=50, help="steps between looks"); p.add_argument("--gather", action="store_true", help="only gather what is there")
    p.add_argument("--sample_steps", default=[], type=lambda t: [int(n) for n in t.split(",")], metavar="N,N,..", help="only judge students that are there (those of --only, else cd and both), in so many steps")
    p.add_argument("--clips", action="store_true", help="when gathering, sample clips to show, too")
    a = p.parse_args(argv)
    if odd := [v for v in a.only or () if v not in ("teacher", *VARIANTS, *MORE)]: p.error(f"{odd[0]!r}: give teacher or some of {', '.join(VARIANTS | MORE)}")
    a.stepped = [v for v in a.only or ("cd", BOTH) if v != "teacher"]
    a.only = a.only or ["teacher", *VARIANTS]
    if a.w is None:
        from t2v_turbo.teachers.folders import defaults_of
        a.w = defaults_of(a.teacher).guidance
    return a


@contextlib.contextmanager
def at_work(run):
    "Claim a run's folder; False if another process has it"
    from t2v_turbo.checkpoints import claim
    from t2v_turbo.files import UserError
    with contextlib.ExitStack() as stack:
        try: stack.enter_context(claim(run))
        except UserError as e:
            if "in use" not in str(e): raise
            yield False
        else: yield True


def row_of(a, name, settings, make):
    "The row of a run, made by `make` if it is not there; None if another process works on it"
    from t2v_turbo.files import UserError, write_json
    run = a.out / "rows" / name
    path = run / "row.json"
    if not path.is_file():
        run.mkdir(parents=True, exist_ok=True)
        with at_work(run) as mine:
            if not mine: return print(f"{name}: another process works on it", flush=True)
            if not path.is_file(): write_json(path, make(run) | dict(settings=settings))
    row = json.loads(path.read_text())
    if odd := [k for k in settings if json.loads(json.dumps(settings[k])) != row["settings"].get(k)]:
        raise UserError(f"{str(path)!r} was made with other settings ({', '.join(odd)}): give another OUT, or the same settings")
    return row


def judged(a, sampler, seed, w, again=False):
    "A row of `evaluate`, and what all rewards and instruments say of the same clips; `again`: the judges of a second evaluation seed"
    import torch

    from t2v_turbo.evaluate import evaluate, print_table, progress
    from t2v_turbo.judges import held_captions, high_frequency, load_judges, saturation
    from t2v_turbo.rewards.tiny import REWARD_KINDS, load_reward
    prompts, kept = held_captions(TUNED + a.captions)[TUNED:], []
    class Kept:                                                    # the same sampler, whose clips are kept as bytes
        model, steps, nfe = sampler.model, sampler.steps, sampler.nfe
        def sample(self, q, s):
            kept.append((q, (clips := sampler.sample(q, s)).mul(255).round().byte()))
            return clips
    row = evaluate(Kept(), prompts, load_judges(), seed=seed, repeats=a.repeats, bar=progress(sampler.model, len(prompts) * a.repeats))
    if len(prompts) * a.repeats < sum(len(q) for q, _ in kept): kept = kept[1:]        # the one that warmed up
    mean = lambda f: round(torch.cat([f(x.float() / 255, list(q)) for q, x in kept]).mean().item(), 4)
    with torch.no_grad(): rewards = {n: mean(load_reward(n)) for n in REWARD_KINDS}
    row |= dict(w=w, rewards=rewards, saturation=mean(lambda x, q: saturation(x)), high_frequency=mean(lambda x, q: high_frequency(x)))
    if again:                                                      # so that the spread of training and that of judging are told apart
        other = evaluate(sampler, prompts, load_judges(), seed=seed + AGAIN, repeats=a.repeats)
        row["again"] = {k: other[k] for k in ("judges", "mean", "motion_amount", "relative_motion", "precision", "recall", "seed")}
    print_table([row])
    return row


def teacher_row(a, steps, w, seed):
    "The teacher in so many steps"
    from t2v_turbo.core import make_gen
    from t2v_turbo.evaluate import Sampler
    from t2v_turbo.pipeline import sample_teacher
    from t2v_turbo.teachers.folders import load_teacher
    def make(run):
        teacher = load_teacher(a.teacher)
        return judged(a, Sampler("teacher", steps, 2 * steps, lambda q, s: sample_teacher(teacher, q, make_gen(s), steps, w)), seed, w)
    return row_of(a, folder("teacher", steps, "w", f"{w:g}", seed), dict(teacher=a.teacher, captions=a.captions, repeats=a.repeats), make)


def best_w(a):
    "The guidance scale at which the teacher is best in 50 steps, by its first seed"
    rows = [row_of_w for w in map(float, a.sweep.split(",")) if (row_of_w := teacher_row(a, 50, w, a.first))]
    return max(rows, key=lambda r: r["mean"])["w"]


def config_of(a, variant, seed, out=""):
    "The settings of one training"
    from t2v_turbo.ablate import AblateOptions, cells
    from t2v_turbo.config import changed
    from t2v_turbo.train import Config
    cfg = Config(out=str(out or a.out), teacher=a.teacher, track="", keep=2)
    given, = cells(AblateOptions(over=a.set, seeds=str(seed)), cfg)
    if variant == "cd" and a.lr_cd: given |= dict(lr=a.lr_cd)
    return changed(cfg, **given | (VARIANTS | MORE)[variant])


def student_row(a, variant, seed):
    "Train a student, or go on with it, and judge it in 4 steps"
    from t2v_turbo.core import make_gen
    from t2v_turbo.evaluate import Sampler
    from t2v_turbo.judges import held_captions
    from t2v_turbo.pipeline import sample_student
    from t2v_turbo.saved import load_student
    from t2v_turbo.train import Trainer
    from t2v_turbo.watch import WatchOptions, watch
    def make(run):
        (run / "looks.txt").write_text("\n".join(held_captions(24)) + "\n")
        other = "tiny-video" if "tube" in variant else "tiny-tube"           # a reward that is not in the loss
        looks = WatchOptions(eval_every=a.eval_every, on_hacking="off", student_w=a.w, prompts=str(run / "looks.txt"), held_out=other if a.eval_every else "", teacher_look=0)
        trainer = Trainer(config_of(a, variant, seed, run)); trainer.resume()
        watch(trainer, looks)
        student = load_student(run / "student")
        row = judged(a, Sampler(variant, 4, 4, lambda q, s: sample_student(student, q, make_gen(s), 4, a.w)), seed, a.w, again=True)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        return row
    cfg = asdict(config_of(a, variant, seed))
    own = {k: v for k, v in (cfg | cfg.pop("objective")).items() if k not in ("out", "track", "keep", "workers", "save_memory")}
    return row_of(a, folder(variant, seed), own | dict(captions=a.captions, repeats=a.repeats, student_w=a.w), make)


def show(a, rows, students):
    "Two clips of every model's first seed, from the same noise; those that are in the file stay"
    from safetensors.torch import load_file, save_file

    from t2v_turbo.core import make_gen
    from t2v_turbo.pipeline import sample_student, sample_teacher
    from t2v_turbo.saved import load_student
    from t2v_turbo.teachers.folders import load_teacher
    path, said = a.out / "clips.safetensors", [SHOWN[1], SHOWN[3]]
    clips = load_file(path) if path.is_file() else {}
    for r in rows:
        if r["seed"] != a.first or (name := f"{r['model']}, {r['steps']} steps") in clips or (r["model"] == "teacher" and r["w"] != a.w): continue
        net = load_teacher(a.teacher) if r["model"] == "teacher" else load_student(students[r["model"], r["seed"]] / "student")
        if r["model"] == RIVAL: net = net.teacher                              # with its adapters on
        sample = sample_teacher if r["model"] in ("teacher", RIVAL) else sample_student
        clips[name] = sample(net, said, make_gen(0), r["steps"], a.w).mul(255).round().byte().contiguous()
    save_file(clips, path, dict(captions=json.dumps(said)))


def steps_rows(a, seed):
    "Judge finished students of a seed in other numbers of steps: OUT/steps/RUN-N/row.json"
    from types import SimpleNamespace

    from t2v_turbo.core import make_gen
    from t2v_turbo.evaluate import Sampler
    from t2v_turbo.pipeline import sample_student
    from t2v_turbo.saved import load_student
    beside = SimpleNamespace(**vars(a) | dict(out=a.out / "steps"))
    for n, model in itertools.product(a.sample_steps, a.stepped):
        if not (run := a.out / "rows" / folder(model, seed) / "student").is_dir(): continue
        def make(_, model=model, n=n, run=run):
            student = load_student(run)
            return judged(a, Sampler(model, n, n, lambda q, s: sample_student(student, q, make_gen(s), n, a.w)), seed, a.w)
        (beside.out / "rows").mkdir(parents=True, exist_ok=True)
        row_of(beside, folder(model, seed, n), dict(captions=a.captions, repeats=a.repeats, student_w=a.w), make)
    found = [json.loads(p.read_text()) for p in sorted((beside.out / "rows").glob("*/row.json"))]
    if found: (a.out / "steps.json").write_text(json.dumps(found, indent=2) + "\n")


def gather(a):
    "Put the rows that are there into one file, and looks and clips beside them; print the table"
    from t2v_turbo.evaluate import print_table, summarise
    from t2v_turbo.files import write_json
    rows, order = [json.loads(p.read_text()) for p in (a.out / "rows").glob("*/row.json")], ["teacher", *VARIANTS, *MORE, RIVAL]
    if not rows: return
    rows.sort(key=lambda r: (order.index(r["model"]), -r["steps"], r["w"], r["seed"]))
    write_json(a.out / "rows.json", rows)
    students = {(r["model"], r["seed"]): a.out / "rows" / folder(r["model"], r["seed"]) for r in rows if r["model"] != "teacher"}
    looks = [dict({k: v for k, v in json.loads(l).items() if k != "each"}, model=m, seed=s) for (m, s), run in students.items()
             if (run / "looks.jsonl").is_file() for l in (run / "looks.jsonl").read_text().splitlines()]
    write_json(a.out / "looks.json", looks)
    if a.clips: show(a, rows, students)
    swept = [r for r in rows if (r["model"], r["steps"]) == ("teacher", 50)]
    best = max(swept, key=lambda r: (r["seed"] == a.first, r["mean"]))["w"] if swept else None
    print_table(summarise([r for r in rows if r["model"] != "teacher" or r["w"] == best]))


def main(argv=None):
    a = options(argv)
    (a.out / "rows").mkdir(parents=True, exist_ok=True)
    seeds = range(a.first, a.first + a.seeds)
    if a.sample_steps:
        for seed in seeds: steps_rows(a, seed)
    elif not a.gather:
        for v in a.only: v == "teacher" or config_of(a, v, a.first)           # wrong settings are refused before anything is trained
        best = best_w(a) if "teacher" in a.only else None
        for seed in seeds:                                                    # a whole table after each seed
            for model in a.only:
                if model != "teacher": student_row(a, model, seed)
                else: teacher_row(a, 50, best, seed), teacher_row(a, 4, best, seed)
            gather(a)
    else: gather(a)


if __name__ == "__main__": main()
