"VBench's arithmetic: published rows, misprints, result files, intervals"
import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from t2v_turbo.files import UserError
from t2v_turbo.vbench import (
    DIMENSIONS,
    QUALITY,
    SEMANTIC,
    TOTALS,
    Result,
    Row,
    aggregate,
    check_rows,
    compare,
    intervals,
    published,
    read_results,
    read_rows,
    score_table,
    vbench_check,
)

HALF = {d: (low + high) / 2 for d, (low, high, _) in DIMENSIONS.items()}


def table(path, rows, **change):
    "Write `Row`s as a CSV in percent; `change` sets cells of the first one"
    fields = ["model", *TOTALS, *DIMENSIONS, "source"]
    with open(path, "w", newline="") as f:
        out = csv.DictWriter(f, fields)
        out.writeheader()
        for i, r in enumerate(rows):
            cells = {"model": r.model, "source": r.source, **r.printed, **{d: f"{100 * x:.2f}" for d, x in r.scores.items()}}
            out.writerow(cells | (change if not i else {}))
    return path


# --- sums ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("row", published(), ids=lambda r: r.model)
def test_published_rows_to_a_hundredth(row):
    got = aggregate(row.scores)
    for t in TOTALS: assert got[t] == pytest.approx(row.printed[t], abs=.01)


def test_rows_given_by_path():
    "Other tables of published rows are named by an environment variable"
    path = os.environ.get("T2V_TURBO_VBENCH_ROWS")
    if not path: pytest.skip("T2V_TURBO_VBENCH_ROWS names no table")
    for row in read_rows(path):
        got = aggregate(row.scores)
        for t, v in row.printed.items(): assert got[t] == pytest.approx(v, abs=.01)


def test_weights_and_ends():
    assert len(QUALITY) == 7 and len(SEMANTIC) == 9
    assert aggregate(HALF) == pytest.approx(dict(total=50, quality=50, semantic=50))
    for d, (low, high, w) in DIMENSIONS.items():
        got = aggregate(HALF | {d: high})
        name, all_w = ("quality", 6.5) if d in QUALITY else ("semantic", 9)
        assert got[name] == pytest.approx(50 + 50 * w / all_w)
        assert got["total"] == pytest.approx(50 + 50 * w / all_w * (.8 if d in QUALITY else .2))


def test_nothing_is_clipped():
    assert aggregate(HALF | dict(motion_smoothness=1.))["quality"] > aggregate(HALF | dict(motion_smoothness=.9975))["quality"]
    assert aggregate(HALF | dict(temporal_flickering=0.))["quality"] < aggregate(HALF | dict(temporal_flickering=.6293))["quality"]


@pytest.mark.parametrize("bad", [-.01, 1.01, float("nan"), float("inf"), "x", None])
def test_out_of_range(bad):
    with pytest.raises(UserError, match="scene of"): aggregate(HALF | dict(scene=bad))


def test_missing_dimensions():
    some = {d: x for d, x in HALF.items() if d not in ("scene", "color")}
    with pytest.raises(UserError, match="no color, scene"): aggregate(some)
    assert aggregate(some, zero_missing=True) == aggregate(some | dict(scene=0, color=0))


# --- tables ----------------------------------------------------------------------------------------

def test_check_passes_and_fails(tmp_path, capsys):
    good = table(tmp_path / "good.csv", published())
    assert vbench_check(good) == vbench_check() == 0
    bad = table(tmp_path / "bad.csv", published(), total="75.78")
    assert vbench_check(bad) == 1
    assert "OFF by 0.03" in capsys.readouterr().out and vbench_check(bad, tol=.05) == 0


@pytest.mark.parametrize("off, code", [(.012, 0), (.028, 1)])
def test_the_limit_is_two_hundredths(tmp_path, off, code):
    exact = aggregate(HALF)
    row = Row("m", HALF, {t: v + off for t, v in exact.items()})
    fine = [Row("m", {d: float(f"{x:.9f}") for d, x in HALF.items()}, row.printed)]
    assert bool(check_rows(fine)) == bool(code)


@pytest.mark.parametrize("name", TOTALS)
def test_each_printed_score_is_checked(name):
    row = published()[0]
    off = Row(row.model, row.scores, row.printed | {name: row.printed[name] + .05})
    assert [f.row for f in check_rows([row, off])] == [off]
    assert check_rows([Row("m", row.scores, {name: row.printed[name]})]) == []


def test_known_misprints():
    emu3, kling, abstract = check_rows(published("vbench_misprints"))
    assert "ModelScope" in emu3.row.model and "aesthetic_quality 52.0" in emu3.why and emu3.off == pytest.approx(.67, abs=.01)
    assert kling.why.startswith("follows if dynamic_degree and aesthetic_quality are exchanged")
    assert "Quality score is printed as Total" in abstract.why


def test_every_large_exchange_is_found():
    row = published()[5]
    swapped = row.scores | dict(color=row.scores["scene"], scene=row.scores["color"])
    (found,) = check_rows([Row("m", swapped, row.printed)])
    assert "follows if color and scene are exchanged" in found.why


def test_heads_of_any_kind(tmp_path):
    r = published()[0]
    names = {d: d.replace("_", " ").title() for d in DIMENSIONS}
    path = tmp_path / "t.csv"
    path.write_bytes(("\ufeffSource," + ",".join(names.values()) + ",Model,Total\r\nx,"
                      + ",".join(f"{100 * r.scores[d]:.2f}" for d in names) + ",m,75.75\r\n").encode())
    (got,) = read_rows(path)
    assert got == Row("m", pytest.approx(r.scores), dict(total=75.75), "x") and vbench_check(path) == 0


@pytest.mark.parametrize("change, match", [
    (dict(color=""), "no color"), (dict(color="x"), "color in line 2"), (dict(color="101"), "outside 0..100"),
    (dict(total="-1"), "total in line 2"), (dict(model=""), "no model name"), (dict(color="nan"), "outside")])
def test_bad_cells(tmp_path, change, match):
    with pytest.raises(UserError, match=match): read_rows(table(tmp_path / "t.csv", published(), **change))


@pytest.mark.parametrize("text, match", [
    ("", "no column `model`"), ("model,total\n", "no row"), ("a,b\n1,2\n", "no column `model`"),
    ("model,color,Color\nm,1,2\n", "twice"), ("model\nm,3\n", "more cells")])
def test_bad_tables(tmp_path, text, match):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=match): read_rows(path)


def test_unreadable_tables(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00")
    for p in (tmp_path / "x.csv", tmp_path / "no.csv", tmp_path):
        with pytest.raises(UserError, match="cannot read"): read_rows(p)
    with pytest.raises(UserError, match="to check"):
        vbench_check(table(tmp_path / "t.csv", published()[:1], total="", quality="", semantic=""))
    assert read_rows(table(tmp_path / "u.csv", published()[:1], scene=""), zero_missing=True)[0].scores["scene"] == 0


# --- result files ----------------------------------------------------------------------------------

def results(seed=0, prompts=30, videos=5, shift=0., spread=.02, level=None):
    "A dictionary as VBench writes it"
    rng, out = np.random.default_rng(seed), {}
    for d, (low, high, _) in DIMENSIONS.items():
        v = low + (high - low) * np.clip((level if level is not None else rng.uniform(.3, .9, prompts))[:, None]
                                         + shift + spread * rng.standard_normal((prompts, videos)), 0, 1)
        k = 100 if d == "imaging_quality" else 1
        out[d] = [v.mean().item(), [dict(video_path=f"x/a cat {p}-{i}.mp4", video_results=k * v[p, i].item())
                                    for p in range(prompts) for i in range(videos)]]
    return out


def written(path, data):
    path.write_text(json.dumps(data))
    return path


def test_read_one_file_or_many(tmp_path):
    data = results()
    one = read_results(written(tmp_path / "m_eval_results.json", data))
    assert one.model == "m" and one.scores == {d: v[0] for d, v in data.items()}
    assert len(one.videos["scene"]) == 30 and len(one.videos["scene"]["a cat 7"]) == 5
    folder = tmp_path / "run"
    folder.mkdir()
    for d, v in data.items(): written(folder / f"{d}_eval_results.json", {d.replace("_", " "): v})
    written(folder / "x_full_info.json", [])
    assert read_results(folder).scores == one.scores
    written(folder / "again_eval_results.json", {"scene": [.5, []]})
    with pytest.raises(UserError, match="scene a second time"): read_results(folder)


@pytest.mark.parametrize("data, match", [
    ({"i2v_subject": [.9, []]}, "belongs to VBench-I2V"), ({"Human_Anatomy": [.9, []]}, "belongs to VBench-2.0"),
    ({"beauty": [.9, []]}, "does not know"), ([1], "not a file of results"), ({}, "not a file of results"),
    ({"imaging_quality": [58.57, []]}, "outside 0..1"), ({"scene": .5}, "not a pair"), ({"scene": []}, "not a pair"),
    ({"scene": ["x", []]}, "give a number"), ({"scene": [.5, [{"video_path": "a-0.mp4"}]]}, "video_results"),
    ({"scene": [.5, [3]]}, "video_path"), ({"scene": [.5, [{"video_path": "a-0.mp4", "video_results": float("nan")}]]}, "nan")])
def test_bad_results(tmp_path, data, match):
    with pytest.raises(UserError, match=match): read_results(written(tmp_path / "r.json", data))


def test_unreadable_results(tmp_path):
    (tmp_path / "r.json").write_text("{")
    for p in (tmp_path / "r.json", tmp_path / "no.json"):
        with pytest.raises(UserError, match="cannot read"): read_results(p)
    with pytest.raises(UserError, match="holds no"): read_results(tmp_path)


# --- intervals -------------------------------------------------------------------------------------

def result(tmp_path, **kw): return read_results(written(tmp_path / "r.json", results(**kw)))


def test_intervals_are_around_the_scores(tmp_path):
    r = result(tmp_path)
    got = intervals(r, draws=500)
    assert set(got) == {*TOTALS, *DIMENSIONS}
    for t, v in aggregate(r.scores).items(): assert got[t][0] == pytest.approx(v)
    for d in DIMENSIONS:
        v, low, high = got[d]
        assert v == pytest.approx(100 * r.scores[d]) and low < v < high
        per = np.array([np.mean(x) for x in r.videos[d].values()]) * r.scores[d] / np.mean(list(r.videos[d].values()))
        assert (high - low) / 2 == pytest.approx(196 * per.std(ddof=1) / len(per)**.5, rel=.2)
    assert intervals(r, draws=500) == got and intervals(r, draws=500, seed=1) != got


def test_shared_prompts_share_their_draws(tmp_path):
    "Dimensions that rise and fall together leave Total a wider interval than independent ones do"
    level = np.random.default_rng(5).uniform(.2, .9, 30)
    same = result(tmp_path, level=level, spread=0.)
    apart = Result("apart", same.scores, {d: {f"{d} {p}": x for p, x in v.items()} for d, v in same.videos.items()})
    width = lambda r: np.ptp(intervals(r, draws=500)["total"][1:])
    assert width(same) > 2.5 * width(apart)
    alone = intervals(same, draws=500)["color"]
    assert width(same) == pytest.approx(np.ptp(alone[1:]), rel=.05)      # all move as one


def test_coverage_of_the_total(tmp_path):
    "95 % intervals of made-up studies hold the true Total in about 95 %"
    hit, n = 0, 200
    for s in range(n):
        r = np.random.default_rng(s)
        level = r.uniform(.3, .9, 40)
        videos = {d: {f"p{i}": [low + (high - low) * v] for i, v in enumerate(level)} for d, (low, high, _) in DIMENSIONS.items()}
        scores = {d: float(np.mean(list(v.values()))) for d, v in videos.items()}
        _, low, high = intervals(Result("m", scores, videos), draws=300, seed=s)["total"]
        hit += low <= 60 <= high
    assert .90 <= hit / n <= .985


def test_intervals_where_only_some_are_listed(tmp_path):
    r = result(tmp_path)
    some = Result("m", r.scores, {d: v if d in QUALITY else {} for d, v in r.videos.items()})
    assert set(intervals(some, draws=100)) == {"quality", *QUALITY}
    part = Result("m", {d: r.scores[d] for d in QUALITY}, {d: r.videos[d] for d in QUALITY})
    got = intervals(part, draws=100, zero_missing=True)
    assert got["total"][0] == pytest.approx(aggregate(part.scores, zero_missing=True)["total"])
    with pytest.raises(UserError, match="lists no single videos"): intervals(Result("m", r.scores, {}))
    with pytest.raises(UserError, match="single prompt"): intervals(Result("m", r.scores, {"scene": {"a": [1.]}}))


def test_uneven_numbers_of_videos():
    videos = {"color": {"a": [1., 1., 1.], "b": [0.], "c": [.5, .5]}}
    got = intervals(Result("m", {"color": 4 / 6}, videos), draws=200)
    assert got["color"][0] == pytest.approx(400 / 6)


def test_paired_differences(tmp_path):
    level = np.random.default_rng(5).uniform(.2, .7, 30)
    a, b = (result(tmp_path, level=level, seed=s, shift=h, spread=.01) for s, h in ((1, 0.), (2, .02)))
    d = compare(a, b, draws=500)
    assert d["total"][0] == pytest.approx(aggregate(b.scores)["total"] - aggregate(a.scores)["total"])
    assert 1 < d["total"][1] < d["total"][0] < d["total"][2] < 3
    assert np.ptp(d["total"][1:]) < .2 * np.ptp(intervals(a, draws=500)["total"][1:])
    assert compare(a, a, draws=100)["total"] == (0, 0, 0)
    one = {**b.videos, "scene": {p: x[:4] for p, x in b.videos["scene"].items()}}
    with pytest.raises(UserError, match="videos of scene"): compare(a, Result("c", b.scores, one))
    with pytest.raises(UserError, match="different dimensions"):
        compare(a, Result("c", {d: x for d, x in b.scores.items() if d != "scene"}, b.videos))


# --- shown -----------------------------------------------------------------------------------------

def test_table(tmp_path):
    r = result(tmp_path)
    own = intervals(r, draws=100)
    text = score_table(published(), {"mine|": own, "plain": aggregate(r.scores)}).splitlines()
    assert len(text) == 2 + 20 + 2 and all(l.replace("\\|", "").count("|") == 5 for l in text)
    totals = [float(l.split("|")[-4].split()[0]) for l in (t.replace("\\|", "") for t in text[2:])]
    assert totals == sorted(totals, reverse=True)


def test_no_vbench_and_nothing_heavy():
    code = "import sys, t2v_turbo.vbench; assert not {'vbench', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_mac_leaves_beside_results_is_passed_over(tmp_path):
    for n in ("._r_eval_results.json", "__MACOSX/r_eval_results.json"):
        (tmp_path / n).parent.mkdir(exist_ok=True); (tmp_path / n).write_bytes(b"\0\5\x16\7\xff")
    with pytest.raises(UserError, match="holds no .*_eval_results.json"): read_results(tmp_path)
    (tmp_path / "r_eval_results.json").write_text(json.dumps({d: [.5, []] for d in DIMENSIONS}))
    assert read_results(tmp_path).scores == dict.fromkeys(DIMENSIONS, 0.5)
