"""log sigmoid against raw reward, three seeds each: what rewards and judges say over training.

    python bench/reward_shape.py runs/shape      # goes on where it was; writes OUT/reward_shape.json
"""
import json
import sys
from pathlib import Path

from t2v_turbo.cli import DistillOptions, watch
from t2v_turbo.core import write_json
from t2v_turbo.train import Config, Objective, Trainer, claim

out, rows = Path(sys.argv[1]), []
for seed in range(3):
    for shape in ("log_sigmoid", "raw"):
        trainer = Trainer(Config(out=str(out / f"{shape}-{seed}"), seed=seed, objective=Objective(shape=shape)))
        with claim(trainer.cfg.out):
            trainer.resume(); watch(trainer, DistillOptions(eval_every=25))
        for line in (Path(trainer.cfg.out) / "looks.jsonl").read_text().splitlines():
            look = json.loads(line)
            mean = sum(look[k] for k in ("shape", "colour", "motion", "clean")) / 4
            rows.append(look | dict(mean=mean, objective=shape, seed=seed))
        write_json(out / "reward_shape.json", rows)
