"""What a reward of one's own does to the student: "less flicker", mixed with the tiny video reward at several weights.

    python bench/add_a_reward.py runs/steady              # weights 0, 1 and 10, two seeds; goes on where it was
    python bench/add_a_reward.py runs/steady --seeds 1 --weights 0,1 --steps 100

Writes OUT/rows.json, means over the held-out clips of each weight, seed and motion, and OUT/clips.safetensors, two captions at
each weight. The notebook nbs/tutorials/add_a_reward.ipynb draws them. Weight 0 is the plain T2V-Turbo student of the same seed.
"""
import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from t2v_turbo.core import make_gen, write_json
from t2v_turbo.evaluate import high_frequency, judge, load_judges, motion_amount, saturation
from t2v_turbo.pipeline import sample_student
from t2v_turbo.rewards.base import mix
from t2v_turbo.rewards.tiny import load_reward
from t2v_turbo.student import load_student
from t2v_turbo.train import Config, Trainer
from t2v_turbo.world import MOTIONS, caption, combos, parse

SHOWN = "a yellow square moving right", "a red square growing"       # held out, both


def steady(frames, prompts):
    "Minus the squared change of mean brightness between neighbouring frames, in units of ten grey levels"
    light = frames.mean((1, 3, 4))
    return -(25.5 * light.diff(dim=1)).pow(2).mean(1)


def train(out, weight, seed, steps):
    "The student of one weight and seed, in OUT/WEIGHT-SEED/student"
    folder = out / f"{weight:g}-{seed}"
    if (folder / "done").is_file(): return folder / "student"
    video = mix({load_reward("tiny-video"): 1.} | ({steady: weight} if weight else {}))
    trainer = Trainer(Config(out=str(folder), seed=seed, steps=steps, track=""), video_reward=video)
    trainer.resume()
    for row in trainer.fit():
        if trainer.step % 50 == 0: print(f"{folder.name}: step {trainer.step}, R_vid {row['r_vid']:.2f}", flush=True)
    (folder / "done").touch()
    return folder / "student"


@torch.no_grad()
def look(student, repeats=4, w=2.):
    "One row a motion: means of judges, rewards and instruments over held-out clips of four steps"
    net, image, video = load_judges(), load_reward("tiny-image"), load_reward("tiny-video")
    prompts, found = [caption(*a) for a in combos("heldout").tolist()], []
    for i in range(repeats):
        clips = sample_student(student, prompts, make_gen(1000 + i), 4, w).cpu()
        found.append(judge(net, clips, prompts) | dict(
            r_img=image(clips, prompts), r_vid=video(clips, prompts), steady=steady(clips, prompts),
            motion_amount=motion_amount(clips), saturation=saturation(clips), high_frequency=high_frequency(clips)))
    kind = torch.tensor([parse(p)[2] for p in prompts]).repeat(repeats)
    score = {k: torch.cat([f[k] for f in found]) for k in found[0]}
    return [dict(motion_word=word, clips=int((kind == m).sum()), **{k: round(v[kind == m].mean().item(), 4) for k, v in score.items()})
            for m, word in enumerate(MOTIONS)]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("out", type=Path)
    p.add_argument("--weights", default="0,1,10"); p.add_argument("--seeds", type=int, default=2)
    p.add_argument("--steps", type=int, default=Config.steps)
    a = p.parse_args()
    weights, rows, clips = [float(w) for w in a.weights.split(",")], [], {}
    for seed in range(a.seeds):
        for weight in weights:
            student = load_student(train(a.out, weight, seed, a.steps))
            rows += [dict(weight=weight, seed=seed, **r) for r in look(student)]
            if seed == 0:
                x = sample_student(student, list(SHOWN), make_gen(0), 4, 2.)[:, :, [0, 2, 4, 5, 7]]
                clips[f"{weight:g}"] = (x * 255).round().byte().contiguous()
            write_json(a.out / "rows.json", rows)
            save_file(clips, a.out / "clips.safetensors")
    for weight in weights:
        mine = [r for r in rows if r["weight"] == weight]
        n = sum(r["clips"] for r in mine)
        print(f"{weight:g}", {k: round(sum(r[k] * r["clips"] for r in mine) / n, 3) for k in mine[0] if isinstance(mine[0][k], float)})


if __name__ == "__main__": main()
