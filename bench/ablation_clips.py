"""Two held-out captions by every student of an ablation's first seed, for the pictures of nbs/98_ablation.ipynb.

    python bench/ablation_clips.py runs/ablation nbs/ablation_clips.safetensors

One tensor a student, named by its settings: clips `(captions 3 t h w)` as bytes.
"""
import argparse
import json
from pathlib import Path

import transformers
from safetensors.torch import load_file, save_file

from t2v_turbo.ablate import cell_name, read_table
from t2v_turbo.core import make_gen
from t2v_turbo.files import atomic
from t2v_turbo.pipeline import sample_student
from t2v_turbo.saved import load_student

CAPTIONS = ["a yellow fish moving right in the sea", "a pink rocket growing at night"]       # held out


transformers.utils.logging.disable_progress_bar()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("ablation", type=Path, help="folder of `t2v-turbo ablate`")
    p.add_argument("out", type=Path, help="a .safetensors file")
    p.add_argument("--seed", type=int, default=0, help="training seed")
    p.add_argument("--keep", action="store_true", help="keep clips that are in the file")
    a = p.parse_args()
    names, rows = json.loads((a.ablation / "ablation.json").read_text())["over"], read_table(a.ablation / "rows.csv")
    cells = sorted({tuple(r[n] for n in names) for r in rows if r["seed"] == a.seed})
    clips = load_file(a.out) if a.keep and a.out.is_file() else {}
    for values in cells:
        cell = dict(zip(names, values))
        if (name := " ".join(f"{k}={v:g}" for k, v in cell.items())) in clips: continue
        student = load_student(a.ablation / "cells" / cell_name(cell | dict(seed=a.seed)) / "student")
        x = sample_student(student, CAPTIONS, make_gen(0), 4)                 # with its own guidance
        clips[name] = (x.clamp(0, 1) * 255).round().byte().contiguous().cpu()
    with atomic(a.out) as tmp: save_file(clips, tmp, metadata=dict(captions=json.dumps(CAPTIONS)))
    print(f"{a.out}: {len(clips)} students, {len(CAPTIONS)} captions")


if __name__ == "__main__": main()
