"The commands `vbench`, `generate`, `rate` and `list`"
import csv

import pytest
import torch
from test_vbench import results, table, written

from t2v_turbo.cli import main
from t2v_turbo.core import write_video
from t2v_turbo.rate import COLUMNS, _study_id, find_pairs
from t2v_turbo.vbench import published


def test_vbench_check(tmp_path, capsys):
    assert main(["vbench", "check", str(table(tmp_path / "t.csv", published()))]) == 0
    assert main(["vbench", "check", str(table(tmp_path / "t.csv", published(), aesthetic_quality="56.39"))]) == 1
    assert "ModelScope" in capsys.readouterr().out
    assert main(["vbench", "check"]) == 0
    assert main(["vbench", "check", str(tmp_path / "no.csv")]) == 2 and "cannot read" in capsys.readouterr().err
    with pytest.raises(SystemExit): main(["vbench"])


def test_vbench_score(tmp_path, capsys):
    path = written(tmp_path / "mine_eval_results.json", results())
    assert main(["vbench", "score", str(path)]) == 0
    out = capsys.readouterr().out
    assert "**mine**" in out and "[" in out and "T2V-Turbo(VC2,4step)" in out
    short = written(tmp_path / "short.json", dict(scene=[.4, []]))
    assert main(["vbench", "score", str(short)]) == 2
    assert main(["vbench", "score", str(short), "--zero_missing"]) == 0
    few = {d: [s, v[:5] if d == "scene" else v] for d, (s, v) in results().items()}                    # a single prompt
    capsys.readouterr()
    assert main(["vbench", "score", str(written(tmp_path / "few.json", few))]) == 0
    out = capsys.readouterr().out
    assert "**few**" in out and "no intervals: few lists videos of fewer than two prompts for scene" in out and "[" not in out
    assert main(["vbench", "check", "--tol", "nan"]) == 2 and "tol is nan: give percent points" in capsys.readouterr().err


def test_generate(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red fish moving left in the sea\na blue cat growing in the meadow\n")
    call = ["generate", "--suite", "evalcrafter", "--prompts", str(tmp_path / "p.txt")]
    assert main([*call, "--out", str(tmp_path / "s"), "--steps", "1"]) == 0
    assert main([*call, "--out", str(tmp_path / "t"), "--teacher", "tiny", "--steps", "2"]) == 0
    assert sorted(p.name for p in (tmp_path / "s/videos").iterdir()) == ["0000.mp4", "0001.mp4"]
    assert main([*call, "--out", str(tmp_path / "s"), "--steps", "2"]) == 2
    assert main(["generate", "--prompts", str(tmp_path / "no")]) == 2
    assert main([*call, "--steps", "20"]) == 2 and main([*call, "--student", "x", "--teacher", "tiny"]) == 2
    assert main(["generate"]) == 2
    assert [p.caption for p in find_pairs(tmp_path / "s", tmp_path / "t")] == ["a red fish moving left in the sea", "a blue cat growing in the meadow"]


def test_rate(tmp_path, capsys):
    for k in "ab":
        (tmp_path / k).mkdir()
        for i in range(4):
            write_video(tmp_path / k / f"a cat-{i}.mp4", torch.rand(3, 4, 32, 32))
    a, b, out = [str(tmp_path / x) for x in ("a", "b", "s.html")]
    assert main(["rate", "make", a, b, out]) == 0 and "4 pairs" in capsys.readouterr().out
    pairs = find_pairs(a, b)
    with open(tmp_path / "r.csv", "w", newline="") as f:
        t = csv.DictWriter(f, COLUMNS); t.writeheader()
        for p in pairs: t.writerow(dict(study=_study_id(pairs), rater="x", pair=p.id, question="text", rep=0, left="a", choice=1, seconds=1))
    assert main(["rate", "report", str(tmp_path / "r.csv"), "--page", out, "--names", "new,old", "--out", str(tmp_path / "o")]) == 0
    assert "win rate of new over old" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["ratings.json", "ratings.png"]
    assert main(["rate", "report", str(tmp_path / "r.csv")]) == 0 and "unknown pairs were not" in capsys.readouterr().out
    assert main(["rate", "report", str(tmp_path / "r.csv"), "--min_seconds", "2"]) == 2 and "took less than 2.0 s" in capsys.readouterr().err
    assert main(["rate", "make", a, b, out, "--view", "5"]) == 0 and '"view": 5.0' in (tmp_path / "s.html").read_text()
    assert main(["rate", "make", a, b, out, "--view", "-1"]) == 2 and "view is -1.0: give 0 to 60 seconds" in capsys.readouterr().err
    assert main(["rate", "report", out]) == 2 and main(["rate", "make", a, str(tmp_path / "c"), out]) == 2
    assert main(["rate", "report", str(tmp_path / "r.csv"), "--names", "x"]) == 2


def test_rate_takes_the_folders_of_sample(tmp_path, capsys):
    "Prompts that no file name can hold come back from `videos.csv`; another prompt joins it; another table is kept"
    texts = ["a red fish moving left in the sea", 'a "blue" cat, growing/shrinking', "a green car 66"]
    (tmp_path / "p.txt").write_text("\n".join(texts))
    for out, steps in (("a", "1"), ("b", "2")):
        assert main(["sample", "--prompts", str(tmp_path / "p.txt"), "--steps", steps, "--out", str(tmp_path / out)]) == 0
    a, b = tmp_path / "a", tmp_path / "b"
    assert [p.caption for p in find_pairs(a, b)] == texts
    assert main(["rate", "make", str(a), str(b), str(tmp_path / "s.html")]) == 0 and "3 pairs" in capsys.readouterr().out
    assert main(["sample", "--prompt", "a purple fish growing in the sea", "--seed", "7", "--steps", "1", "--out", str(a)]) == 0
    rows = list(csv.DictReader(open(a / "videos.csv", newline="")))
    assert [(r["prompt"], r["seed"]) for r in rows] == [*zip(texts, "012"), ("a purple fish growing in the sea", "7")]
    assert sorted(r["file"] for r in rows) == sorted(p.name for p in a.glob("*.mp4"))
    (b / "videos.csv").write_text("id,url\n1,x\n")
    assert main(["sample", "--student", "none", "--out", str(b)]) == 2
    assert "is no table of file, prompt, seed: give another" in capsys.readouterr().err and (b / "videos.csv").read_text() == "id,url\n1,x\n"


def test_list(capsys, monkeypatch):
    "Every name of the four tables, with what the tables know of it; memory is that of the package's table, see test_fit"
    from t2v_turbo import fit
    from t2v_turbo.names import STUDENTS, TEACHERS
    from t2v_turbo.recipes import RECIPES
    from t2v_turbo.rewards.names import FACTS
    from t2v_turbo.using import _gb
    sizes, weights = fit.read_table()["sampling"], {n: _gb(r["weights"]) for n, r in fit.read_table()["rewards"].items()}
    assert main(["list"]) == 0
    lines, rows = capsys.readouterr().out.splitlines(), {}
    for line in filter(str.strip, lines): rows.setdefault(line.split()[0], line)               # `tiny` is a recipe, too
    assert {*TEACHERS, *STUDENTS, *FACTS, *RECIPES} <= rows.keys()
    for n, s in (TEACHERS | STUDENTS).items():
        assert s.licence in rows[n] and s.at in rows[n] and f" {_gb(sizes[getattr(s, 'teacher', n)])} " in rows[n]
    assert " 0.2 GB " in rows["t2v-turbo-ms"] and all(f.licence in rows[n] and f.weights in rows[n] and f" {weights[n]} " in rows[n] for n, f in FACTS.items())
    assert {f"{n:25}{r.about}" for n, r in RECIPES.items()} <= {*lines}
    monkeypatch.setattr(fit, "read_table", dict)
    assert main(["list"]) == 2 and "install t2v_turbo again" in capsys.readouterr().err
