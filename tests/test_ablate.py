"A grid of students: every cell once, stopped and resumed, the same numbers in any company"
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

import pytest

from t2v_turbo.ablate import (
    AblateOptions,
    _devices,
    _parse,
    _run,
    ablate,
    ablation_table,
    by_setting,
    cell_config,
    cell_name,
    cells,
    collect,
    frontier,
    read_table,
    run_cell,
)
from t2v_turbo.checkpoints import Stopped
from t2v_turbo.cli import main, read
from t2v_turbo.config import objective_of
from t2v_turbo.data.build import build_cache
from t2v_turbo.distill import Objective
from t2v_turbo.files import UserError
from t2v_turbo.running import read_config
from t2v_turbo.standins import tiny_modelscope
from t2v_turbo.teachers.folders import DEFAULTS, load_teacher
from t2v_turbo.train import Config
from t2v_turbo.watch import WatchOptions

NBS = Path(__file__).parents[1] / "nbs"
LOOKS = WatchOptions(eval_every=0)


def two(out, **more):
    return Config(out=str(out), steps=2, batch=2, rank=2, track="", **more), AblateOptions(over="beta_img=0 beta_vid=0", seeds="0,1",
                                                                                           jobs=1)


def test_cells_are_all_combinations():
    got = cells(AblateOptions(over="rank=4,8 shape=raw,log_sigmoid ema=0,.9", seeds="3,5"))
    assert len(got) == 16 and len({cell_name(c) for c in got}) == 16
    assert [c["seed"] for c in got] == [3]*8 + [5]*8
    cfg = cell_config(Config(out="o"), got[5])
    assert (cfg.rank, cfg.objective.shape, cfg.ema, cfg.seed) == (8, "raw", .9, 3)
    assert Path(cfg.out).parent == Path("o/cells") and cfg.keep == 1


@pytest.mark.parametrize("over, says", [("beta=1", "no setting 'beta'"), ("seed=1,2", "no setting 'seed'"), ("out=a", "no setting 'out'"),
                                        ("k=a", "of type int"), ("k=5,5", "'k=5,5' has a value twice"), ("k=5 k=2", "names 'k' twice"),
                                        ("k", "give k=value,value,..")])
def test_bad_over(over, says):
    with pytest.raises(UserError, match=says): cells(AblateOptions(over=over))


def test_one_at_a_time():
    o = AblateOptions(over="beta_vid=0,1", alone="ema=0,.5 image_frames=1,2", seeds="0,1")
    got = [(c["beta_vid"], c["ema"], c["image_frames"]) for c in cells(o, Config(ema=.9))]
    assert got == 2 * [(b, *x) for b in (0, 1) for x in ((.9, 2), (0, 2), (.5, 2), (.9, 1))]
    with pytest.raises(UserError, match="k: give a setting in over or in alone"): cells(AblateOptions(over="k=5", alone="k=2"))


def test_every_teacher_brings_its_own_settings(tmp_path):
    "What the user gave holds in every cell; the rest is that of the cell's teacher, also after the way to another process"
    ms = str(tiny_modelscope(tmp_path / "ms"))
    o = AblateOptions(over=f"teacher=tiny,{ms}", seeds="0")
    told = read_config(read(["ablate", "--rank", "8", "--w_max", "40", "--out", str(tmp_path / "o")])[1])
    for cfg in (told, Config(rank=8, objective=objective_of("tiny", w_max=40.)), pickle.loads(pickle.dumps(told))):
        a, b = (cell_config(cfg, c) for c in cells(o, cfg))
        assert (a.rank, a.objective.w_max, b.rank, b.objective.w_max) == (8, 40., 8, 40.)
        own = DEFAULTS["tiny"]
        assert (a.lr, a.lr_schedule, a.objective.w_min, a.objective.image_frames) == (own.lr, own.lr_schedule, own.w_min, own.image_frames) and own.lr > 1e-5
        assert (b.lr, b.lr_schedule, b.objective.w_min, b.objective.image_frames) == (1e-5, "constant", 5., 6)
    whole = Config(objective=Objective(), lr=1e-3)                                          # all of the objective is given
    b = cell_config(whole, cells(o, whole)[1])
    assert b.objective == Objective() and b.lr == 1e-3 and b.rank == 32
    got = [(c["teacher"], c["rank"]) for c in cells(replace(o, alone="rank=4,16"), Config())]
    assert got == [("tiny", 16), ("tiny", 4), (ms, 32), (ms, 4), (ms, 16)]                  # the cell of the given settings, and one for each value
    got = [(c["teacher"], c["rank"]) for c in cells(AblateOptions(over="", alone=f"teacher=tiny,{ms} rank=4", seeds="0"), Config())]
    assert got == [("tiny", 16), (ms, 32), ("tiny", 4)]


def test_bad_grids_train_nothing(tmp_path, monkeypatch, capsys):
    call = lambda *a: main(["ablate", "--out", str(tmp_path / "o"), "--steps", "2", *a])
    for args, says in ((("--over", "k=7"), "k 7 does not divide 1000"), (("--over", "beta_img=-1"), "beta_img is -1.0: give 0 or more"),
                       (("--sample_steps", "4,32"), "student_steps is 32"), (("--seeds", "a"), "seeds 'a': give whole numbers"),
                       (("--seeds", "1,01"), "seeds has a value twice"), (("--sample_steps", "4,4"), "sample_steps has a value twice"),
                       (("--over", "compile=0,0"), "has a value twice"), (("--over", "beta_img=1,1.0"), "has a value twice"),
                       (("--over", "lr=nan"), "lr is nan"), (("--over", "beta_img=nan"), "beta_img is nan"), (("--student_w", "nan"), "student_w is nan"),
                       (("--jobs", "-1"), "jobs is -1"), (("--clips_each", "0"), "clips_each is 0")):
        assert call(*args) == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call() == 2 and "without accelerate launch" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    (tmp_path / "f").touch()
    assert main(["ablate", "--out", str(tmp_path / "f")]) == 2 and "cannot write to" in capsys.readouterr().err


def test_resumed_cell_by_cell(tmp_path):
    "A done cell is left alone, a lost one comes out the same, and two at a time change nothing"
    cfg, o = two(tmp_path / "a")
    rows = ablate(cfg, o, LOOKS)
    assert [r["seed"] for r in rows] == [0, 1]
    assert rows[0]["r_img"] != rows[1]["r_img"], "two seeds must differ"
    cell = lambda s: tmp_path / "a" / "cells" / cell_name(dict(beta_img=0., beta_vid=0., seed=s))
    assert (cell(0) / "student" / "adapter_model.safetensors").is_file() and not (cell(0) / "checkpoints").exists()
    stamp = (cell(0) / "rows.json").stat().st_mtime_ns
    shutil.rmtree(cell(1))
    assert len(collect(tmp_path / "a")) == 1
    assert ablate(cfg, replace(o, jobs=2), LOOKS) == rows
    assert (cell(0) / "rows.json").stat().st_mtime_ns == stamp
    assert read_table(tmp_path / "a" / "rows.csv") == rows
    with pytest.raises(UserError, match=r"other settings \(steps\): choose another --out"): ablate(replace(cfg, steps=3), o, LOOKS)
    with pytest.raises(UserError, match=r"other settings \(clips_each\)"): ablate(cfg, o, replace(LOOKS, clips_each=2))


def test_a_cell_that_fails_is_named(tmp_path):
    cfg, o = two(tmp_path / "a", max_skipped=1, lr=1e30, clip=1e30)
    with pytest.raises(UserError, match="cell beta_img=0.0 beta_vid=0.0 seed=0: no finite loss"):
        ablate(replace(cfg, steps=20), replace(o, seeds="0"), LOOKS)


def test_a_held_out_reward_is_asked_at_the_end(tmp_path):
    "Without looks while it trains, which `watch` alone would refuse"
    cfg, o = two(tmp_path / "a")
    cell = cells(o, cfg)[0]
    assert run_cell(cell_config(cfg, cell), cell, replace(LOOKS, held_out="tiny-video"), [1])
    row, = json.loads((Path(cell_config(cfg, cell).out) / "rows.json").read_text())
    assert row["held_out"] == pytest.approx(row["r_vid"], abs=.3)       # the same network; the judges would say -8
    assert row["train_steps"] == 2


def test_a_hacked_cell_is_judged_at_its_best_look(tmp_path, monkeypatch):
    "The row, and `student/`, are of the step that `watch` returns; without a stop, of the last"
    cfg, o = two(tmp_path / "a")
    def stopped(trainer, looks):
        for _ in trainer.fit():
            if trainer.step == 1: trainer.save(); trainer.store.pin(1)
        return 1
    one, rest = cells(o, cfg)
    monkeypatch.setattr("t2v_turbo.ablate.watch", stopped)
    run_cell(cell_config(cfg, one), one, LOOKS, [4])
    monkeypatch.undo()
    run_cell(cell_config(cfg, rest), rest, LOOKS, [4])
    for cell, step in ((one, 1), (rest, 2)):
        out = Path(cell_config(cfg, cell).out)
        assert json.loads((out / "rows.json").read_text())[0]["train_steps"] == step
        assert json.loads((out / "student" / "student.json").read_text())["about"]["step"] == step


def test_stopped_and_gone_on_with(tmp_path):
    "Ctrl-C in the middle of a cell: what is done stays, the cell goes on where it was"
    call = [sys.executable, "-m", "t2v_turbo.cli", "ablate", "--out", str(tmp_path), "--over", "beta_img=0 beta_vid=0", "--seeds", "0",
            "--jobs", "1", "--steps", "60", "--batch", "2", "--rank", "2", "--save_every", "5"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(call, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    log = tmp_path / "cells" / "beta_img=0.0 beta_vid=0.0 seed=0" / "log.jsonl"
    end = time.time() + 400
    while not (log.is_file() and log.read_text().count("\n") > 10) and time.time() < end and run.poll() is None: time.sleep(.2)
    os.killpg(run.pid, signal.SIGINT)                                # as a terminal does
    _, err = run.communicate(timeout=300)
    assert run.returncode == 130 and "the same command goes on" in err and "Traceback" not in err, err[-1500:]
    done = json.loads(log.read_text().splitlines()[-1])["step"]
    assert 10 <= done < 60 and not (log.parent / "run.lock").exists()
    assert list((log.parent / "checkpoints").glob(f"step-{done:08d}.pt"))
    run = subprocess.run(call, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "rows.csv" in run.stdout, run.stderr[-1500:]
    assert [json.loads(l)["step"] for l in log.read_text().splitlines()] == list(range(1, 61))


def test_a_stop_crosses_processes():
    "Whoever of parent and child hears the signal first, the sentence is whole"
    stop = pickle.loads(pickle.dumps(Stopped(signal.SIGINT, 12)))
    assert stop.signum == signal.SIGINT and str(stop) == str(Stopped(signal.SIGINT, 12))


def test_what_stops_a_cell_crosses_processes(tmp_path):
    "The error of the command that runs a cell is raised again here; anything else shows what it wrote"
    cfg, o = two(tmp_path / "a")
    cell, devices = cells(o, cfg)[0], SimpleQueue()
    devices.put(None)
    out = Path(cell_config(cfg, cell).out); out.parent.mkdir(parents=True)
    out.touch()                                                        # a file where its folder should be
    with pytest.raises((OSError, UserError), match="exist"): _run(cfg, cell, LOOKS, [1], devices)
    out.unlink()
    with pytest.raises(UserError, match="held_out 'tiny-video' is in the loss"):
        _run(replace(cfg, reward="tiny-video"), cell | dict(beta_vid=1.), replace(LOOKS, held_out="tiny-video"), [1], devices)
    with pytest.raises(RuntimeError, match="(?s)cell beta_img=0.0 beta_vid=0.0 seed=0 ended with status 1.*TypeError"):
        _run(cfg, cell, LOOKS, 4, devices)
    assert devices.get_nowait() is None                                # given back each time


@pytest.mark.parametrize("kind, text, value", [(int, "3", 3), (float, "inf", float("inf")), (float | None, "1", 1.), (bool, "0", False), (bool, "False", False),
                                               (bool, "true", True), (str, "a", "a"), (Literal["a", "b"], "a", "a")])
def test_values_of_every_type(kind, text, value):
    assert _parse(kind, text) == value and type(_parse(kind, text)) is type(value)
    if kind is bool:
        with pytest.raises(ValueError): _parse(kind, "maybe")


def test_means_and_front():
    rows = [dict(b=b, seed=s, train_steps=1, sample_steps=4, r=b + s) for b in (0., 1.) for s in (0, 1, 2)]
    assert by_setting(rows, ("b",), "r") == {(0.,): (1., 1., 3), (1.,): (2., 1., 3)}
    assert ablation_table([dict(b=r["b"], seed=r["seed"], sample_steps=4, train_steps=1, r=r["r"]) for r in rows]).splitlines()[-1] == \
        "| 1 | 4 | 2.000 ± 1.000 |"
    assert frontier(dict(a=(1, 1), b=(2, 2))) == ["b"]
    assert frontier(dict(a=(1, 1), b=(1, 1))) == ["a", "b"]            # equals do not beat each other


@pytest.mark.skipif(not (NBS / "ablation.csv").is_file(), reason="no committed ablation")
def test_a_committed_cell_again(tmp_path):
    "The cheapest cell of the committed grid, by its command; a processor's own rounding may move a verdict or two of 48 clips"
    rows = read_table(NBS / "ablation.csv")
    grid = [(r["beta_img"], r["beta_vid"], r["seed"]) for r in rows]
    assert len(set(grid)) == len(grid) and (0, 0, 0) in grid and {r["train_steps"] for r in rows} == {100}
    assert main(["ablate", "--out", str(tmp_path), "--over", "beta_img=0 beta_vid=0", "--seeds", "0", "--jobs", "1", "--steps", "100",
                 "--prompts", str(NBS / "ablation_captions.txt"), "--clips_each", "1"]) == 0
    new, = read_table(tmp_path / "rows.csv")
    old, = (r for r in rows if (r["beta_img"], r["beta_vid"], r["seed"]) == (0, 0, 0))
    assert new.keys() >= old.keys() and {"r_img", "r_vid", "held_out", "noun", "steady", "motion_amount", "distance"} <= new.keys()
    assert {k: v for k, v in old.items() if abs(v - new[k]) > .05 * max(1, abs(v))} == {}


def test_cells_without_a_score_are_blank(tmp_path):
    "With captions of one's own a cell without a reward has no score of it"
    each = dict(seed=0, sample_steps=4, train_steps=1)
    for i, row in enumerate((dict(beta_img=0.) | each | dict(m=1.), dict(beta_img=1.) | each | dict(r_img=2., m=3.))):
        (tmp_path / "cells" / str(i)).mkdir(parents=True)
        (tmp_path / "cells" / str(i) / "rows.json").write_text(json.dumps([row]))
    (tmp_path / "ablation.json").write_text(json.dumps(dict(over=dict(beta_img=[0., 1.]))))
    rows = collect(tmp_path)
    assert rows == read_table(tmp_path / "rows.csv") and list(rows[0]) == ["beta_img", *each, "r_img", "m"]
    assert [r["r_img"] for r in rows] == ["", 2.]
    assert by_setting(rows, ("beta_img",), "r_img").keys() == {(1.,)} and by_setting(rows, ("beta_img",), "m").keys() == {(0.,), (1.,)}
    assert ablation_table(rows).splitlines()[2:] == ["| 0 | 4 |  | 1.000 ± nan |", "| 1 | 4 | 2.000 ± nan | 3.000 ± nan |"]


def test_captions_that_the_text_cache_lacks_are_named_before_a_cell_trains(tmp_path):
    "They are looked at when it has been trained, in the tiny world, too"
    build_cache("text", load_teacher("tiny"), ["a red fish moving left in the sea"], tmp_path / "texts", progress=False)
    cfg, o = two(tmp_path / "a")
    cell = cells(o, cfg)[0]
    cfg = cell_config(replace(cfg, texts=str(tmp_path / "texts")), cell)
    with pytest.raises(UserError, match="captions to look at, such as '.*', are not in the text cache '.*texts'.*that has them, too$"):
        run_cell(cfg, cell, LOOKS, [1])
    assert not (Path(cfg.out) / "log.jsonl").exists()


def test_workers_get_the_devices_that_are_left(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for seen, want in (("2,3", ["2", "3", "2"]), ("GPU-a,GPU-b", ["GPU-a", "GPU-b", "GPU-a"]), (None, [0, 1, 0])):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False) if seen is None else monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        assert _devices(3) == want
