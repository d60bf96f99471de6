"The rule against reward hacking, on made-up looks, and on the runs of the experiment"
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from t2v_turbo import watch as watch_module
from t2v_turbo.caches import build_cache, open_cache
from t2v_turbo.core import UserError, make_gen
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.train import Config, Objective, Trainer
from t2v_turbo.world import World
from t2v_turbo.watch import Watcher, WatchOptions, hacked, look_every, read_rows, score_clips, watch

RUNS = Path(__file__).resolve().parents[1] / "nbs" / "experiments" / "hacking.json"


def looks(held, trained, noise=.1, n=12, seed=0):
    gen = make_gen(seed)
    each = [[(v + noise * torch.randn(n, generator=gen)).tolist() for v in pair] for pair in zip(held, trained)]
    return [dict(step=i, held_out=sum(h) / n, each=dict(held_out=h, trained=t)) for i, (h, t) in enumerate(each)]


def test_rule_waits_for_its_patience():
    rows = looks([0, 2, 1, 0, -1, -2], range(6))
    assert [hacked(rows[:n], 3) for n in range(1, 7)] == [None] * 4 + [1, 1]
    assert [hacked(rows[:n], 1) for n in range(1, 7)] == [None, None, 1, 1, 1, 1]


@pytest.mark.parametrize("held, trained", [([0, 1, 2, 3, 4], range(5)), ([0, 2, 1, 0, -1], [5, 4, 3, 2, 1]),
                                           ([0, .02, 0, .01, 0], range(5)), ([0, 2, 1, 2.5, 1], range(5))])
def test_rule_keeps_quiet(held, trained): assert hacked(looks(held, trained), 3) is None


def test_rule_is_seldom_wrong_on_noise():
    "200 runs of ten looks whose scores do not change but for noise"
    wrong = sum(hacked(looks([0] * 10, [0] * 10, seed=s), 3) is not None for s in range(200))
    assert wrong <= 10, wrong


def test_rule_ignores_looks_without_scores():
    assert hacked([dict(step=0, r_img=1.)] * 9) is None and hacked([]) is None


@pytest.mark.skipif(not RUNS.is_file(), reason="the experiment's runs are not beside the notebooks")
def test_rule_on_the_experiment():
    runs = json.loads(RUNS.read_text())
    assert hacked(runs["pushed"], 3) is not None
    assert hacked(runs["usual"], 3) is None


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
    (tmp_path / "p.txt").write_text("a red circle moving left\n\na blue cross growing\n")
    row = Watcher(trainer, WatchOptions(prompts=str(tmp_path / "p.txt"))).look()
    assert len(row["each"]["trained"]) == 2 and "held_out" not in row and "shape" not in row     # no judges for unknown captions
    (tmp_path / "e.txt").write_text("\n")
    with pytest.raises(UserError, match="is empty"): Watcher(trainer, WatchOptions(prompts=str(tmp_path / "e.txt")))


def test_a_held_out_reward_that_is_never_asked_is_refused(trainer, tmp_path):
    "`watch` trains not a step; with captions to look at, or without the reward, nothing is said"
    (tmp_path / "p.txt").write_text("a red circle moving left\n")
    data, own = replace(trainer.cfg, data=str(tmp_path)), str(tmp_path / "p.txt")
    for cfg, o, why in ((data, WatchOptions(held_out="tiny-video"), "give prompts"),
                        (trainer.cfg, WatchOptions(held_out="tiny-video", eval_every=0), "give eval_every"),
                        (data, WatchOptions(held_out="tiny-video", eval_every=0, prompts=own), "give eval_every")):
        with pytest.raises(UserError, match=f"held_out 'tiny-video' would never be asked: {why}"): look_every(cfg, o)
    with pytest.raises(UserError, match="would never be asked"): watch(trainer, WatchOptions(held_out="tiny-video", eval_every=0))
    assert trainer.step == 0
    assert look_every(data, WatchOptions(held_out="tiny-video", prompts=own)) == 50 and look_every(data, WatchOptions()) == 0


def test_stop_and_warn(trainer, capsys):
    out = Path(trainer.cfg.out); out.mkdir(exist_ok=True); trainer.step = 3
    (out / "looks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in looks([0, 2, 1, 0], range(4))))
    assert watch(trainer, WatchOptions(on_hacking="stop", patience=2)) == 1 and trainer.step == 3
    assert "the rewards are being hacked" in capsys.readouterr().err
    assert watch(trainer, WatchOptions(on_hacking="warn", patience=2, eval_every=4)) is None and trainer.step == 4
    assert capsys.readouterr().err.count("the rewards are being hacked") == 1
    assert [r["step"] for r in read_rows(out / "looks.jsonl")] == [0, 1, 2, 3, 4]


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
    few.write_text("a red circle moving left\na blue square moving up\n")
    for name, more in (("lat", {}), ("txt", dict(dtype="float32"))):
        build_cache(dict(lat="latents", txt="text")[name], teacher, World("train", 0, 8, 32), tmp_path / name, 8, batch=2, progress=False, **more)
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
