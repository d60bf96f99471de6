"The rule against reward hacking, on made-up looks, and on the runs of the experiment"
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import t as t_dist

from t2v_turbo import watch as watch_module
from t2v_turbo.core import make_gen
from t2v_turbo.data.build import build_cache
from t2v_turbo.data.cache import open_cache
from t2v_turbo.files import UserError
from t2v_turbo.saved import load_student
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.train import Config, Objective, Trainer
from t2v_turbo.watch import (
    Watcher,
    WatchOptions,
    best_look,
    fall,
    hacked,
    keep_best,
    look_every,
    read_rows,
    score_clips,
    watch,
)
from t2v_turbo.world import World

RUNS = Path(__file__).resolve().parents[1] / "nbs" / "experiments" / "hacking.json"


def looks(held, trained, noise=.1, n=12, seed=0):
    gen = make_gen(seed)
    each = [[(v + noise * torch.randn(n, generator=gen)).tolist() for v in pair] for pair in zip(held, trained)]
    return [dict(step=i, held_out=sum(h) / n, each=dict(held_out=h, trained=t)) for i, (h, t) in enumerate(each)]


def test_rule_speaks_when_the_fall_lasts():
    "And names the best look; with smaller blocks it can speak earlier, but never before two of them"
    up, down = [-3, -1, 0, .5, .4, .5, .5], [0, -.5, -1, -1, -1, -1]
    rows = looks(up + down, range(13))
    first = [next(n for n in range(1, 14) if hacked(rows[:n], p) is not None) for p in (2, 3, 4)]
    assert all(9 <= n <= 12 for n in first) and hacked(rows) in (3, 5, 6)
    assert all(hacked(rows[:n], p) is None for p in (1, 2, 4) for n in range(2 * p))


@pytest.mark.parametrize("held, trained", [(range(13), range(13)), ([0] * 7 + [-1] * 6, range(13, 0, -1)),
                                           ([0, .02] * 6, range(12)), ([0, 2, 1, 2.5, 1] * 3, range(15))])
def test_rule_keeps_quiet(held, trained): assert hacked(looks(held, trained)) is None


def honest(rng, n, clips, shared, rising):
    "Rows of a run whose held-out reward only changes by noise, part of it shared by the clips of a look"
    base, own = rng.normal(size=clips) * 2, rng.normal(size=(n, clips)) * (1 - shared)**.5
    held = base + own + rng.normal(size=(n, 1)) * shared**.5
    trained = rng.normal(size=(n, clips)) + rising * np.arange(n)[:, None] / 2
    return [dict(step=i, each=dict(held_out=h, trained=t)) for i, (h, t) in enumerate(zip(held.tolist(), trained.tolist()))]


def ever(rows): return any(hacked(rows[:n]) is not None for n in range(1, len(rows) + 1))


@pytest.mark.parametrize("n, clips, runs", [(10, 12, 300), (11, 24, 300), (40, 12, 100)])
def test_false_alarms_of_whole_runs(n, clips, runs):
    "At most 2 of 100, counted over all looks of a run, whatever the clips share and the trained rewards do"
    for shared in (0, .2, .5):
        for rising in (False, True):
            rng = np.random.default_rng(7)
            assert sum(ever(honest(rng, n, clips, shared, rising)) for _ in range(runs)) <= .02 * runs


def test_false_alarms_of_a_long_run():
    "200 looks, the trained rewards always higher: the rule's p-values alone must stay above its bound"
    rng, wrong = np.random.default_rng(3), 0
    for _ in range(100):
        held = rng.normal(size=200)
        wrong += any((fall(held[:n]) < n**-3.).any() for n in range(8, 201))
    assert wrong <= 2


def test_a_fall_is_found():
    "Five standard deviations of a look, within ten looks; almost always before twenty looks more"
    rng, mean = np.random.default_rng(0), np.interp(np.arange(40), (0, 4, 10, 20, 40), (-6, 0, 0, -5, -5))
    def run(): return [dict(step=i, each=dict(held_out=[h], trained=[i])) for i, h in enumerate(mean + rng.normal(size=40))]
    assert sum(ever(run()) for _ in range(50)) >= 48


def test_p_values_are_those_of_a_t_test_on_looks():
    "One block against one, by hand: 3 differences, of which the mean square is 2 s^2"
    (p,) = fall([2., 3., 0., 1.], 2)
    s2 = (1 + 9 + 1) / 3 / 2
    assert p == pytest.approx(t_dist.sf(2 / s2**.5, 2 * 9 / 8)) and fall([1.] * 9).shape == (2,)


def test_looks_that_are_not_numbers_are_passed_over():
    rows = looks([-3, -1, 0, .5, .4, .5, .5, 0, -.5, -1, -1, -1, -1], range(13))
    sick = dict(step=99, each=dict(held_out=[float("nan")], trained=[0.]))
    assert hacked(rows + [sick]) == hacked(rows) == best_look([sick] + rows) and best_look([sick]) is None


def test_rule_ignores_looks_without_scores():
    assert hacked([dict(step=0, r_img=1.)] * 9) is None and hacked([]) is None


@pytest.mark.skipif(not RUNS.is_file(), reason="the experiment's runs are not beside the notebooks")
def test_rule_on_the_experiment():
    "The usual run is never flagged, not even for a while; what the pushed one is stands in the notebook"
    runs = json.loads(RUNS.read_text())
    assert not ever(runs["usual"]) and {len(r) for r in runs.values()} == {21}
    best = hacked(runs["pushed"])
    assert best is None or best < runs["pushed"][-1]["step"]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("watch") / "o")
    return Trainer(Config(out=out, steps=4, batch=4, rank=2, track="", objective=Objective(beta_vid=0.)))


def test_a_reward_outside_the_loss_is_held_out(trainer):
    "The image reward trains; the tiny video reward, held out by name, is what `score_clips` gives"
    from t2v_turbo.rewards.tiny import load_reward
    w = Watcher(trainer, WatchOptions(held_out="tiny-video"))
    row, clips = w.look(), w.sample(trainer.student)
    want = score_clips(load_reward("tiny-video"), clips, w.prompts)
    torch.testing.assert_close(torch.tensor(row["each"]["held_out"]), want, rtol=1e-4, atol=1e-4)
    image = score_clips(load_reward("tiny-image"), clips, w.prompts, 1)
    torch.testing.assert_close(torch.tensor(row["each"]["trained"]), image, rtol=1e-4, atol=1e-4)
    assert {"r_img", "r_vid", "held_out", "motion_amount", "saturation", "high_frequency", "distance"} <= row.keys()


def test_a_reward_in_the_loss_cannot_be_held_out(trainer):
    named = Trainer(replace(trainer.cfg, reward="tiny-image"))
    with pytest.raises(UserError, match="held_out 'tiny-image' is in the loss"): Watcher(named, WatchOptions(held_out="tiny-image"))


def test_a_held_out_reward_reads_with_the_vocabulary_of_the_run(trainer, monkeypatch):
    "One that takes no vocabulary is not handed any"
    w, asked = object.__new__(Watcher), []
    cfg = replace(trainer.cfg, vocabulary="words.txt.gz")
    w.trainer = SimpleNamespace(cfg=cfg, accelerator=trainer.accelerator)
    monkeypatch.setattr(watch_module, "reward_named", lambda *x, **more: asked.append((*x, more)) or torch.nn.Identity())
    for name in ("hpsv2.1@hps.pt", "tiny-video"):
        w.o = WatchOptions(held_out=name); w._held_out()
    assert asked == [("hpsv2.1", "hps.pt", dict(vocabulary="words.txt.gz")), ("tiny-video", None, {})]


def test_prompts_of_ones_own(trainer, tmp_path):
    (tmp_path / "p.txt").write_text("a red fish moving left in the sea\n\na blue cat in the desert\n")          # the second is no caption of the world
    row = Watcher(trainer, WatchOptions(prompts=str(tmp_path / "p.txt"))).look()
    assert len(row["each"]["trained"]) == 2 and "held_out" not in row and "noun" not in row     # no judges for unknown captions
    (tmp_path / "w.txt").write_text("a red fish moving left in the sea\n")
    row = Watcher(trainer, WatchOptions(prompts=str(tmp_path / "w.txt"))).look()
    assert {"held_out", "noun", "steady", "distance"} <= row.keys()                            # those of the world they know
    (tmp_path / "e.txt").write_text("\n")
    with pytest.raises(UserError, match="is empty"): Watcher(trainer, WatchOptions(prompts=str(tmp_path / "e.txt")))


def test_a_held_out_reward_that_is_never_asked_is_refused(trainer, tmp_path):
    "`watch` trains not a step; with captions to look at, or without the reward, nothing is said"
    (tmp_path / "p.txt").write_text("a red fish moving left in the sea\n")
    data, own = replace(trainer.cfg, data=str(tmp_path)), str(tmp_path / "p.txt")
    for cfg, o, why in ((data, WatchOptions(held_out="tiny-video"), "give prompts"),
                        (trainer.cfg, WatchOptions(held_out="tiny-video", eval_every=0), "give eval_every"),
                        (data, WatchOptions(held_out="tiny-video", eval_every=0, prompts=own), "give eval_every")):
        with pytest.raises(UserError, match=f"held_out 'tiny-video' would never be asked: {why}"): look_every(cfg, o)
    with pytest.raises(UserError, match="would never be asked"): watch(trainer, WatchOptions(held_out="tiny-video", eval_every=0))
    assert trainer.step == 0
    assert look_every(data, WatchOptions(held_out="tiny-video", prompts=own)) == 50 and look_every(data, WatchOptions()) == 0


BAD = [-3, -1, 0, .5, .4, .5, .6, 0, -.5, -1, -1, -1, -1]


def test_stop_and_warn(trainer, capsys):
    out = Path(trainer.cfg.out); out.mkdir(exist_ok=True); trainer.step = 12
    rows = looks(BAD, range(13), .01)
    (out / "looks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    long = object.__new__(Trainer); long.__dict__ = trainer.__dict__ | dict(cfg=replace(trainer.cfg, steps=13))
    assert watch(long, WatchOptions(on_hacking="stop")) == 6 and long.step == 12
    assert "the rewards are being hacked" in capsys.readouterr().err
    assert watch(long, WatchOptions(on_hacking="warn", eval_every=4)) is None and long.step == 13
    assert capsys.readouterr().err.count("the rewards are being hacked") == 1
    assert [r["step"] for r in read_rows(out / "looks.jsonl")] == list(range(14))


def scripted(monkeypatch, held):
    "Looks of given held-out scores, by step, while the trained rewards rise"
    def look(self):
        self.clips = torch.zeros(1, 3, 2, 8, 8)
        s = self.trainer.step
        return dict(step=s, held_out=held[s], each=dict(held_out=[held[s]], trained=[float(s)]))
    monkeypatch.setattr(Watcher, "look", look)


def test_the_best_look_is_kept_and_exported(tmp_path, monkeypatch):
    "Looks at every step, saves at every fifth, one checkpoint kept: the student of the best look can still be had"
    scripted(monkeypatch, BAD)
    t = Trainer(Config(out=str(tmp_path / "o"), steps=40, batch=2, rank=2, track="", keep=1, save_every=5,
                       objective=Objective(beta_img=0., beta_vid=0.)))
    students = {}
    fit = t.fit
    def noted():
        for row in fit():
            students[t.step] = {n: p.detach().clone() for n, p in t.student.trainable().items()}
            yield row
    t.fit = noted
    best = watch(t, WatchOptions(eval_every=1, on_hacking="stop"))
    assert best == 6 and 10 <= t.step <= 12 and best in t.store.steps() and len(t.store.steps()) <= 3
    stopped, folder = t.step, keep_best(t, best)
    about = json.loads((folder / "student.json").read_text())["about"]
    assert (about["step"], about["best_step"], about["stopped_at"]) == (6, 6, stopped) and t.step == 6
    saved = load_student(folder).trainable()
    for n, p in t.student.trainable().items():
        assert torch.equal(p, students[6][n]) and torch.equal(saved[n], p)
    assert any(not torch.equal(p, students[stopped][n]) for n, p in saved.items())
    with pytest.raises(UserError, match="no checkpoint of step 7"): keep_best(t, 7)
    again = Trainer(t.cfg); assert again.resume() and again.step == stopped       # the same command, run again
    assert watch(again, WatchOptions(eval_every=1, on_hacking="stop")) == 6 and again.step == stopped


def test_a_look_is_sampled_as_its_student_is(trainer):
    "Guidance and steps of the student itself, unless others are given"
    trainer.student.sampling = dict(steps=3, w=4.5, origin=50, fps=8)
    w = Watcher(trainer, WatchOptions())
    assert (w.steps, w.w) == (3, 4.5)
    w = Watcher(trainer, WatchOptions(student_w=0., student_steps=2))
    assert (w.steps, w.w) == (2, 0.)
    del trainer.student.sampling
    for bad in (-2., float("nan"), float("inf")):
        with pytest.raises(UserError, match="student_w is"): WatchOptions(student_w=bad)


def test_samples_reach_the_tracker(tmp_path):
    "Losses and strips of the clips, as TensorBoard's own reader finds them"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    t = Trainer(Config(out=str(tmp_path / "o"), steps=2, batch=2, rank=2, objective=Objective(beta_img=0., beta_vid=0.)))
    watch(t, WatchOptions(eval_every=1))
    log = EventAccumulator(str(tmp_path / "o" / "tracking" / "run")).Reload()
    assert [e.step for e in log.Scalars("loss")] == [1, 2] and {"grad_norm", "memory_gb", "cd"} <= set(log.Tags()["scalars"])
    assert [e.step for e in log.Images("samples")] == [1, 2]


def test_looks_with_cached_texts(tmp_path):
    "Contexts come from the cache; captions that are not in it are named before a step is taken"
    teacher, few = load_teacher("tiny"), tmp_path / "p.txt"
    for name, more in (("lat", {}), ("txt", dict(dtype="float32"))):
        build_cache(dict(lat="latents", txt="text")[name], teacher, World("train", 0), tmp_path / name, 8, batch=2, progress=False, **more)
    captions = open_cache(tmp_path / "txt").captions
    few.write_text("\n".join([c for c in captions if c][:2]))
    cfg = Config(out=str(tmp_path / "o"), steps=1, batch=2, rank=2, track="", data=str(tmp_path / "lat"), texts=str(tmp_path / "txt"),
                 objective=Objective(beta_img=0., beta_vid=0.))
    look = Watcher(Trainer(cfg), WatchOptions(prompts=str(few))).look()
    plain = Watcher(Trainer(replace(cfg, texts="")), WatchOptions(prompts=str(few))).look()
    assert look["motion_amount"] == pytest.approx(plain["motion_amount"], rel=1e-3)
    few.write_text("a lobster playing chess\n")
    with pytest.raises(UserError, match="1 captions to look at, such as 'a lobster playing chess', are not in the text cache"):
        Watcher(Trainer(cfg), WatchOptions(prompts=str(few)))


def test_the_rewards_of_a_plain_run_are_where_the_clips_are(trainer, monkeypatch):
    "A device that is not the CPU (`meta` stands for it) gets the tiny rewards and the held-out one; the judges stay"
    monkeypatch.setattr(type(trainer.accelerator), "device", torch.device("meta"))
    watcher = object.__new__(Watcher)
    watcher.trainer, watcher.o, watcher.judges = trainer, WatchOptions(held_out="tiny-video"), None
    found = watcher._trained(True) | watcher._held_out()
    for n in ("r_vid", "held_out"): assert {p.device.type for p in found[n][0].parameters()} == {"meta"}


@pytest.mark.parametrize("given, sentence", [(["--held_out", "foo"], "foo"), (["--reference", "nowhere"], "no student in 'nowhere'")])
def test_what_a_look_cannot_use_is_refused_before_the_run_has_a_folder(given, sentence, tmp_path, capsys):
    from t2v_turbo.cli import main
    assert main(["distill", "--steps", "2", "--out", str(tmp_path / "run"), "--track", "", *given]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "run").exists()
