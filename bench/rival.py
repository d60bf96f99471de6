"""The rival of the method: rewards backpropagated through the last steps of a sampling chain, at the training time of one student.

    python bench/rival.py runs/rival --seeds 5                 # rows as of three_seeds.py: runs/rival/rows/rival-SEED/row.json
    python bench/rival.py runs/try --tune --last 4 --lr 5e-4   # choose settings on captions that are not judged later

The teacher gets LoRA of the students' rank and is sampled as it will be judged, in 4 guided DDIM steps from noise; the gradient of both rewards
flows through decoder and the last `--last` of them (as in DRaFT-K; InstructVideo cuts its chain, too). Nothing is distilled: captions are
its only data. First OUT/cost.json is measured in one process: CPU seconds and bytes of a step of a T2V-Turbo student and of the rival;
the rival takes as many steps as fit into the student's CPU seconds. Stop it at any time; it resumes.
"""
import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import three_seeds
import torch
from three_seeds import BOTH, config_of, folder, gather, judged, row_of

from t2v_turbo.core import make_gen
from t2v_turbo.distill import StepOut
from t2v_turbo.evaluate import Sampler
from t2v_turbo.files import write_json
from t2v_turbo.meter import Meter
from t2v_turbo.pipeline import sample_teacher
from t2v_turbo.saved import load_student
from t2v_turbo.solver import DDIM, guided_pred
from t2v_turbo.teachers.folders import defaults_of
from t2v_turbo.train import Trainer


def sampled(teacher, z, w, ctx, null, steps, last):
    "Guided DDIM from noise z to the sample, with gradient through the last few steps"
    ddim = DDIM(teacher.schedule, steps)
    for i in reversed(range(steps)):
        index = torch.full((len(z),), i)
        with torch.set_grad_enabled(i < last): x0, eps = guided_pred(teacher.denoise, z, ddim.t(index), w, ctx, null)
        z = ddim.step(x0, eps, index)
    return x0


class Rival(Trainer):
    "Trains LoRA on samples alone; data, optimiser, schedule and checkpoints are those of a student"
    def __init__(self, cfg, steps=4, last=1):
        super().__init__(replace(cfg, ema=0.))
        self.chain, self.last = steps, last

    def terms(self, x, prompts, d):
        ctx, null, cfg = self.contexts(prompts), self.contexts.null(len(prompts)), self.model.cfg
        x0 = sampled(self.student.teacher, d.noise, defaults_of(self.cfg.teacher).guidance, ctx, null, self.chain, self.last)
        j_img, j_vid, r_img, r_vid = self.model.rewards(x0, prompts, d)
        unused = 0. * self.student.w_projection.weight.sum()
        loss = unused - cfg.beta_img * j_img - cfg.beta_vid * j_vid
        return StepOut(loss, *(v.detach() for v in (0. * j_img, j_img, j_vid, r_img, r_vid, x0)))


def one(trainer):
    "A step, without its log"
    trainer.backward(); trainer.update()


def peak(make):
    "Bytes of a first step beside the weights"
    trainer = make()
    with Meter("cpu", [*trainer.model.parameters(), *trainer.model.buffers()]) as m: one(trainer)
    return m.peak


def cost(a, out):
    "CPU seconds and bytes of a step, student and rival in turns; steps of the rival at equal time"
    path, cfg = out / "cost.json", config_of(a, BOTH, 0, out / "cost")
    if path.is_file(): return json.loads(path.read_text())
    makers = dict(student=lambda: Trainer(cfg)) | {f"rival, last {k}": (lambda k=k: Rival(cfg, 4, k)) for k in sorted({1, 2, 4, a.last})}
    memory = {n: peak(m) for n, m in makers.items()}
    pair, spent = {n: makers[n]() for n in ("student", f"rival, last {a.last}")}, {}
    for i in range(a.timed + 1):                                               # the first warms up
        for n, trainer in pair.items():
            start = time.process_time(); one(trainer)
            if i: spent.setdefault(n, []).append(round(time.process_time() - start, 4))
    each = {n: sum(v) / len(v) for n, v in spent.items()}
    steps = round(cfg.steps * each["student"] / each[f"rival, last {a.last}"])
    write_json(path, dict(student_steps=cfg.steps, last=a.last, cpu_seconds=spent, cpu_seconds_a_step=each, rival_steps=steps, peak_bytes=memory))
    shutil.rmtree(out / "cost", ignore_errors=True)
    return json.loads(path.read_text())


def rival_row(a, out, seed, steps):
    "Train a rival, or go on with it, and judge it in 4 guided steps"
    cfg = replace(config_of(a, BOTH, seed), lr=a.lr or config_of(a, BOTH, seed).lr, steps=steps)
    def make(run):
        trainer = Rival(replace(cfg, out=str(run)), 4, a.last); trainer.resume()
        for row in trainer.fit():
            if trainer.step % 20 == 0: print(f"{run.name}: step {trainer.step} of {steps}, image reward {row['r_img']:.2f}, video reward {row['r_vid']:.2f}", flush=True)
        teacher = load_student(run / "student").teacher                         # with its adapters on
        row = judged(a, Sampler("rival", 4, 8, lambda q, s: sample_teacher(teacher, q, make_gen(s), 4, a.w)), seed, a.w, again=True)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        return row
    own = {k: getattr(cfg, k) for k in ("teacher", "steps", "batch", "lr", "lr_schedule", "rank", "seed", "clip")}
    return row_of(a, folder("rival", seed), own | dict(last=a.last, chain=4, captions=a.captions, repeats=a.repeats), make)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path); p.add_argument("--seeds", type=int, default=5, help="how many"); p.add_argument("--first", type=int, default=0, help="the first of them")
    p.add_argument("--teacher", default="tiny"); p.add_argument("--last", type=int, default=1, help="steps of the chain that gradients flow through, 1 to 4")
    p.add_argument("--lr", type=float, help="default: that of the students"); p.add_argument("--steps", type=int, help="default: those of equal time")
    p.add_argument("--captions", type=int, default=96); p.add_argument("--repeats", type=int, default=1); p.add_argument("--timed", type=int, default=10, help="steps that are timed")
    p.add_argument("--tune", action="store_true", help="judge the 48 captions that chose the students' settings")
    g = p.parse_args(argv)
    if g.tune: three_seeds.TUNED, g.captions = 0, 48
    a = SimpleNamespace(**vars(g), set="", lr_cd=None, clips=False, w=defaults_of(g.teacher).guidance)
    (a.out / "rows").mkdir(parents=True, exist_ok=True)
    steps = a.steps or cost(a, a.out)["rival_steps"]
    for seed in range(a.first, a.first + a.seeds): rival_row(a, a.out, seed, steps)
    gather(a)


if __name__ == "__main__": main()
