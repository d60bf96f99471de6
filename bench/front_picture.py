"""The moving picture of the front page: teacher 50 steps, plain CD 4 steps, T2V-Turbo 4 steps, same captions and seeds.

    python bench/front_picture.py runs/seeds/rows/turbo-both-0/student     # writes nbs/images/teacher-cd-turbo.gif, and card.png beside it
    python bench/front_picture.py STUDENT --w 1.5 --cd runs/seeds/rows/cd-0/student --seed 3
"""
import argparse
from pathlib import Path
from textwrap import wrap

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from t2v_turbo.core import make_gen
from t2v_turbo.pipeline import sample_student, sample_teacher
from t2v_turbo.saved import load_student
from t2v_turbo.teachers.folders import defaults_of, load_teacher
from t2v_turbo.teachers.tiny import WEIGHTS

CAPTIONS = ("a yellow fish moving right in the sea", "a pink rocket growing at night", "a blue house shrinking in the meadow",
            "a white cat bouncing by the wall", "a purple car moving left in the desert")                       # held out, all
SIDE, LEFT, TOP, GAP = 128, 74, 34, 4                              # two pixels for each of a clip


def page_of(rows, t):
    "One frame of all clips, with captions above and names of the samplers beside them"
    page = Image.new("RGB", (LEFT + len(CAPTIONS) * (SIDE + GAP), TOP + len(rows) * (SIDE + GAP)), "white")
    pen = ImageDraw.Draw(page)
    for i, p in enumerate(CAPTIONS): pen.text((LEFT + i * (SIDE + GAP), 2), "\n".join(wrap(p.partition(" ")[2], 22)), fill="black", font_size=12)
    for r, (name, clips) in enumerate(rows.items()):
        pen.text((2, TOP + r * (SIDE + GAP) + SIDE // 2 - 14), name.replace(", ", "\n"), fill="black", font_size=12)
        for i, c in enumerate(clips):
            x = Image.fromarray((c[:, t].permute(1, 2, 0) * 255).round().byte().numpy()).resize((SIDE, SIDE), Image.NEAREST)
            page.paste(x, (LEFT + i * (SIDE + GAP), TOP + r * (SIDE + GAP)))
    return page.quantize(128, dither=Image.Dither.NONE)


def card_of(page):
    "The picture that links to the site show: 1200 x 630, name, purpose and one frame"
    card, fonts = Image.new("RGB", (1200, 630), "#12263f"), Path(matplotlib.get_data_path()) / "fonts/ttf"
    pen, font = ImageDraw.Draw(card), lambda name, size: ImageFont.truetype(str(fonts / f"{name}.ttf"), size)
    pen.text((40, 96), "t2v_turbo", fill="white", font=font("DejaVuSans-Bold", 64))
    words = "\n".join(wrap("Distil a text-to-video diffusion model into a 4-step student, with rewards in the same loss. Every equation beside its code.", 24))
    pen.text((40, 200), words, fill="white", font=font("DejaVuSans", 27), spacing=10)
    card.paste(page.convert("RGB"), (1200 - page.width - 32, (630 - page.height) // 2))
    return card.quantize(256)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("student", help="folder of the student with both rewards")
    p.add_argument("--cd", type=Path, default=WEIGHTS / "tiny-cd", help="folder of the plain-CD student")
    p.add_argument("--w", type=float, default=defaults_of("tiny").guidance, help="guidance scale of all")
    p.add_argument("--seed", type=int, default=0, help="of the start noise")
    p.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "nbs/images/teacher-cd-turbo.gif")
    a = p.parse_args(argv)
    prompts, gen = list(CAPTIONS), lambda: make_gen(a.seed)
    rows = {"teacher, 50 steps": sample_teacher(load_teacher("tiny"), prompts, gen(), 50, a.w),
            "plain CD, 4 steps": sample_student(load_student(a.cd), prompts, gen(), 4, a.w),
            "T2V-Turbo, 4 steps": sample_student(load_student(a.student), prompts, gen(), 4, a.w)}
    frames = [page_of(rows, t) for t in range(next(iter(rows.values())).shape[2])]
    a.out.parent.mkdir(exist_ok=True)
    frames[0].save(a.out, save_all=True, append_images=frames[1:], duration=140, loop=0)
    card_of(frames[-2]).save(a.out.with_name("card.png"), optimize=True)
    print(a.out, a.out.stat().st_size // 1000, "kB")


if __name__ == "__main__": main()
