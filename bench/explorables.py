"""The stored clips and numbers behind the pictures that a reader can drag, nbs/explore/*.js.

    python bench/explorables.py --student T2V-Turbo=runs/turbo/student         # all four files, of a student of `t2v-turbo distill`
    python bench/explorables.py --only ablation                                # from nbs/ablation* alone, no sampling

Plain CD, the shipped student, is always there. Other teachers, students and worlds need no change of the JavaScript:
models, captions, sizes, steps and columns are in the files. Pictures are one WebP a file, of the best quality that
fits `--kilobytes`.
"""
import argparse
import base64
import io
import json
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from t2v_turbo.ablate import by_setting, read_table
from t2v_turbo.core import make_gen
from t2v_turbo.files import UserError, atomic
from t2v_turbo.judges import held_captions, judge, judge_score, load_judges, motion_amount
from t2v_turbo.pipeline import sample_student, sample_teacher
from t2v_turbo.saved import load_student
from t2v_turbo.teachers.folders import defaults_of, load_teacher
from t2v_turbo.teachers.tiny import WEIGHTS
from t2v_turbo.world import parse, render

NBS = Path(__file__).parents[1] / "nbs"
QUALITIES = (92, 85, 75, 65, 55, 45, 35)                        # of a WebP, tried in this order
SHOWN = ("a yellow fish moving right in the sea", "a pink rocket growing at night", "a blue house shrinking in the meadow", "a white cat bouncing by the wall")  # held out
JUDGED = dict(noun="judged noun", colour="judged colour", scene="judged scene", motion="judged motion", look="judged look", steady="judged steadiness")
NAMES = dict(score="judges' score, log-probability", **JUDGED, amount="motion, grey levels a frame")
TABLE = dict(held_out="judges' score, log-probability", r_img="image reward", r_vid="video reward", noun="judged noun", motion="judged motion",
             look="judged look", steady="judged steadiness", motion_amount="motion, grey levels a frame")

transformers.utils.logging.disable_progress_bar()


def sheet(clips, kilobytes):
    "All frames of clips (n 3 t h w) in [0, 1], row by row in one WebP, and the sizes that find a frame in it"
    n, _, t, h, w = clips.shape
    cols = t * max(1, min(-(-n // 4), 2048 // (t * w)))         # about square, and far below WebP's 16383 pixels
    rows = -(-n * t // cols)
    tiles = clips.clamp(0, 1).permute(0, 2, 3, 4, 1).flatten(0, 1).mul(255).round().byte()
    tiles = torch.cat([tiles, tiles.new_zeros(rows * cols - n * t, h, w, 3)])
    page = Image.fromarray(tiles.view(rows, cols, h, w, 3).transpose(1, 2).reshape(rows * h, cols * w, 3).numpy())
    for quality in QUALITIES:
        page.save(to := io.BytesIO(), "webp", quality=quality, method=6)
        if len(to.getvalue()) * 4 / 3 < kilobytes * 1000: break
    else: raise UserError(f"{n} clips of {t} frames do not fit {kilobytes} kB: give more --kilobytes, or fewer captions and seeds")
    image = "data:image/webp;base64," + base64.b64encode(to.getvalue()).decode()
    return dict(width=w, height=h, frames=t, cols=cols, image=image)


def grey(a, b):
    "Mean absolute difference of clips (n ..) in grey levels, (n,) rounded"
    return [round(v, 2) for v in ((a - b).abs().flatten(1).mean(1) * 255).tolist()]


@torch.no_grad()
def levels(a, teacher, students):
    "One clip at many noise levels: noised, the teacher's mean, the jump of plain CD"
    name, student = next(iter(students.items()))
    clean, ctx = render(torch.tensor([parse(SHOWN[0])]), make_gen(a.seed)), student.teacher.encode_text([SHOWN[0]])
    z0 = student.teacher.encode(clean)
    noise, times, rows = torch.randn(z0.shape, generator=make_gen(a.seed + 1)), [19, *range(119, 840, 120), 999], []
    for t in tqdm(times, desc="levels"):
        at = torch.tensor([t])
        zt = student.teacher.schedule.add_noise(z0, noise, at)
        f = student(zt, at, ctx, torch.tensor([a.w]))
        with student.as_teacher(): x0, _ = student.teacher.denoise(zt, at, ctx)
        rows.append(torch.cat([student.teacher.decode(x) for x in (zt, x0, f)]))
    clips = torch.stack(rows, 1)                                                   # part, time, 3, t, h, w
    parts = [dict(name="zt", title="noised, z_t"), dict(name="x0", title="teacher: the mean", distance=grey(clips[1], clean)),
             dict(name="f", title=f"{name}: f, one jump", distance=grey(clips[2], clean))]
    return dict(times=times, parts=parts, caption=SHOWN[0], sheet=sheet(clips.transpose(0, 1).flatten(0, 1), a.kilobytes))


def players(a, teacher, students):
    "The same captions and start noise: the teacher in 50 steps and in 4, each student in 4"
    prompts, seeds = list(SHOWN), [a.seed + i for i in range(2)]
    models = {"teacher, 50 steps": (100, lambda p, g: sample_teacher(teacher, p, g, 50, a.w)),
              "teacher, 4 steps": (8, lambda p, g: sample_teacher(teacher, p, g, 4, a.w))}
    models |= {f"{n}, 4 steps": (4, lambda p, g, s=s: sample_student(s, p, g, 4, a.w)) for n, s in students.items()}
    clips, judges = [], load_judges()
    for calls, f in tqdm(models.values(), desc="players"):
        clips.append(torch.stack([f(prompts, make_gen(s)) for s in seeds], 1))     # caption, seed
    clips = torch.stack(clips).flatten(0, 2)
    every = [p for p in prompts for _ in seeds] * len(models)
    scores = [round(v, 3) for v in judge_score(judges, clips, every).tolist()]
    about = f"Guidance w = {a.w:g}. The numbers: judges\u2019 score of this clip (a log-probability, 0 is best), and the cost."
    return dict(models=list(models), calls=[c for c, _ in models.values()], captions=prompts, seeds=seeds, scores=scores, about=about,
                sheet=sheet(clips, a.kilobytes))


def guidance(a, teacher, students):
    "One clip for each number of steps and guidance scale, and the judges' means over captions that were never trained on"
    prompts = [SHOWN[1], *held_captions(a.captions - 1)]
    scales, judges = [0, 1, 2, 4], load_judges()
    models = [("teacher", [4, 16, 50], 2, lambda g, n, w: sample_teacher(teacher, prompts, g, n, w))]
    models += [(name, [1, 2, 4], 1, lambda g, n, w, s=s: sample_student(s, prompts, g, n, w)) for name, s in students.items()]
    clips, rows = [], []
    bar = tqdm([(f, n, w) for _, ns, _, f in models for n in ns for w in scales], desc="guidance")
    for f, n, w in bar:
        x = f(make_gen(a.seed), n, float(w))
        mean = {k: v.mean().item() for k, v in judge(judges, x, prompts).items()}
        row = dict(score=judge_score(judges, x, prompts).mean().item(), **mean, amount=motion_amount(x).mean().item())
        rows.append({k: round(row[k], 3) for k in NAMES})
        clips.append(x[0])
    about = f"The numbers are means over {len(prompts)} captions that no model was trained on, by judges that were in no loss."
    return dict(models=[dict(name=n, steps=s, calls=c) for n, s, c, _ in models], w=scales, columns=NAMES, rows=rows, caption=prompts[0],
                about=about, sheet=sheet(torch.stack(clips), a.kilobytes))


def ablation(a, teacher, students):
    "The students of nbs/98_ablation: clips of the first training seed, means and spread over all seeds"
    rows, path = read_table(a.table), a.clips
    axes = ["beta_img", "beta_vid"]
    there = {tuple(r[x] for x in axes) for r in rows}
    ys = sorted({y for _, y in there})
    values = [[x for x in sorted({x for x, _ in there}) if all((x, y) in there for y in ys)], ys]    # whole columns of a growing grid
    clips, columns = load_file(path), {k: v for k, v in TABLE.items() if k in rows[0]}
    grids = {c: by_setting(rows, axes, c) for c in columns}
    with safe_open(path, "pt") as f: captions = json.loads(f.metadata()["captions"])
    cells = [(x, y) for x in values[0] for y in values[1]]
    keys = [f"beta_img={x:g} beta_vid={y:g}" for x, y in cells]
    spread = lambda m, s, n: [round(m, 3), round(s, 3) if n > 1 else 0.]
    table = [{c: spread(*grids[c][k]) for c in columns} for k in cells]
    n = sorted({grids[next(iter(columns))][k][2] for k in cells})
    seeds = "one training seed" if n == [1] else f"{n[0]} training seeds" if len(n) == 1 else f"{n[0]} to {n[-1]} training seeds"
    about = f"Mean and standard deviation over {seeds}. The clips are of the first."
    return dict(axes=axes, values=values, columns=columns, rows=table, captions=captions, about=about,
                sheet=sheet(torch.cat([clips[k].float() / 255 for k in keys]), a.kilobytes))


MAKE = dict(levels=levels, players=players, guidance=guidance, ablation=ablation)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teacher", default="tiny", help="a name or folder that `distill --teacher` takes")
    p.add_argument("--student", action="append", default=[], metavar="NAME=FOLDER", help="a student beside plain CD; may be repeated")
    p.add_argument("--cd", type=Path, default=WEIGHTS / "tiny-cd", help="folder of the plain-CD student")
    p.add_argument("--only", nargs="*", choices=list(MAKE), default=list(MAKE), help="files to write; default: all")
    p.add_argument("--out", type=Path, default=NBS / "explore", help="folder of explore.js")
    p.add_argument("--table", type=Path, default=NBS / "ablation.csv", help="rows.csv of `t2v-turbo ablate`")
    p.add_argument("--clips", type=Path, default=NBS / "ablation_clips.safetensors", help="written by bench/ablation_clips.py")
    p.add_argument("--seed", type=int, default=0, help="of the start noise")
    p.add_argument("--w", type=float, help="guidance scale where none is chosen; default: the teacher's")
    p.add_argument("--captions", type=int, default=24, help="captions of the judges' means")
    p.add_argument("--kilobytes", type=int, default=200, help="most that one file's pictures may take")
    a = p.parse_args(argv)
    if a.w is None: a.w = defaults_of(a.teacher).guidance
    teacher, students = None, {}
    if set(a.only) - {"ablation"}:
        teacher = load_teacher(a.teacher)
        students = {n: load_student(f) for n, f in [("plain CD", a.cd), *(s.split("=", 1) for s in a.student)]}
    for name in a.only:
        text = json.dumps(MAKE[name](a, teacher, students), ensure_ascii=False, separators=(",", ":"))
        with atomic(path := a.out / f"{name}.js") as tmp: tmp.write_text(f"(window.exploreData ??= {{}}).{name} = {text};\n", encoding="utf-8")
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__": main()
