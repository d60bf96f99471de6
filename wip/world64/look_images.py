"""Sample single frames: `python look_images.py --vae V --teacher T --out s.png`"""
import torch

import world
from diffusion import sample
from look import load_teacher, parser, shown
from nets import tokens
from sheets import sheet
from train_teacher import load_vae


@torch.no_grad()
def main() -> None:
    "Write the sheet: 24 captions, 8 noises each"
    p = parser(__doc__)
    p.add_argument("--w", type=float, default=2.5)
    p.add_argument("--steps", type=int, default=30)
    a = p.parse_args()
    teacher, vae = load_teacher(a.teacher), load_vae(a.vae)
    captions = [world.caption(*row) for row in shown().tolist()]
    context = teacher.text(tokens(captions)).repeat_interleave(8, 0)
    noise = torch.randn(len(context), 16, 1, 8, 8, generator=world.step_gen(0, 0))
    net = lambda z, phi, c: teacher.net(z, phi, c, torch.full((len(z),), 3))
    with torch.autocast("cpu", torch.bfloat16):
        z = sample(net, context, teacher.text(tokens([""])), noise, a.steps, a.w)
        frames = vae.decode(z).float()                                     # (24 8) 3 1 64 64
    sheet(frames[:, :, 0].unflatten(0, (24, 8)).transpose(1, 2), captions, a.out, 1, 2)


if __name__ == "__main__":
    main()
