"""Judge the students of a finished or growing `t2v-turbo ablate` again, without training: other captions, clips or numbers of steps.

    python bench/judge_again.py runs/ablation --out nbs/ablation.csv
    python bench/judge_again.py runs/questions/* --out questions.csv                  # several, in one table
    python bench/judge_again.py runs/ablation --only "beta_img=0.0 beta_vid=0.0" --sample_steps 1,2,4,8,16 --out steps.csv

The clips are those that `ablate` itself judges, from the same noise. Rows are kept in OUT.rows/, so a second call judges only students
that have come since; `--keep` names another folder.
"""
import argparse
import csv
import json
from dataclasses import replace
from pathlib import Path

import transformers

from t2v_turbo.ablate import cell_config, judge_cell, read_table
from t2v_turbo.config import changed
from t2v_turbo.files import atomic, write_json
from t2v_turbo.saved import load_tensors, read_tensors
from t2v_turbo.train import Config, Trainer
from t2v_turbo.watch import WatchOptions


def judged(folder, settings, looks, steps, scratch):
    "The rows of one student, by the code of `ablate`"
    cell = {k: v for k, v in json.loads((folder / "rows.json").read_text())[0].items() if k in settings["over"] or k == "seed"}
    cfg = replace(cell_config(changed(Config(out=str(scratch)), **settings["settings"]), cell), out=str(scratch))
    trainer = Trainer(cfg)
    load_tensors(trainer.student, read_tensors(folder / "student" / "adapter_model.safetensors"))
    trainer.step = json.loads((folder / "student" / "student.json").read_text())["about"]["step"]
    return [cell | row for row in judge_cell(trainer, looks, steps)]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("ablations", type=Path, nargs="+", help="folders of `t2v-turbo ablate`"); p.add_argument("--out", type=Path, required=True, help="a .csv file")
    p.add_argument("--prompts", help="captions, one a line; default: those of the ablation"); p.add_argument("--clips_each", type=int, default=1)
    p.add_argument("--sample_steps", help="default: those of the ablation"); p.add_argument("--only", nargs="*", default=[""], help="parts of the names of cells")
    p.add_argument("--keep", type=Path, help="folder of the rows; default: OUT.rows")
    a = p.parse_args(argv)
    rows, over = [], {}
    for ablation in a.ablations:
        if not (ablation / "ablation.json").is_file(): continue
        settings, keep = json.loads((ablation / "ablation.json").read_text()), (a.keep or Path(f"{a.out}.rows")) / ablation.name
        prompts = a.prompts or settings["looks"]["prompts"]
        looks = WatchOptions(**settings["looks"] | dict(prompts=prompts if Path(prompts).is_file() else str(ablation.parent / prompts), clips_each=a.clips_each))
        steps, over = [int(n) for n in (a.sample_steps or settings["sample_steps"]).split(",")], over | dict.fromkeys(settings["over"])
        keep.mkdir(parents=True, exist_ok=True)
        for folder in sorted(f.parent for f in ablation.glob("cells/*/rows.json") if any(part in f.parent.name for part in a.only)):
            if not (to := keep / f"{folder.name}.json").is_file():
                write_json(to, judged(folder, settings, looks, steps, keep))
                print(f"{ablation.name}, {folder.name}", flush=True)
            rows += [settings["settings"] | r for r in json.loads(to.read_text())]
    if not rows: return print("no students yet")
    measured = [k for k in rows[0] if k not in settings["settings"] and k not in over and k not in ("seed", "sample_steps", "train_steps")]
    rows.sort(key=lambda r: [*(r[k] for k in over), r["seed"], r["sample_steps"]])
    with atomic(a.out) as tmp, open(tmp, "w", newline="") as f:
        w = csv.DictWriter(f, [*over, "seed", "sample_steps", "train_steps", *measured], extrasaction="ignore"); w.writeheader(); w.writerows(rows)
    print(f"{a.out}: {len(read_table(a.out))} rows")


transformers.utils.logging.disable_progress_bar()
if __name__ == "__main__": main()
