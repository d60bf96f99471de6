"""What judges read in samples: `python gate.py --vae V --teacher T --frame J --out O.json`"""
import json

import torch

import world
from judges import AXES, ClipJudge, FrameJudge, judged
from look import clips_of, load_teacher, parser
from train_teacher import load_vae


def main() -> None:
    "Print the means over held-out captions, of clean clips and of samples"
    p = parser(__doc__)
    p.add_argument("--frame", required=True)
    p.add_argument("--clip", default="")
    p.add_argument("--n", type=int, default=96)
    p.add_argument("--steps", type=int, nargs="+", default=[50, 4])
    p.add_argument("--w", type=float, default=2.5)
    a = p.parse_args()
    frame, clip = FrameJudge().eval(), ClipJudge().eval()
    frame.load_state_dict(torch.load(a.frame))
    if a.clip:
        clip.load_state_dict(torch.load(a.clip))
    vae, teacher = load_vae(a.vae), load_teacher(a.teacher)
    b = world.batch(4242, 0, a.n, "all", clean=True)
    rows = {"clean": judged(frame, clip, vae.decode(vae.encode(b.video)), b.attrs)}
    for steps in a.steps:
        parts = [clips_of(teacher, vae, b.captions()[i:i + 24], i, steps, a.w)
                 for i in range(0, a.n, 24)]
        rows[f"teacher {steps}"] = judged(frame, clip, torch.cat(parts), b.attrs)
    mean = lambda v: [round(x, 3) for x in v.mean(0).tolist()]
    result = {k: dict(zip(AXES, mean(v))) for k, v in rows.items()}
    a.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
