"""Looks and clips of runs for nbs/experiments/04_hacking.ipynb.

    python bench/hacking.py usual=runs/usual pushed=runs/pushed          # folders of `t2v-turbo ablate`, of one cell each

Writes hacking.json, the looks of each run, and hacking_clips.safetensors, three held-out captions by each student at its end.
"""
import argparse
import json
from pathlib import Path

import transformers
from safetensors.torch import save_file

from t2v_turbo.core import make_gen
from t2v_turbo.files import atomic, write_json
from t2v_turbo.pipeline import sample_student
from t2v_turbo.saved import load_student
from t2v_turbo.watch import read_rows

CAPTIONS = ["a yellow fish moving right in the sea", "a pink rocket growing at night", "a white cat bouncing by the wall"]       # held out
HERE = Path(__file__).parents[1] / "nbs" / "experiments"


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", metavar="NAME=FOLDER"); p.add_argument("--out", type=Path, default=HERE, help="folder of the two files")
    a = p.parse_args(argv)
    looks, clips = {}, {}
    for name, folder in (r.split("=", 1) for r in a.runs):
        cell, = Path(folder).glob("cells/*/looks.jsonl")
        looks[name] = read_rows(cell)
        clips[name] = sample_student(load_student(cell.parent / "student"), CAPTIONS, make_gen(0), 4).mul(255).round().byte().contiguous()
    write_json(a.out / "hacking.json", looks)
    with atomic(a.out / "hacking_clips.safetensors") as tmp: save_file(clips, tmp, metadata=dict(captions=json.dumps(CAPTIONS)))
    print(", ".join(f"{n}: {len(l)} looks" for n, l in looks.items()))


transformers.utils.logging.disable_progress_bar()
if __name__ == "__main__": main()
