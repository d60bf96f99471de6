"""Train a judge or a reward: `python train_raters.py frame --vae vae.pt --pool p --folder f`"""
import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn

import world
from grading import Graded, grade_loss, graded, joined, word_loss
from judges import ClipJudge, FrameJudge
from loop import train
from rewards import ImageReward, TubeReward, VideoReward, jittered
from train_teacher import load_vae

KINDS = dict(frame=FrameJudge, clip=ClipJudge, image=ImageReward, video=VideoReward,
             tube=TubeReward)
CHUNK = 32


def pool(vae, folder: Path, seed: int, n: int, split: str) -> Graded:
    "`n` graded clips of a seed, made once and kept in half precision"
    path = folder / f"graded-{split}-{seed}-{n}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        parts = [graded(vae, seed, i, CHUNK, split) for i in range(n // CHUNK)]
        every = joined(parts)
        every.video = (every.video * 255).round().to(torch.uint8)
        torch.save(vars(every), path)
    return Graded(**torch.load(path))


def loss(net: nn.Module, g: Graded, at: Tensor) -> Tensor:
    "Words and grade of a batch; nets of frames see one frame `at` of each clip"
    if isinstance(net, (FrameJudge, ImageReward)):
        g.video = g.video[torch.arange(len(at)), :, at]
        heads = net(g.video) if isinstance(net, FrameJudge) else net.heads(g.video)
        return word_loss(heads, g, (0, 1, 2)) + 2 * grade_loss(heads[3][:, 0], g.look)
    if isinstance(net, ClipJudge):
        motion, steady = net(g.video)
        words = word_loss((None, None, None, motion), g, (3,))
        return words + 2 * grade_loss(steady[:, 0], g.steady)
    heads = net.heads(g.video)
    return word_loss(heads, g, (0, 1, 2, 3)) + 2 * grade_loss(heads[4][:, 0], g.look * g.steady)


def main() -> None:
    "Train, or go on"
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("kind", choices=KINDS)
    p.add_argument("--vae", type=Path, required=True)
    p.add_argument("--pool", type=Path, required=True)
    p.add_argument("--folder", type=Path, required=True)
    p.add_argument("--clips", type=int, default=4096)
    p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--hours", type=float, default=1.)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--seed", type=int, default=101)
    a = p.parse_args()
    split = "all" if a.kind in ("frame", "clip") else "train"   # rewards never meet a held-out pair
    torch.manual_seed(a.seed)
    net, every = KINDS[a.kind](), pool(load_vae(a.vae), a.pool, a.seed, a.clips, split)

    def loss_of(step):
        gen = world.step_gen(a.seed + 3, step)
        g = every.rows(torch.randint(a.clips, (32,), generator=gen))
        g.video = jittered(g.video.float() / 255, gen)
        with torch.autocast("cpu", torch.bfloat16):
            return loss(net, g, torch.randint(world.FRAMES, (32,), generator=gen))

    rate = lambda step: min(1., (step + 1) / 50) * (.5 + .5 * math.cos(math.pi * step / a.steps))
    opt = torch.optim.AdamW(net.parameters(), a.lr, weight_decay=.01, fused=True)
    ema = train(net, loss_of, rate, a.folder, a.steps, a.hours, opt, decay=.99, per_step=32)
    torch.save(ema, a.folder / f"{a.kind}.pt")


if __name__ == "__main__":
    main()
