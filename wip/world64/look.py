"""Sample a sheet: `python look.py --vae vae.pt --teacher teacher/last.pt --out s.png`"""
import argparse
from pathlib import Path

import torch

import world
from diffusion import sample
from nets import tokens
from sheets import sheet
from train_teacher import Teacher, load_vae


def load_teacher(path: Path) -> Teacher:
    "The averaged weights of a checkpoint, frozen"
    state = torch.load(path)
    teacher = Teacher()
    teacher.load_state_dict(state.get("ema", state))
    return teacher.float().requires_grad_(False).eval()


def shown() -> torch.Tensor:
    "24 combinations: every noun twice, every colour, scene and motion"
    i = torch.arange(24)
    return torch.stack([i % 12, (i * 5 + i // 12) % 8, (i + i // 12) % 6, (3 * i + i // 8) % 8], 1)


@torch.no_grad()
def clips_of(teacher: Teacher, vae, captions: list, seed: int, steps: int, w: float):
    "Clips `(b 3 8 64 64)` for captions"
    noise = torch.randn(len(captions), 16, 8, 8, 8, generator=world.step_gen(seed, 0))
    context, nothing = (teacher.text(tokens(c)) for c in (captions, [""]))
    with torch.autocast("cpu", torch.bfloat16):
        return vae.decode(sample(teacher.net, context, nothing, noise, steps, w)).float()


def parser(about: str) -> argparse.ArgumentParser:
    "Options of a script that reads both networks and writes something"
    p = argparse.ArgumentParser(description=about)
    for name in ("vae", "teacher", "out"):
        p.add_argument(f"--{name}", type=Path, required=True)
    return p


def main() -> None:
    "Write the sheet"
    p = parser(__doc__)
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--w", type=float, default=2.5)
    p.add_argument("--n", type=int, default=24)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    captions = [world.caption(*row) for row in shown()[:a.n].tolist()]
    clips = clips_of(load_teacher(a.teacher), load_vae(a.vae), captions, a.seed, a.steps, a.w)
    sheet(clips, captions, a.out, 1, 2)


if __name__ == "__main__":
    main()
