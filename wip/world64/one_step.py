"""Noisy clips, denoised in one step: `python one_step.py --vae V --teacher T --out O`

Rows: a clip, then its prediction from each of `TIMES`, with the mean squared errors of 16 clips.
"""
import torch

import world
from diffusion import angle_of, mixed, per_clip, target
from look import load_teacher, parser
from nets import tokens
from sheets import sheet
from train_teacher import load_vae

TIMES = (.5, .7, .85, .92, .96)


@torch.no_grad()
def main() -> None:
    "Write the sheet"
    p = parser(__doc__)
    p.add_argument("--n", type=int, default=4)
    a = p.parse_args()
    teacher, vae = load_teacher(a.teacher), load_vae(a.vae)
    b, gen = world.batch(77, 0, 16, clean=True), world.step_gen(78, 0)
    x, context = vae.encode(b.video), teacher.text(tokens(b.captions()))
    e = torch.randn(x.shape, generator=gen)
    rows, titles = [b.video[:a.n]], [b.captions()[:a.n]]
    for t in TIMES:
        phi = angle_of(torch.full((len(x),), t))
        z = mixed(x, e, phi)
        v = teacher.net(z, phi, context)
        error = (v - target(x, e, phi)).pow(2).mean()
        guess = per_clip(phi.cos()) * z - per_clip(phi.sin()) * v
        rows.append(vae.decode(guess[:a.n]))
        note = f"t {t}: error of v {error:.3f}, of x {(guess - x).pow(2).mean():.3f}"
        titles.append([note] * a.n)
    clips = torch.stack(rows, 1).flatten(0, 1)
    sheet(clips, [title for group in zip(*titles) for title in group], a.out, 1, 2)


if __name__ == "__main__":
    main()
