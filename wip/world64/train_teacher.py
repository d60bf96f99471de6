"""Train the teacher: `python train_teacher.py --vae V --pool P --folder F --steps 10000`

Latents come from a pool that grows while training: now and then a few new clips are rendered and
encoded, and most of a batch is drawn from what is there. The pool is a file; what it holds depends
on the seed alone. The rate is constant but for the last steps, so a run can be made longer or
shorter by going on with another `--steps`.
"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import world
from diffusion import angle_of, draw_times, mixed, target
from loop import train
from nets import CHANNELS, LONGEST, SIDE, PatchVAE, TextEncoder, VideoNet, tokens

BATCH, NEW, EVERY, FIRST = 32, 32, 8, 4096  # clips a step; 32 new ones every 8 steps
IMAGES, IMAGE_SHIFT = 256, .2  # frames a step; 8 times fewer looks at a scene need less noise
SHAPE = (CHANNELS, world.FRAMES, SIDE, SIDE)


class Teacher(nn.Module):
    "Denoiser and text encoder, trained together"
    def __init__(self):
        super().__init__()
        self.net, self.text = VideoNet(), TextEncoder()


def load_vae(path: Path) -> PatchVAE:
    "The trained autoencoder, frozen"
    vae = PatchVAE()
    vae.load_state_dict({k: v.float() for k, v in torch.load(path).items()})
    return vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)


class Pool:
    "Latents and captions of clips 0, 1, ... of a seed, on disk in half precision"
    def __init__(self, vae: PatchVAE, folder: Path, seed: int, room: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.vae, self.seed, self.count = vae, seed, folder / "count.txt"
        new = not self.count.exists()
        mode = "w+" if new else "r+"
        self.z = np.lib.format.open_memmap(folder / "z.npy", mode, np.float16, (room, *SHAPE))
        self.ids = np.lib.format.open_memmap(folder / "ids.npy", mode, np.int64, (room, LONGEST))
        self.n = 0 if new else int(self.count.read_text())

    @torch.no_grad()
    def grow(self, n: int) -> None:
        "Render and encode until there are at least `n` clips"
        while self.n < n:
            b = world.batch(self.seed, self.n // NEW, NEW)
            with torch.autocast("cpu", torch.bfloat16):
                self.z[self.n:self.n + NEW] = self.vae.encode(b.video).half().numpy()
            self.ids[self.n:self.n + NEW] = tokens(b.captions()).numpy()
            self.n += NEW
            self.count.write_text(str(self.n))

    def draw(self, n: int, among: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
        "Latents and word numbers of `n` of the first `among` clips"
        at = torch.randint(among, (n,), generator=gen).numpy()
        return torch.from_numpy(self.z[at]).float(), torch.from_numpy(self.ids[at])


def loss(teacher: Teacher, x: Tensor, ids: Tensor, gen: torch.Generator, drop: float = .1,
         shift: float = 1.2, at: Tensor | None = None) -> Tensor:
    "Squared error of the predicted v; captions are dropped now and then"
    e = torch.randn(x.shape, generator=gen)
    phi = angle_of(draw_times(len(x), gen, shift))
    ids = ids * (torch.rand(len(x), 1, generator=gen) >= drop)
    with torch.autocast("cpu", torch.bfloat16):
        v = teacher.net(mixed(x, e, phi), phi, teacher.text(ids), at)
    return (v - target(x, e, phi)).pow(2).mean()


class MuonAndAdam:
    "Muon for the matrices of the blocks, AdamW for all else"
    def __init__(self, teacher: Teacher, muon: float, adam: float):
        ends = ("qkv.weight", "out.weight", "up.weight", "down.weight")
        inner = lambda name: "blocks" in name and name.endswith(ends)
        named = list(teacher.named_parameters())
        self.parts = (
            torch.optim.Muon([p for n, p in named if inner(n)], muon, weight_decay=.01,
                             adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([p for n, p in named if not inner(n)], adam, (.9, .99),
                              weight_decay=.01, fused=True))
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        "Of both"
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        "Of both"
        for part in self.parts:
            part.step()

    def state_dict(self) -> list:
        "Of both"
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list) -> None:
        "Of both"
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)
        self.param_groups[:] = [group for part in self.parts for group in part.param_groups]


def main() -> None:
    "Train, or go on"
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--vae", type=Path, required=True)
    p.add_argument("--pool", type=Path, required=True)
    p.add_argument("--folder", type=Path, required=True)
    p.add_argument("--steps", type=int, required=True)
    p.add_argument("--cool", type=int, default=3000, help="steps in which the rate falls")
    p.add_argument("--hours", type=float, default=1.)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--seed", type=int, default=20)
    p.add_argument("--images", type=int, default=3000, help="first steps: on single frames")
    p.add_argument("--image_every", type=int, default=5, help="afterwards, one step in so many")
    a = p.parse_args()
    torch.manual_seed(a.seed)
    teacher = Teacher()
    pool = Pool(load_vae(a.vae), a.pool, a.seed, FIRST + NEW * math.ceil(a.steps / EVERY))

    def loss_of(step):
        among = FIRST + NEW * (step // EVERY)
        pool.grow(among)
        gen = world.step_gen(a.seed + 1, step)
        if step < a.images or step % a.image_every == 0:
            x, ids = pool.draw(IMAGES, among, gen)
            at = torch.randint(world.FRAMES, (IMAGES,), generator=gen)
            x = x[torch.arange(IMAGES), :, at][:, :, None]
            return loss(teacher, x, ids, gen, shift=IMAGE_SHIFT, at=at)
        return loss(teacher, *pool.draw(BATCH, among, gen), gen)

    opt = MuonAndAdam(teacher, a.lr, .75 * a.lr)
    rate = lambda step: min(1., (step + 1) / 300, (a.steps - step) / a.cool)
    train(teacher, loss_of, rate, a.folder, a.steps, a.hours,
          opt, decay=.9995, per_step=BATCH)


if __name__ == "__main__":
    main()
