"Human preference: pairs, pages, strangers' files, statistics"
import csv
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from importlib.resources import files

import numpy as np
import pytest
import torch

from t2v_turbo.core import make_gen, write_video
from t2v_turbo.files import UserError
from t2v_turbo.rate import (
    COLUMNS,
    QUESTIONS,
    agreement,
    consistency,
    find_pairs,
    make_page,
    position_bias,
    print_report,
    rate_plot,
    rate_report,
    read_ratings,
    win_rates,
    without_fast,
)

STUDIES = int(os.environ.get("T2V_TURBO_STUDIES", 1000))     # simulated studies a coverage test asks


def clip(seed): return torch.rand(3, 4, 32, 32, generator=make_gen(seed))


def folders(tmp_path, captions, stem="{:04d}"):
    for k, model in enumerate("ab"):
        (tmp_path / model).mkdir()
        for i, c in enumerate(captions):
            name = stem.format(i)
            write_video(tmp_path / model / f"{name}.mp4", clip(10 * i + k))
            if c: (tmp_path / model / f"{name}.txt").write_text(c)
    return tmp_path / "a", tmp_path / "b"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "Pairs and page of a small study"
    here = tmp_path_factory.mktemp("study")
    pairs = find_pairs(*folders(here, ["a cat", "a dog", "</script><b>", "a cat"]))
    return pairs, make_page(pairs, here / "s.html")[0]


# --- pairs -----------------------------------------------------------------------------------------

def test_pairs(study):
    pairs, _ = study
    assert [p.caption for p in pairs] == ["a cat", "a dog", "</script><b>", "a cat"]
    assert len({p.id for p in pairs}) == 4
    assert pairs[0].id.split(".")[0] == pairs[3].id.split(".")[0] != pairs[1].id.split(".")[0]


def test_what_a_mac_leaves_is_no_video(tmp_path):
    a, b = folders(tmp_path, ["a cat"])
    for n in ("._0000.mp4", "._0000.txt", "__MACOSX/0000.mp4"):
        (b / n).parent.mkdir(exist_ok=True); (b / n).write_bytes(b"\0\5\x16\7\xff")
    assert [p.caption for p in find_pairs(a, b)] == ["a cat"]


def test_captions_from_names_and_from_the_table_of_seeds(tmp_path):
    a, b = folders(tmp_path, ["", ""], "a cat-{}")
    assert [p.caption for p in find_pairs(a, b)] == ["a cat", "a cat"]
    for d in (a, b): (d / "videos.csv").write_text('file,prompt,seed\na cat-0.mp4,"a cat, really",1\na cat-1.mp4,x,2\n')
    assert [p.caption for p in find_pairs(a, b)] == ["a cat, really", "x"]


def test_the_output_folder_of_generate(tmp_path):
    for k in "ab":
        (tmp_path / k / "videos").mkdir(parents=True)
        write_video(tmp_path / k / "videos/0000.mp4", clip(ord(k)))
        (tmp_path / k / "videos.csv").write_text("file,prompt,seed\n0000.mp4,a cat,1\n")
    for sub in ("", "videos"):
        (p,) = find_pairs(tmp_path / "a" / sub, tmp_path / "b" / sub)
        assert p.caption == "a cat"


def test_bad_folders(tmp_path):
    a, b = folders(tmp_path, ["a cat", "a dog"])
    def fails(match):
        with pytest.raises(UserError, match=match): find_pairs(a, b)
    (b / "0001.txt").write_text("a hen"); fails("0001.mp4 shows 'a dog'")
    (b / "0001.txt").unlink(); fails("0001.mp4 has no caption")
    (b / "0001.txt").write_text("a dog")
    whole = (b / "0001.mp4").read_bytes()
    (b / "0001.mp4").write_bytes(whole[:100]); fails("cannot be read")
    (b / "0001.mp4").unlink(); fails("lacks '0001.mp4'")
    (b / "0001.mp4").write_bytes(whole)
    write_video(b / "0002.mp4", clip(0)); (b / "0002.txt").write_text("x"); fails("lacks '0002.mp4'")
    write_video(a / "0002.gif", clip(0)); (a / "0002.txt").write_text("x"); (b / "0002.mp4").unlink()
    write_video(b / "0002.gif", clip(0)); fails("is no .mp4")
    with pytest.raises(UserError, match="no folder"): find_pairs(a, tmp_path / "no")
    (a / "videos.csv").write_text("id,url\n1,x\n"); fails("Line 2 of .*videos.csv has no file or no caption")
    (a / "videos.csv").write_bytes(b"file,prompt\n0001.mp4,caf\xe9\n"); fails("videos.csv is not UTF-8 text")


def test_codecs_browsers_do_not_play(tmp_path):
    import av
    a, b = folders(tmp_path, ["a cat"])
    with av.open(str(b / "0000.mp4"), "w") as f:
        s = f.add_stream("mpeg4", rate=8)
        s.width = s.height = 64; s.pix_fmt = "yuv420p"
        f.mux(s.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), "uint8"), format="rgb24"))); f.mux(s.encode())
    with pytest.raises(UserError, match="coded as mpeg4"): find_pairs(a, b)


# --- page ------------------------------------------------------------------------------------------

def info(page):
    text = page.read_text()
    return json.loads(text.split('id="study">')[1].split("</script>")[0])


def test_page(study, tmp_path):
    pairs, page = study
    text = page.read_text()
    assert text.count("data:video/mp4;base64,") == 8 and "</script><b>" not in text
    assert "http://" not in text and "https://" not in text and "default-src 'none'" in text
    got = info(page)
    assert {p["id"]: p["caption"] for p in got["pairs"]} == {p.id: p.caption for p in pairs}
    assert got["questions"] == QUESTIONS and got["repeats"] == 1
    assert str(pairs[0].a.parent) not in text                 # nobody can read which model is which
    assert make_page(pairs, tmp_path / "t.html")[0].read_text() == text
    assert make_page(pairs, tmp_path / "u.html", seed=1)[0].read_text() != text


def test_the_program_of_the_page_parses():
    "node reads rate.js as it lies in the package"
    node = shutil.which("node")
    if not node: pytest.skip("no node on this machine")
    path = files("t2v_turbo") / "page" / "rate.js"
    run = subprocess.run([node, "--check", str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_every_id_that_the_program_uses_is_on_the_page(study):
    text, script = study[1].read_text(), (files("t2v_turbo") / "page" / "rate.js").read_text()
    ids = set(re.findall(r'\$\("([a-z0-9]+)"\)', script))
    assert len(ids) > 15 and not [i for i in ids if f'id="{i}"' not in text]


def test_parts(study, tmp_path):
    pairs, page = study
    pages = make_page(pairs, tmp_path / "p.html", parts=3, repeats=0)
    assert [p.name for p in pages] == ["p-1.html", "p-2.html", "p-3.html"]
    parts = [info(p) for p in pages]
    assert sorted(x["id"] for p in parts for x in p["pairs"]) == sorted(p.id for p in pairs)
    assert {p["id"] for p in parts} == {info(page)["id"]} and [p["part"] for p in parts] == ["1/3", "2/3", "3/3"]
    assert all(p["repeats"] == 0 for p in parts)


@pytest.mark.parametrize("kw, match", [(dict(repeats=.6), "repeats is"), (dict(repeats=-1), "repeats is"),
                                       (dict(parts=0), "parts is 0"), (dict(parts=5), "parts is 5")])
def test_bad_pages(study, tmp_path, kw, match):
    with pytest.raises(UserError, match=match): make_page(study[0], tmp_path / "x.html", **kw)
    with pytest.raises(UserError, match="no pairs"): make_page([], tmp_path / "x.html")
    with pytest.raises(UserError, match="end in .html"): make_page(study[0], tmp_path / "x")
    assert not any(tmp_path.iterdir())


# --- files of strangers ----------------------------------------------------------------------------

def rating(known, **kw):
    pairs, page = known
    return dict(study=info(page)["id"], rater="ann", pair=pairs[0].id, question="appeal", rep=0, left="a",
                choice=1, seconds=2.5) | kw


def as_csv(path, rows, columns=COLUMNS):
    with open(path, "w", newline="", encoding="utf-8") as f:
        out = csv.DictWriter(f, columns, extrasaction="ignore")
        out.writeheader(); out.writerows(rows)
    return path


@pytest.mark.parametrize("left, choice, winner", [("a", 1, "a"), ("a", 2, "b"), ("b", 1, "b"), ("b", 2, "a"), ("a", 0, "tie"),
                                                  ("b", 0, "tie")])
def test_who_wins(study, tmp_path, left, choice, winner):
    got = read_ratings(as_csv(tmp_path / "r.csv", [rating(study, left=left, choice=choice)]), study[1])
    assert [v["winner"] for v in got.votes] == [winner] and got.dropped == []


BAD = [dict(choice=3), dict(choice=""), dict(choice="1.0"), dict(choice=-1), dict(left="A"), dict(left=""), dict(rep=2), dict(question="x"),
       dict(question="appeal "), dict(rater=""), dict(rater="<b>"), dict(rater="=1+1"), dict(rater="x" * 41), dict(rater="a\nb"), dict(rater="ann\n"),
       dict(pair="x"), dict(pair="0" * 17), dict(study="x"), dict(seconds="nan"), dict(seconds="-1"), dict(seconds="1e9"), dict(seconds="٣")]


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_malformed_rows_are_named_and_dropped(study, tmp_path, bad, kind):
    rows, path = [rating(study), rating(study, question="text") | bad], tmp_path / f"r.{kind}"
    if kind == "csv": as_csv(path, rows)
    else: path.write_text(json.dumps(rows))
    got = read_ratings(path, study[1])
    assert len(got.votes) == 1 and len(got.dropped) == 1
    assert str(path) in got.dropped[0] and next(iter(bad)) in got.dropped[0]
    assert ("line" if kind == "csv" else "row 2") in got.dropped[0]


@pytest.mark.parametrize("row", [None, 3, "x", [], {}, {"study": 1}, {"choice": {"a": 1}}])
def test_json_of_any_shape(study, tmp_path, row):
    (tmp_path / "r.json").write_text(json.dumps([row, rating(study), rating(study) | {"more": 1}]))
    got = read_ratings(tmp_path / "r.json", study[1])
    assert len(got.votes) == 1 and len(got.dropped) == 2


@pytest.mark.parametrize("data", [b"", b"\x00", b"\xff\xfe", b"a,b\n1,2\n", b"\x89PNG\r\n", b"study\n" + b"x" * 200000,
                                  ",".join(COLUMNS).encode() + b'\n"' + b"y" * 200000])
def test_files_that_are_none(study, tmp_path, data):
    (tmp_path / "x.csv").write_bytes(data)
    good = as_csv(tmp_path / "r.csv", [rating(study)])
    got = read_ratings([tmp_path / "x.csv", good, tmp_path / "gone.csv"], study[1])
    assert len(got.votes) == 1 and any("x.csv" in s for s in got.dropped) and any("gone.csv" in s for s in got.dropped)


@pytest.mark.parametrize("text", ["", "{", "{}", "3", "[" * 100000])
def test_json_files_that_are_none(study, tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    got = read_ratings([tmp_path / "x.json"], study[1])
    assert got.votes == [] and len(got.dropped) == 1
    with pytest.raises(UserError, match="no valid rating"): rate_report(tmp_path / "x.json", study[1])


def test_rows_with_too_many_or_too_few_cells(study, tmp_path):
    path = as_csv(tmp_path / "r.csv", [rating(study)])
    line = path.read_text().splitlines()[1]
    path.write_text(path.read_text() + line + ",1\n" + line.rsplit(",", 1)[0] + "\n")
    got = read_ratings(path, study[1])
    assert len(got.votes) == 1 and len(got.dropped) == 2


def test_duplicates(study, tmp_path):
    one, same = rating(study), rating(study, left="b", choice=2)          # the same winner, seen from the other side
    got = read_ratings(as_csv(tmp_path / "r.csv", [one, one, same]), study[1])
    assert len(got.votes) == 1 and sum("repeats a row" in s for s in got.dropped) == 2
    got = read_ratings([as_csv(tmp_path / "r.csv", [one]), as_csv(tmp_path / "s.csv", [one | dict(choice=2)])], study[1])
    assert got.votes == [] and sum("differently" in s for s in got.dropped) == 2
    other = [one, one | dict(rater="bob", choice=2), one | dict(rep=1, choice=2), one | dict(question="text", choice=0)]
    assert len(read_ratings(as_csv(tmp_path / "t.csv", other), study[1]).votes) == 4


def test_foreign_rows(study, tmp_path):
    rows = [rating(study), rating(study, pair="00000000.00000000"), rating(study, study="0" * 12, question="text")]
    path = as_csv(tmp_path / "r.csv", rows)
    got = read_ratings(path, study[1])
    assert len(got.votes) == 1 and "not in the study" in " ".join(got.dropped) and "another study" in " ".join(got.dropped)
    assert len(read_ratings(path).votes) == 2                              # without the page the pair is not known to be unknown
    assert len(read_ratings(as_csv(tmp_path / "u.csv", [rating(study, study="0" * 12)]), study[1]).votes) == 0


def test_pages_of_a_study(study, tmp_path):
    pairs, page = study
    rows = [rating(study, pair=p.id) for p in pairs]
    pages = make_page(pairs, tmp_path / "p.html", parts=2)
    path = as_csv(tmp_path / "r.csv", rows)
    assert len(read_ratings(path, pages).votes) == 4 and len(read_ratings(path, pages[0]).votes) == 2
    with pytest.raises(UserError, match="different studies"):
        read_ratings(path, [page, make_page(pairs[:2], tmp_path / "other.html")[0]])
    for bad in (path, tmp_path / "gone.html"):
        with pytest.raises(UserError, match="page"): read_ratings(path, bad)


# --- statistics ------------------------------------------------------------------------------------

def vote(pair, winner, rater="r", question="appeal", rep=0, left="a"):
    choice = "0" if winner == "tie" else "1" if winner == left else "2"
    return dict(study="s", rater=rater, pair=f"{pair:08x}.{pair:08x}", question=question, rep=str(rep), left=left,
                choice=choice, seconds="1", winner=winner)


def test_rates_by_hand():
    votes = [vote(i, w) for i, w in enumerate(["a"] * 8 + ["b"] * 2 + ["tie"])] + [vote(0, "b", rep=1)]
    got = win_rates(votes)
    assert (got["appeal"]["a"], got["appeal"]["b"], got["appeal"]["tie"], got["appeal"]["rate"]) == (8, 2, 1, .8)
    assert got["appeal"]["wilson"] == pytest.approx((.4902, .9433), abs=1e-4)
    assert got["text"] == dict(a=0, b=0, tie=0, rate=None, wilson=None, prompts=None)
    assert win_rates([vote(0, "a")])["appeal"]["prompts"] is None
    assert win_rates([vote(i, "a") for i in range(5)])["appeal"]["prompts"] == (1, 1)


def test_videos_of_one_prompt_are_drawn_together():
    "Ten prompts with ten seeds each, all of a prompt alike: ten things are known, not a hundred"
    alike = [vote(p, "ab"[p % 2]) | dict(pair=f"{p:08x}.{s:08x}") for p in range(10) for s in range(10)]
    apart = [vote(p * 10 + s, "ab"[p % 2]) for p in range(10) for s in range(10)]
    width = lambda v: np.ptp(win_rates(v)["appeal"]["prompts"])
    assert 2.5 < width(alike) / width(apart) < 4


def simulated(rng, prompts, raters, p, spread, ties):
    "Votes of raters who prefer A with probability `p` on average"
    of_prompt = p + spread * rng.choice([-1, 1], prompts)
    wins, tie = rng.random((raters, prompts)) < of_prompt, rng.random((raters, prompts)) < ties
    left = rng.choice(["a", "b"], (raters, prompts))
    return [vote(i, "tie" if tie[r, i] else "a" if wins[r, i] else "b", str(r), left=left[r, i])
            for r in range(raters) for i in range(prompts)]


@pytest.mark.parametrize("kw, which", [
    (dict(prompts=200, raters=1, p=.6, spread=0., ties=0.), ("wilson", "prompts")),
    (dict(prompts=120, raters=2, p=.526, spread=0., ties=.2), ("wilson", "prompts")),
    (dict(prompts=120, raters=3, p=.65, spread=.3, ties=.1), ("prompts",))],
    ids=["one rater", "ties", "prompts differ"])
def test_intervals_cover_the_known_preference(kw, which):
    rng, hit = np.random.default_rng(1), Counter()
    for s in range(STUDIES):
        got = win_rates(simulated(rng, **kw), draws=400, seed=s)["appeal"]
        for k in which: hit[k] += got[k][0] <= kw["p"] <= got[k][1]
    print({k: hit[k] / STUDIES for k in which})
    for k in which: assert abs(hit[k] / STUDIES - .95) <= .02, (k, hit[k] / STUDIES)


def test_position_bias_is_found_and_not_invented():
    rng, false = np.random.default_rng(0), 0
    for s in range(400):
        false += position_bias(simulated(rng, 100, 1, .7, 0., .1))["appeal"]["p"] < .05
    assert false / 400 < .08
    sides = rng.choice(["a", "b"], 100)
    lazy = [vote(i, s, left=s) if i % 10 < 7 else vote(i, "b" if s == "a" else "a", left=s) for i, s in enumerate(sides)]
    assert position_bias(lazy)["appeal"] == dict(left=70, votes=100, p=pytest.approx(7.85e-5, rel=.01))
    assert position_bias([])["appeal"]["p"] is None


def test_agreement():
    same = [vote(i, "ab"[i % 2], r) for i in range(6) for r in "xy"]
    assert agreement(same)["appeal"] == 1 and agreement(same)["text"] is None
    assert agreement([vote(i, "a") for i in range(6)])["appeal"] is None            # nobody to agree with
    rng = np.random.default_rng(0)
    chance = [vote(i, str(rng.choice(["a", "b"])), r) for i in range(500) for r in "xyz"]
    assert abs(agreement(chance)["appeal"]) < .06


def test_consistency():
    votes = [vote(0, "a"), vote(0, "a", rep=1, left="b"), vote(1, "a"), vote(1, "b", rep=1), vote(2, "b", rep=1),
             vote(3, "tie"), vote(3, "tie", rep=1), vote(0, "b", "other", rep=1)]
    got = consistency(votes)["appeal"]
    assert (got["same"], got["shown"]) == (2, 3) and got["wilson"][0] < 2 / 3 < got["wilson"][1]
    assert consistency(votes)["text"] == dict(same=0, shown=0, wilson=None)


# --- report ----------------------------------------------------------------------------------------

def test_report(study, tmp_path, capsys):
    pairs, page = study
    rows = [rating(study, rater=r, pair=p.id, question=q, choice=1) for r in ("x", "y") for p in pairs for q in ("appeal", "text")]
    path = as_csv(tmp_path / "r.csv", rows + [rating(study, rater="\x1b[2J<b>")])
    got = rate_report(path, page, ("new", "old"))
    assert got["raters"] == 2 and got["votes"] == 16 and len(got["dropped"]) == 1
    assert got["questions"]["appeal"]["a"] == 8 and got["questions"]["preference"]["rate"] is None
    json.dumps(got)
    print_report(got)
    out = capsys.readouterr().out
    assert "win rate of new over old" in out and "preference: no votes" in out and "\x1b" not in out
    assert len(rate_plot(got).axes) == 2


def test_fast_answers_are_left_out_and_reported(study, tmp_path, capsys):
    pairs, page = study
    times = dict(ann=(.1, .49, .5, 3), bob=(.2, .2, .2, .2), cleo=(2, 2, 2, 2))
    rows = [rating(study, rater=r, pair=p.id, seconds=s) for r, some in times.items() for p, s in zip(pairs, some)]
    path = as_csv(tmp_path / "r.csv", rows)
    got = rate_report(path, page)
    assert got["fast"] == dict(min_seconds=.5, answers=6, raters=dict(ann=2, bob=4))
    assert (got["votes"], got["raters"], got["seconds"], got["questions"]["appeal"]["a"]) == (6, 2, 2., 6)
    print_report(got)
    assert "median answer time 2.0 s; 6 answers under 0.5 s left out (ann 2, bob 4)" in capsys.readouterr().out
    assert rate_report(path, page, min_seconds=0)["votes"] == 12
    print_report(rate_report(path, page, min_seconds=0))
    assert "0 answers under 0 s left out\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="every answer in these files took less than 9 s"): rate_report(path, page, min_seconds=9)
    for bad in (-1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="min_seconds is .*: give 0 or more seconds"): without_fast([], bad)
    for bad in (-1, 61, float("nan")):
        with pytest.raises(UserError, match="view is .*: give 0 to 60 seconds"): make_page(pairs, tmp_path / "x.html", view=bad)
