"""Time and memory of a step with and without the score term, in turns in one process, for nbs/experiments/09_score.ipynb.

    python bench/score_cost.py nbs/experiments/score_cost.json                # both small teachers; ratios are what counts
"""
import argparse
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from rival import one, peak
from three_seeds import BOTH, MORE, VARIANTS, config_of

from t2v_turbo.files import write_json
from t2v_turbo.train import Trainer

RUNS = ("cd", BOTH, "cd + score", "turbo + score")


def costs(teacher, steps):
    "CPU seconds of single steps, and the peak of bytes beside the weights, by run"
    with tempfile.TemporaryDirectory() as out:
        a = SimpleNamespace(out=out, teacher=teacher, set="", lr_cd=None)
        make = {n: lambda n=n: Trainer(config_of(a, n, 0, f"{out}/{list(VARIANTS | MORE).index(n)}")) for n in RUNS}
        memory = {n: peak(m) for n, m in make.items()}
        made, spent = {n: m() for n, m in make.items()}, {n: [] for n in RUNS}
        for i in range(steps + 1):                                         # the first warms up
            for n, trainer in made.items():
                start = time.process_time(); one(trainer)
                if i: spent[n].append(round(time.process_time() - start, 4))
    return dict(cpu_seconds=spent, peak_bytes=memory)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, help="a .json file"); p.add_argument("--steps", type=int, default=12, help="that are timed")
    p.add_argument("--teachers", nargs="*", default=["tiny", "tiny-flow"])
    a = p.parse_args(argv)
    found = {t: costs(t, a.steps) for t in a.teachers}
    write_json(a.out, dict(threads=torch.get_num_threads(), steps=a.steps, teachers=found))
    for t, c in found.items():
        for n in RUNS: print(f"{t:10} {n:14} {sum(c['cpu_seconds'][n]) / a.steps:.3f} CPU s a step, {c['peak_bytes'][n] / 2**20:.0f} MiB beside the weights")


transformers.utils.logging.disable_progress_bar()
if __name__ == "__main__": main()
