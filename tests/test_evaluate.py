"Judges, rows and tables, on clips that are rendered"
import json
import math
import re

import pytest
import torch

from t2v_turbo.core import make_gen, step_gen, step_seed
from t2v_turbo.evaluate import Sampler, cells, evaluate, markdown_table, print_table, summarise
from t2v_turbo.judges import (
    AXES,
    Judge,
    held_captions,
    high_frequency,
    judge,
    load_judges,
    motion_amount,
    precision_recall,
    relative_motion,
    saturation,
)
from t2v_turbo.world import blur, caption, flicker, parse, render, sample_attrs, watermark

HELD = held_captions(24)
KEYS = {"model", "steps", "nfe", "seconds_per_video", "videos", "judges", "mean", "ci95", "motion_amount", "relative_motion", "diversity", "precision", "recall", "seed"}


def drawn(prompts, seed):
    return render(torch.tensor([parse(p) for p in prompts]), make_gen(seed))


@pytest.fixture(scope="module")
def net(): return load_judges()


@pytest.fixture(scope="module")
def row(net): return evaluate(Sampler("drawn", 4, 8, drawn), HELD, net, repeats=2)


def test_judges_are_right_on_clean_clips(net):
    prompts = [caption(*a) for a in sample_attrs(160, "all", make_gen(0)).tolist()]
    scores = judge(net, drawn(prompts, 11), prompts)
    assert list(scores) == list(AXES) and all(v.shape == (160,) and v.mean() > (.9 if k in AXES[:4] else .7) for k, v in scores.items()), scores


def test_judges_see_every_flaw_and_every_wrong_word(net):
    prompts = HELD * 2
    clean = drawn(prompts, 12)
    good = judge(net, clean, prompts)
    for bad, axis in ((blur(clean), "look"), (watermark(clean), "look"), (flicker(clean, make_gen(1)), "steady")):
        assert judge(net, bad, prompts)[axis].mean() < good[axis].mean() - .2
    n, c, s, m = torch.tensor([parse(p) for p in prompts]).T
    wrong = [caption(*a) for a in torch.stack([(n + 1) % 12, (c + 1) % 8, (s + 1) % 6, (m + 1) % 8], 1).tolist()]
    scores = judge(net, clean, wrong)
    assert all(scores[k].mean() < .1 for k in AXES[:4])
    assert not any(v.requires_grad for v in scores.values())


def test_parameter_names_are_those_of_the_weights(net):
    names = {n.split(".")[0] + "." + n.split(".")[1] for n in Judge().state_dict()}
    assert names == {f"{n}.{p}" for n in ("frame", "clip") for p in ("convs", "norms", "head")}
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_verdicts_by_hand():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            pick = dict(noun=(12, 1), colour=(8, 0), scene=(6, 0), motion=(9, 3))
            said = {k: torch.eye(n)[i].expand(len(x), n) for k, (n, i) in pick.items()}
            return said | dict(look=torch.tensor([.25, .5]), steady=torch.ones(2))
    scores = judge(Fixed(), torch.zeros(2, 3, 8, 64, 64), ["a red rocket moving left in the sky", "a blue fish moving down in the sea"])
    assert {k: v.tolist() for k, v in scores.items()} == dict(noun=[1, 0], colour=[1, 0], scene=[1, 0], motion=[0, 1], look=[.25, .5], steady=[1, 1])


def test_a_set_of_clips_against_clean_clips(net):
    "A copy of a few clips is precise and covers little; a still clip moves by nothing"
    x = drawn(HELD, 1)
    with torch.no_grad(): world, few = net.features(drawn(HELD * 2, 2)), net.features(x[:4]).repeat(6, 1)
    assert precision_recall(world, world) == (1., 1.)
    assert precision_recall(world, few, 5)[1] < .5
    assert relative_motion(x[:4, :, :1].expand(-1, -1, 8, -1, -1), HELD[:4]).tolist() == [0.] * 4
    assert (relative_motion(x, HELD).mean() - 1).abs() < .3


def test_held_captions_name_every_word_equally_often():
    words = torch.tensor([parse(p) for p in HELD]).T
    for k, n in enumerate((12, 8, 6, 8)): assert (words[k].bincount(minlength=n) - 24 / n).abs().max() <= 1
    assert held_captions(5) == HELD[:5] and len(set(held_captions(200))) == 200


def test_instruments_by_hand():
    x = torch.zeros(2, 3, 4, 6, 6); x[1, 0, ::2] = 1          # a black clip; one that blinks red
    assert motion_amount(x).tolist() == [0, 85] and high_frequency(x).tolist() == [0, 0]
    assert saturation(x).tolist() == [0, .5]
    noisy = (x + .1 * torch.randn(x.shape, generator=make_gen(0))).clamp(0, 1)
    assert (high_frequency(noisy) > high_frequency(x)).all()


def test_row(row):
    assert set(row) == KEYS and tuple(row["judges"]) == AXES
    assert (row["model"], row["steps"], row["nfe"], row["videos"], row["seed"]) == ("drawn", 4, 8, 48, 0)
    assert math.isclose(row["mean"], sum(row["judges"].values()) / 6, rel_tol=1e-6) and row["mean"] > .85
    assert row["seconds_per_video"] > 0 and row["motion_amount"] > 0 and 0 <= row["ci95"] < .1
    assert json.loads(json.dumps(row)) == row


def test_a_row_stands_beside_clean_clips(net, row):
    "Other draws of the world resemble it; one clip for all captions covers little of it, and a still moves by nothing"
    assert row["precision"] > .6 and row["recall"] > .6 and abs(row["relative_motion"] - 1) < .2
    one = drawn(HELD[:1], 0)
    same = evaluate(Sampler("same", 1, 1, lambda prompts, seed: one.expand(len(prompts), -1, -1, -1, -1)), HELD, net, repeats=1)
    still = evaluate(Sampler("still", 1, 1, lambda prompts, seed: drawn(prompts, seed)[:, :, :1].expand(-1, -1, 8, -1, -1)), HELD, net, repeats=1)
    assert same["recall"] < .2 and still["relative_motion"] == 0
    few = evaluate(Sampler("few", 1, 1, drawn), HELD[:3], net, repeats=1)
    assert few["precision"] is None and "–" in cells([few])[1] and summarise([few, few | dict(seed=1)])[0]["recall"] is None
    assert summarise([row, row | dict(seed=1, recall=row["recall"] - .2)])[0]["recall"] == pytest.approx(row["recall"] - .1)


def test_every_sampler_gets_the_same_calls_and_the_first_is_not_timed(net):
    "The first of several batches warms up; a single one is sampled twice"
    calls = []
    def slow_start(prompts, seed):
        import time
        time.sleep(.4 if not calls else 0)
        calls.append((tuple(prompts), seed)); return drawn(prompts, seed)
    r = evaluate(Sampler("x", 1, 1, slow_start), HELD[:5], net, seed=3, repeats=3, batch=4)
    assert [len(p) for p, _ in calls] == [4, 4, 4, 3] and [s for _, s in calls] == [step_seed(3, i, "evaluate") for i in range(4)]
    assert sum((p for p, _ in calls), ()) == tuple(HELD[:5] * 3)
    assert r["videos"] == 15 and r["seconds_per_video"] < .1
    again = evaluate(Sampler("x", 1, 1, drawn), HELD[:5], net, seed=3, repeats=3, batch=4)
    assert again | dict(seconds_per_video=0) == r | dict(seconds_per_video=0)
    calls.clear()
    alone = evaluate(Sampler("x", 1, 1, slow_start), HELD[:4], net, seed=3, repeats=1, batch=4)
    assert calls == [(tuple(HELD[:4]), step_seed(3, 0, "evaluate"))] * 2 and alone["seconds_per_video"] < .1


def test_interval_is_over_prompts_not_videos(net):
    "Half of the prompts always right, half always wrong in most words: repeats do not help"
    other = {p: HELD[0] if i % 2 else p for i, p in enumerate(HELD)}
    lazy = Sampler("lazy", 1, 1, lambda prompts, seed: drawn([other[p] for p in prompts], seed))
    few, many = [evaluate(lazy, HELD, net, repeats=n)["ci95"] for n in (1, 3)]
    assert .08 < few and abs(few - many) < .03


def test_summary(row):
    rows = [row | dict(mean=m, seed=i) for i, m in enumerate((.5, .6, .7))] + [row | dict(steps=8)]
    a, b = summarise(rows)
    assert (a["n"], a["videos"], round(a["mean"], 6), round(a["std"], 6)) == (3, 144, .6, .1)
    assert b["steps"] == 8 and b["n"] == 1 and b["std"] is None


def test_evaluation_never_draws_what_training_draws(net):
    "No start noise or clip of a run's first steps comes again, at the same seed or at others"
    seeds = []
    evaluate(Sampler("x", 1, 1, lambda prompts, seed: seeds.append(seed) or drawn(prompts, seed)), HELD[:2], net, repeats=4, batch=2)
    first = lambda gen: torch.rand(4, generator=gen).tolist()
    steps = [first(make_gen(1000003 * s + i)) for s in range(3) for i in range(50)]
    steps += [first(step_gen(s, i, stream)) for s in range(3) for i in range(50) for stream in ("noise", "clips")]
    assert len(set(seeds)) == 4 and not [s for s in seeds if first(make_gen(s)) in steps]


def test_what_the_spread_is_over_is_in_the_table(row):
    assert "± 95% (prompts)" in cells([row])[0] and "± std (seeds)" in cells(summarise([row, row | dict(seed=1)]))[0]


def test_tables(row, capsys):
    for rows in ([row, row | dict(model="a|b")], summarise([row])):
        md = markdown_table(rows).splitlines()
        assert len(md) == len(rows) + 2 and len({len(re.findall(r"(?<!\\)\|", l)) for l in md}) == 1
        print_table(rows)
        out = capsys.readouterr().out.splitlines()
        assert len(out) == len(rows) + 1 and len({len(l) for l in out}) == 1
