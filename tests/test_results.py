"Scripts that make the evidence: in small, and from made-up rows"
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "bench" / "rival.py").is_file(), reason="no checkout")


@pytest.fixture(scope="module")
def rival():
    sys.path.insert(0, str(ROOT / "bench"))
    yield runpy.run_path(str(ROOT / "bench" / "rival.py"))
    sys.path.remove(str(ROOT / "bench"))


def test_gradient_flows_through_the_last_steps_alone(rival):
    "A denoiser of one number: the sample is that of the usual sampler, whatever share of the chain has a gradient"
    from t2v_turbo.schedule import Schedule, vp_abar
    from t2v_turbo.solver import DDIM, ddim_sample
    a, schedule = torch.tensor(.3, requires_grad=True), Schedule(vp_abar())
    asked = []
    def denoise(z, t, ctx):
        asked.append((int(t[0]), torch.is_grad_enabled()))
        x0 = a * z + ctx.mean()
        alpha, sigma = schedule.alpha_sigma(t, z)
        return x0, (z - alpha * x0) / sigma
    teacher = SimpleNamespace(schedule=schedule, denoise=denoise)
    z, ctx, null = torch.ones(2, 1, 1, 1, 1), torch.ones(2, 1, 1), torch.zeros(2, 1, 1)
    *_, (_, _, want) = ddim_sample(DDIM(schedule, 4), denoise, z, 1.5, ctx, null)
    slopes = []
    for last in (1, 2, 4):
        asked.clear()
        got = rival["sampled"](teacher, z, 1.5, ctx, null, 4, last)
        torch.testing.assert_close(got, want)
        assert [g for _, g in asked] == sorted(g for _, g in asked) and sum(g for _, g in asked) == len(asked) * last // 4
        slopes.append(torch.autograd.grad(got.sum(), a)[0].item())
    h = 1e-3
    with torch.no_grad():
        ends = []
        for v in (.3 - h, .3 + h): a.fill_(v); ends.append(rival["sampled"](teacher, z, 1.5, ctx, null, 4, 4).sum().item())
    assert slopes[2] == pytest.approx((ends[1] - ends[0]) / 2 / h, rel=1e-2) and slopes[0] != pytest.approx(slopes[2], rel=1e-2)


def test_a_rival_in_small(rival, tmp_path):
    "One step, judged on two captions; a second call trains nothing and finds the row"
    given = [str(tmp_path), "--seeds", "1", "--steps", "1", "--captions", "4"]
    rival["main"](given)
    path = tmp_path / "rows" / "rival-0" / "row.json"
    row, first = json.loads(path.read_text()), path.stat().st_mtime_ns
    assert (row["model"], row["steps"], row["nfe"]) == ("rival", 4, 8) and {"judges", "mean", "again", "rewards", "precision"} <= row.keys()
    log = [json.loads(l) for l in (path.parent / "log.jsonl").read_text().splitlines()]
    assert [l["step"] for l in log] == [1] and log[0]["cd"] == 0 and log[0]["r_img"] and log[0]["grad_norm"] > 0
    rival["main"](given)
    assert path.stat().st_mtime_ns == first and len(json.loads((tmp_path / "rows.json").read_text())) == 1


RESULTS = ROOT / "nbs" / "experiments"


def rows_of(name): return json.loads((RESULTS / name).read_text())


def test_front_page_shows_the_committed_rows():
    "README's table, its counts of seeds and its factor of time are those of three_seeds.json"
    from t2v_turbo.evaluate import markdown_table, summarise
    rows, readme = rows_of("three_seeds.json"), (ROOT / "README.md").read_text(encoding="utf-8")
    shown = [r for r in rows if r["model"] in ("teacher", "cd", "cd + R_img", "cd + R_vid", "turbo (both)")]
    assert markdown_table(summarise(shown)) in readme
    of = lambda model, steps: {r["seed"]: r for r in rows if (r["model"], r["steps"]) == (model, steps)}
    teacher, cd, both = of("teacher", 50), of("cd", 4), of("turbo (both)", 4)
    seeds = teacher.keys() & cd.keys() & both.keys()
    assert f"above the teacher's 50 in {sum(both[s]['mean'] > teacher[s]['mean'] for s in seeds)} of {len(seeds)} seeds" in readme


@pytest.mark.parametrize("name", ["three_seeds.json", "flow.json"])
def test_rows_are_comparable(name):
    "One row for each model and seed, the same captions and settings for all, students judged twice"
    rows = rows_of(name)
    assert len({(r["model"], r["steps"], r["seed"]) for r in rows}) == len(rows)
    assert {(r["videos"], r["w"]) for r in rows} == {(96, rows[0]["w"])}
    assert all(("again" in r) == (r["model"] != "teacher") for r in rows) and all(r["again"]["seed"] == r["seed"] + 1000 for r in rows if "again" in r)
    for r in rows: assert r["mean"] == pytest.approx(sum(r["judges"].values()) / 6, abs=1e-5)
    students = [r["settings"] for r in rows if r["model"] not in ("teacher", "rival")]
    for k in ("steps", "batch", "lr", "rank", "k", "ema", "w_min", "w_max"): assert len({s[k] for s in students}) == 1, k


def test_claims_of_the_stored_page_are_those_of_the_rows():
    "Every difference of the table of notebook 02, by another way: numpy on the committed rows"
    import numpy as np
    rows, page = rows_of("three_seeds.json"), json.loads((RESULTS / "02_three_seeds.ipynb").read_text(encoding="utf-8"))
    said = "".join("".join(o["data"]["text/markdown"]) for c in page["cells"] for o in c.get("outputs", []) if "text/markdown" in o.get("data", {}))
    lines = [[v.strip() for v in l.strip("|").split("|")] for l in said.splitlines() if l.startswith("| ") and " of " in l and l.count("|") == 9]
    assert len(lines) > 5
    groups = {"frame axes": ("noun", "colour", "scene", "look"), "motion": ("motion",), "steady": ("steady",), "mean": tuple(rows[0]["judges"])}
    for _, difference, axis, stated, *_ in lines:
        value = lambda r, axis=axis: r["rewards"][axis] if axis in r["rewards"] else np.mean([r["judges"][k] for k in groups[axis]])
        a, b = ({r["seed"]: value(r) for r in rows if f"{r['model']}, {r['steps']} steps" == m} for m in difference.split(" - "))
        d = np.array([a[s] - b[s] for s in a.keys() & b.keys()])
        assert abs(float(stated.split()[0]) - d.mean()) < 6e-4, difference
