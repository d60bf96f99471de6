"""A judge without a gradient in the place of the video reward: the rows of nbs/experiments/08_any_judge.ipynb.

    python bench/any_judge.py runs/judge --seeds 3        # options as of three_seeds.py; runs/judge/rows.json has the rows

The judge is the tiny world's video reward behind a function that returns plain numbers, so that what its gradient would do is known
(`cd + R_vid` of three_seeds.py), and what a surrogate of its answers does can be compared with it.
"""
import sys
from functools import cache

import three_seeds
import torch

from t2v_turbo.rewards.tiny import load_reward

JUDGED = {f"cd + judge {b:g}": dict(beta_img=0., beta_vid=b, reward="judge=any_judge:video", video_frames=8) for b in (.02, .2, 1.)}
JUDGED |= {f"{n}, first blocks": how | dict(judge_reads="teacher") for n, how in JUDGED.items()}       # of the teacher, in the place of latents
JUDGED |= {f"{n} + score": how | three_seeds.SCORE for n, how in JUDGED.items() if "first" in n}       # held by the score term
REWARD = cache(load_reward)


def video(clips, prompts):
    "One number a clip"
    with torch.no_grad(): return REWARD("tiny-video")(clips, prompts).tolist()


def main(argv):
    three_seeds.VARIANTS |= JUDGED
    three_seeds.main(argv if "--only" in argv or "--gather" in argv else [*argv, "--only", *JUDGED])


if __name__ == "__main__": main(sys.argv[1:])
