"""The moving picture of the front page: teacher 50 steps, plain CD 4 steps, T2V-Turbo 4 steps, same captions and seeds.

    python bench/front_picture.py runs/seeds/turbo-both-0/student     # writes nbs/images/teacher-cd-turbo.gif
"""
import sys
from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw

from t2v_turbo.core import make_gen
from t2v_turbo.pipeline import sample_student, sample_teacher
from t2v_turbo.saved import load_student
from t2v_turbo.teachers.tiny import WEIGHTS, load_teacher
from t2v_turbo.world import caption, combos

W = float(sys.argv[2]) if len(sys.argv) > 2 else 2.
prompts = [caption(*a) for a in combos("heldout")[[1, 4, 9, 12, 17, 22]].tolist()]
turbo, cd = load_student(sys.argv[1]), load_student(WEIGHTS / "tiny-cd")
rows = {"teacher, 50 steps": sample_teacher(load_teacher(), prompts, make_gen(0), 50, W),
        "plain CD, 4 steps": sample_student(cd, prompts, make_gen(0), 4, W),
        "T2V-Turbo, 4 steps": sample_student(turbo, prompts, make_gen(0), 4, W)}
S, left, top, gap = 96, 120, 30, 6
frames = []
for t in range(8):
    page = Image.new("RGB", (left + 6 * (S + gap), top + 3 * (S + gap)), "white"); pen = ImageDraw.Draw(page)
    for i, p in enumerate(prompts): pen.text((left + i * (S + gap), 2), "\n".join(wrap(p.removeprefix("a "), 15)), fill="black", font_size=10)
    for r, (name, clips) in enumerate(rows.items()):
        pen.text((4, top + r * (S + gap) + S // 2 - 6), name, fill="black", font_size=11)
        for i, c in enumerate(clips):
            x = Image.fromarray((c[:, t].permute(1, 2, 0) * 255).round().byte().numpy()).resize((S, S), Image.NEAREST)
            page.paste(x, (left + i * (S + gap), top + r * (S + gap)))
    frames.append(page.quantize(256, dither=Image.Dither.NONE))
path = Path(__file__).parents[1] / "nbs/images/teacher-cd-turbo.gif"; path.parent.mkdir(exist_ok=True)
frames[0].save(path, save_all=True, append_images=frames[1:], duration=140, loop=0)
print(path, path.stat().st_size // 1000, "kB")
