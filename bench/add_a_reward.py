"""What a reward of one's own does to the student: "less flicker", alone and mixed with the tiny video reward.

    python bench/add_a_reward.py runs/steady              # five variants, two seeds, 40 steps each; goes on where it was
    python bench/add_a_reward.py runs/steady --seeds 1 --variants turbo "turbo + steady"

Writes OUT/rows.json, means over the held-out clips of each variant, seed and motion, and OUT/clips.safetensors, one caption of
every variant. The notebook nbs/tutorials/add_a_reward.ipynb draws them.
"""
import argparse
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from t2v_turbo.core import make_gen
from t2v_turbo.files import write_json
from t2v_turbo.judges import (
    held_captions,
    high_frequency,
    judge,
    load_judges,
    motion_amount,
    saturation,
)
from t2v_turbo.pipeline import sample_student
from t2v_turbo.rewards.base import mix
from t2v_turbo.rewards.tiny import load_reward
from t2v_turbo.saved import load_student
from t2v_turbo.train import Config, Trainer
from t2v_turbo.world import MOTIONS, parse

VARIANTS = {  # are the tiny rewards in the loss? weight of `steady`
    "cd": (0, 0), "cd + steady": (0, 1), "turbo": (1, 0), "turbo + steady": (1, 1), "turbo + 10 steady": (1, 10)}
SHOWN = "a yellow fish moving right in the sea", "a pink rocket growing at night"           # held out, both


def steady(frames, prompts):
    "Minus the squared change of mean brightness between neighbouring frames, in units of ten grey levels"
    light = frames.mean((1, 3, 4))
    return -(25.5 * light.diff(dim=1)).pow(2).mean(1)


def train(out, variant, seed, steps):
    "The student of one variant and seed, in OUT/VARIANT-SEED/student"
    tiny, weight = VARIANTS[variant]
    folder = out / "-".join([*variant.replace("+", "").split(), str(seed)])
    if (folder / "done").is_file(): return folder / "student"
    parts = ({load_reward("tiny-video"): 1.} if tiny else {}) | ({steady: weight} if weight else {})
    usual = Config(steps=steps).objective
    o = replace(usual, beta_img=usual.beta_img * tiny, beta_vid=usual.beta_vid * bool(parts))
    trainer = Trainer(Config(out=str(folder), seed=seed, steps=steps, track="", objective=o),
                      video_reward=mix(parts) if parts else None)
    trainer.resume()
    for row in trainer.fit():
        if trainer.step % 50 == 0: print(f"{folder.name}: step {trainer.step}, R_vid {row['r_vid']:.2f}", flush=True)
    (folder / "done").touch()
    return folder / "student"


@torch.no_grad()
def look(student, repeats=1, w=2.5):
    "One row a motion: means of judges, rewards and instruments over held-out clips of four steps"
    net, image, video = load_judges(), load_reward("tiny-image"), load_reward("tiny-video")
    prompts, found = held_captions(96), []
    for i in range(repeats):
        clips = torch.cat([sample_student(student, prompts[j:j+24], make_gen(1000*i + j), 4, w).cpu() for j in range(0, len(prompts), 24)])
        found.append(judge(net, clips, prompts) | dict(
            r_img=image(clips, prompts), r_vid=video(clips, prompts), own=steady(clips, prompts),
            motion_amount=motion_amount(clips), saturation=saturation(clips), high_frequency=high_frequency(clips)))
    kind = torch.tensor([parse(p)[3] for p in prompts]).repeat(repeats)
    score = {k: torch.cat([f[k] for f in found]) for k in found[0]}
    return [dict(motion_word=word, clips=int((kind == m).sum()), **{k: round(v[kind == m].mean().item(), 4) for k, v in score.items()})
            for m, word in enumerate(MOTIONS)]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("out", type=Path)
    p.add_argument("--seeds", type=int, default=2); p.add_argument("--steps", type=int, default=40)
    p.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    a = p.parse_args()
    rows, clips = [], {}
    for seed in range(a.seeds):
        for variant in a.variants:
            student = load_student(train(a.out, variant, seed, a.steps))
            rows += [dict(variant=variant, seed=seed, **r) for r in look(student)]
            if seed == 0:
                x = sample_student(student, list(SHOWN), make_gen(0), 4, 2.5)[:, :, ::2]
                clips[variant] = (x * 255).round().byte().contiguous()
            write_json(a.out / "rows.json", rows)
            save_file(clips, a.out / "clips.safetensors")
    for variant in a.variants:
        mine = [r for r in rows if r["variant"] == variant]
        n = sum(r["clips"] for r in mine)
        print(variant, {k: round(sum(r[k] * r["clips"] for r in mine) / n, 3) for k in mine[0] if isinstance(mine[0][k], float)})


if __name__ == "__main__": main()
