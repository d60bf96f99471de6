"""Where does a surrogate's gradient point? A judge whose true gradient is known, and networks that learned its answers.

    python bench/surrogate_gradients.py nbs/experiments/surrogate_gradients.json       # 15 minutes of one core

The plain-CD student that ships makes predictions for batches of the small world; `tiny-video` scores them. Networks learn the scores of the first
batches and are compared on the others: the correlation of their predictions, and the cosine of two gradients in the student's trained weights, that
of the mean prediction and that of the mean reward. `halves` is the cosine of the true gradients of two halves of the same batches.
"""
import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from t2v_turbo.config import objective_of
from t2v_turbo.core import make_gen, seeded, step_gen
from t2v_turbo.data.sources import open_source
from t2v_turbo.distill import Distillation, draw
from t2v_turbo.files import write_json
from t2v_turbo.rewards.tiny import load_reward
from t2v_turbo.saved import load_student
from t2v_turbo.surrogate import HiddenSurrogate, Surrogate, hidden
from t2v_turbo.teachers.tiny import WEIGHTS

REWARD = load_reward("tiny-video")


def batch(model, source, step, size=8):
    "What a training step has, and what the data clips would score"
    teacher = model.student.teacher
    x, prompts = source.batch(step, size)
    with torch.no_grad():
        z0, ctx = teacher.encode(x), teacher.encode_text(prompts)
        d = draw(model.cfg, z0.shape, step_gen(0, step, "noise"))
        t = model.ddim.t(d.index)
        return dict(zt=teacher.schedule.add_noise(z0, d.noise, t), t=t, ctx=ctx, w=d.w, prompts=prompts, z0=z0)


def scored(model, b, x):
    "The judge on latents"
    return REWARD(model.student.teacher.decode(x), b["prompts"])


def gradient(model, batches, value):
    "Gradient of a mean over batches in the student's weights"
    params = list(model.student.trainable().values())
    for b in batches: (value(b, model.student(b["zt"], b["t"], b["ctx"], b["w"])).mean() / len(batches)).backward()
    g = torch.cat([p.grad.flatten() for p in params])
    for p in params: p.grad = None
    return g


def learned(net, read, x, ctx, score, steps):
    "Train a network on scores in units of their deviation, as `Follower` does"
    opt, gen, score = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=.01), make_gen(0), (score - score.mean()) / score.std()
    for _ in range(steps):
        at = torch.randint(len(x), (32,), generator=gen)
        with torch.no_grad(): seen = read(x[at], ctx[at])
        F.mse_loss(net(seen, ctx[at].mean(1)), score[at]).backward()
        opt.step(); opt.zero_grad()
    return net.requires_grad_(False)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, help="a .json file"); p.add_argument("--batches", type=int, default=104, help="to learn from")
    p.add_argument("--held", type=int, default=16, help="batches to compare on"); p.add_argument("--updates", type=int, default=600)
    a = p.parse_args(argv)
    student = load_student(WEIGHTS / "tiny-cd")
    teacher = student.teacher
    for n, q in teacher.denoiser.named_parameters(): q.requires_grad_("lora_" in n or "cond_proj" in n)
    model = Distillation(student, objective_of("tiny", beta_img=0., beta_vid=0.))
    source = open_source("", teacher.video_shape[1], tuple(teacher.video_shape[2:]), teacher.fps, 0)
    every = [batch(model, source, i) for i in range(a.batches + a.held)]
    with torch.no_grad():
        for b in every: b["x0"] = student(b["zt"], b["t"], b["ctx"], b["w"])
        for b in every: b["said"], b["data"] = scored(model, b, b["x0"]), scored(model, b, b["z0"])
    old, new = every[:a.batches], every[a.batches:]
    halves = [gradient(model, part, lambda b, x: F.logsigmoid(scored(model, b, x))) for part in (new[::2], new[1::2])]
    true, cosine, rows = sum(halves), lambda u, v: F.cosine_similarity(u, v, 0).item(), []
    print(f"halves of the true gradient: {cosine(*halves):.3f}", flush=True)
    def inside(x, ctx):
        with student.as_teacher(): return hidden(teacher, x, ctx)
    kinds = {"latents": (lambda: Surrogate(16, 96), lambda x, ctx: x), "teacher": (lambda: HiddenSurrogate(192, 96), inside)}
    for name, (make, read) in kinds.items():
        for data in (False, True):
            cat = lambda k: torch.cat([b[k] for b in old])
            x, ctx, said = ((torch.cat([cat(k), cat(m)]) if data else cat(k)) for k, m in (("x0", "z0"), ("ctx", "ctx"), ("said", "data")))
            with seeded(0): net = make()
            net = learned(net, read, x, ctx, said, a.updates)
            with torch.no_grad(): guess = torch.cat([net(read(b["x0"], b["ctx"]), b["ctx"].mean(1)) for b in new])
            rho = torch.corrcoef(torch.stack([guess, torch.cat([b["said"] for b in new])]))[0, 1].item()
            g = gradient(model, new, lambda b, x: net(read(x, b["ctx"]), b["ctx"].mean(1)))
            rows.append(dict(reads=name, data=data, correlation=rho, cosine=cosine(g, true)))
            print(f"{name}, {'with' if data else 'without'} answers about data clips: correlation {rho:.3f}, cosine {rows[-1]['cosine']:.3f}", flush=True)
    write_json(a.out, dict(batches=a.batches, held=a.held, updates=a.updates, halves=cosine(*halves), rows=rows))


transformers.utils.logging.disable_progress_bar()
if __name__ == "__main__": main()
