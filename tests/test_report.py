"The report of a run: one that was killed, of a real layout with random weights, and what the page says of it"
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from t2v_turbo.card import licence_of, model_card
from t2v_turbo.charts import LEFT, PANELS, RIGHT, WIDE, chart, charts_of
from t2v_turbo.cli import main
from t2v_turbo.core import make_gen
from t2v_turbo.files import UserError, write_json
from t2v_turbo.provenance import git_state, note_launch, read_launches, resume_command
from t2v_turbo.report import Live, page, write_films, write_report
from t2v_turbo.runs import by_caption, read_run, seconds_of, verdict
from t2v_turbo.sheets import LONGEST, SIDE, small_frames, write_sheet
from t2v_turbo.standins import tiny_modelscope
from t2v_turbo.train import Config, Objective, Trainer
from t2v_turbo.watch import WatchOptions, evidence, hacked, watch

CAPTIONS = ["a red fish moving left in the sea", "a blue car moving up in the desert"]
KILLED = """
import os, signal, sys
from t2v_turbo.cli import main
from t2v_turbo.train import Trainer
whole = Trainer.one_step
def one_step(self, feed):
    if self.step == 5: os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, feed)
Trainer.one_step = one_step
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "A run of ModelScopeT2V's layout with random weights, killed in its sixth step; plain CD of the same teacher beside it"
    at = tmp_path_factory.mktemp("killed")
    teacher = str(tiny_modelscope(at / "ms"))
    small = dict(teacher=teacher, frames=8, height=32, width=32, batch=2, rank=2, track="")
    for _ in Trainer(Config(out=str(at / "cd"), steps=1, objective=Objective(beta_img=0., beta_vid=0.), **small)).fit(): pass
    (at / "p.txt").write_text("\n".join(CAPTIONS))
    words = ["--teacher", teacher, "--frames", 8, "--height", 32, "--width", 32, "--batch", 2, "--rank", 2, "--track", "", "--reward", "tiny-image", "--beta_vid", 0,
             "--held_out", "tiny-video", "--prompts", at / "p.txt", "--clips_each", 2, "--eval_every", 2, "--save_every", 2, "--steps", 200, "--teacher_look", 2,
             "--reference", at / "cd/student", "--out", at / "turbo"]
    run = subprocess.run([sys.executable, "-c", KILLED, "distill", *map(str, words)], cwd=at, capture_output=True, text=True, timeout=900,
                         env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"})
    assert run.returncode == -signal.SIGKILL, run.stderr[-3000:]
    assert "cannot be written" not in run.stderr, run.stderr[-3000:]
    return at / "turbo"


class Reader(HTMLParser):
    "Elements, attributes and what is not closed"
    VOID = {"meta", "link", "input", "br", "img"}

    def __init__(self, html):
        super().__init__()
        self.open, self.seen, self.wrong = [], [], []
        self.feed(html); self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID: self.open.append(tag)

    def handle_startendtag(self, tag, attrs): self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag: self.wrong.append((tag, self.open[-3:]))
        else: self.open.pop()


def test_a_killed_run_has_its_report(killed):
    "What the issue lists, in the page that the run itself left behind"
    html = (killed / "report.html").read_text(encoding="utf-8")
    assert "Running, step 4 of 200" in html                                    # written at the last look, before the kill
    for title in ("Loss", "Terms of the rewards", "Rewards of training clips", "Gradient norm, before clipping", "Learning rate", "Rewards at looks",
                  "Held-out reward at looks", "Motion", "Diversity", "Distance from plain CD", "Peak memory", "Time of a step", "Time of its parts"):
        assert f"<figcaption>{title}" in html, title
    assert "No verdict on reward hacking" in html and "two blocks of 4 looks, and this run has 3" in html
    assert re.search(r"Motion at the last look: [\d.]+ grey levels, \d+ % of the teacher&#39;s", html) and "Diversity at the last look" in html
    for caption in CAPTIONS:
        for what in ("student, step 4", "teacher, 2 steps", "plain CD", "step 0", "other noise 1"): assert f'aria-label="{what}: {caption}"' in html or f'aria-label="{what}"' in html, what
    for part in ("teacher", "student", "target", "backward", "update", "decode", "image reward"): assert f"<tr><td>{part}</td>" in html, part
    assert 'href="checkpoints/step-00000004.pt"' in html and 'href="student"' in html
    assert f"t2v-turbo distill --config {killed} --out {killed}" in html and "--held_out tiny-video" in html      # resume, and the exact command
    for key in ("torch", "diffusers", "processor cores", "GPUs", "<h3>Git</h3>", "at step 0, version"): assert key in html, key
    about = json.loads((killed / "looks/about.json").read_text())
    assert about["captions"] == CAPTIONS * 2 and [o["name"] for o in about["others"]] == ["teacher, 2 steps", "plain CD"]
    assert len(html) < 600_000, len(html)
    card = (killed / "student/README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert (front["pipeline_tag"], front["library_name"], front["license"]) == ("text-to-video", "t2v_turbo", "other") and "lora" in front["tags"]
    beta = json.loads((killed / "settings.json").read_text())["settings"]["beta_img"]
    assert f"| beta_img | {beta} |" in card and "| reward | tiny-image |" in card and "No verdict on reward hacking" in card and "| held out |" in card
    assert "# A 4-step student of ms\n" in card and str(killed.parent) not in card             # no folder of this machine


def test_the_page_can_be_made_again(killed, capsys):
    "By the command, with the step that the live page did not see, and the clips worst first"
    assert main(["report", str(killed)]) == 0 and "report.html" in capsys.readouterr().out
    html = (killed / "report.html").read_text(encoding="utf-8")
    assert "Not running, step 5 of 200" in html
    run = read_run(killed)
    order = [c["caption"] for c in by_caption(run)]
    assert re.findall(r"<h3>(a [^<]+)</h3>", html) == order
    means = {c: sum(run.looks[-1]["each"]["held_out"][i] for i in (n, n + 2)) / 2 for n, c in enumerate(CAPTIONS)}
    assert order == sorted(means, key=means.get)
    parts = seconds_of(run)
    assert sum(share for _, share in parts.values()) == pytest.approx(1) and set(parts) >= {"backward", "wait for data", "the rest"}
    assert all(r["lr"] == Config(teacher=run.settings["teacher"]).lr for r in run.log)
    with pytest.raises(UserError, match="no run in"): write_report(killed / "nowhere")


def test_one_well_formed_file(killed):
    html = write_report(killed).read_text(encoding="utf-8")
    found = Reader(html)
    assert not found.wrong and not found.open, (found.wrong[:5], found.open)
    for tag, attrs in found.seen:
        for k in ("src", "href", "data", "poster", "action"):
            v = attrs.get(k) or "#"
            assert v.startswith(("data:", "#")) or (tag == "a" and (killed / v).exists()), (tag, k, v[:80])
    assert not re.search(r"@import|url\((?!data:)", html)
    ids = [a["id"] for _, a in found.seen if "id" in a]
    assert len(ids) == len(set(ids)) and {a["href"][1:] for t, a in found.seen if t == "a" and a["href"].startswith("#")} <= set(ids)
    assert all(a.get("aria-label") for _, a in found.seen if a.get("role") in ("img", "slider"))


@pytest.fixture
def visit(browser, killed):
    "Open the report from its file; `page.wrong` collects errors and requests"
    write_report(killed)
    contexts = []
    def visit(**kw):
        context = browser.new_context(**(dict(viewport=dict(width=1280, height=900)) | kw)); contexts.append(context)
        page = context.new_page(); page.wrong = []
        page.on("pageerror", lambda e: page.wrong.append(str(e)))
        page.on("console", lambda m: page.wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("request", lambda r: page.wrong.append(r.url) if not r.url.startswith(("data:", (killed / "report.html").as_uri())) else None)
        page.goto((killed / "report.html").as_uri())
        return page
    yield visit
    for c in contexts: c.close()


def test_the_numbers_under_the_pointer_are_those_of_the_log(visit, killed):
    log, p = read_run(killed).log, visit()
    loss = p.locator(".chart").filter(has=p.locator("figcaption", has_text=re.compile("^Loss$")))
    box = loss.locator(".plot svg").bounding_box()
    for row in log:
        share = (row["step"] - 1) / (len(log) - 1)
        p.mouse.move(box["x"] + box["width"] * (LEFT + (WIDE - LEFT - RIGHT) * share) / WIDE, box["y"] + 60)
        told = [float(t) for t in loss.locator("output").all_inner_texts()]
        assert told == pytest.approx([row["loss"], row["cd"]], rel=1e-5), row["step"]
        assert loss.locator(".step").inner_text() == f"at step {row['step']}"
        norm = p.locator(".chart").filter(has=p.locator("figcaption", has_text="Gradient norm")).locator("output").inner_text()
        assert float(norm) == pytest.approx(row["grad_norm"], rel=1e-5)          # all charts follow
    plot = loss.locator(".plot"); plot.focus()
    p.keyboard.press("Home"); p.keyboard.press("ArrowRight")
    assert plot.get_attribute("aria-valuetext").startswith("step 2: loss ") and float(loss.locator("output").first.inner_text()) == pytest.approx(log[1]["loss"], rel=1e-5)
    assert not p.wrong, p.wrong


def test_looks_play_in_step_and_can_be_chosen(visit, killed):
    p, run = visit(), read_run(killed)
    frame = "getComputedStyle(document.documentElement).getPropertyValue('--f')"
    before = p.evaluate(frame)
    p.wait_for_function(f"{frame} !== '{before}'")
    p.locator("#play").click()
    assert p.locator("#play").inner_text() == "Play"
    p.locator("#frame").fill("3")
    places = p.evaluate("[...new Set([...document.querySelectorAll('.clip')].map(e => getComputedStyle(e).backgroundPositionX))]")
    assert places == [f"{300 / 7:.4f}%"] or len(places) == 1, places             # student, teacher and plain CD show one frame
    p.locator("#look").focus(); p.keyboard.press("Home")
    worst = by_caption(run)[0]
    mine = p.locator(".caption").first.locator(".mine .clip")
    assert "s0" in mine.get_attribute("class").split() and mine.get_attribute("aria-label") == f"student, step 0: {worst['caption']}"
    assert float(p.locator(".caption").first.locator("[data-score='held out']").inner_text()) == pytest.approx(worst["scores"][0]["held_out"], rel=6e-3)
    p.locator(".caption").first.locator("[data-look='1']").click()
    assert p.locator("#at").inner_text() == "step 2" and "s2" in mine.get_attribute("class").split()
    assert not p.wrong, p.wrong


def test_on_a_phone_in_the_dark_in_print_and_without_motion(visit):
    for kw in (dict(viewport=dict(width=390, height=844)), dict(color_scheme="dark")):
        p = visit(**kw)
        assert p.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0 and not p.wrong
    lightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, v) => a + +v, 0)"
    assert p.evaluate(lightness) < 200 < 600 < visit(color_scheme="light").evaluate(lightness)
    p.emulate_media(media="print")
    assert p.locator(".controls").is_hidden() and p.locator("#verdict").is_visible()
    p = visit(reduced_motion="reduce")
    assert p.locator("#play").inner_text() == "Play"
    p.wait_for_timeout(300)
    assert p.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--f')").strip() == "0"


# ---- live

def test_written_at_looks_and_checkpoints_alone_and_by_the_main_process(tmp_path):
    "Four steps, a look at every second, a save at every third"
    (tmp_path / "p.txt").write_text(CAPTIONS[0])
    t = Trainer(Config(out=str(tmp_path / "o"), steps=4, batch=1, rank=2, track="", save_every=3, objective=Objective(beta_img=0., beta_vid=0.)))
    written, looked = [], []
    live = SimpleNamespace(look=lambda w: looked.append(t.step), page=lambda state="": written.append((t.step, state)))
    watch(t, WatchOptions(eval_every=2, prompts=str(tmp_path / "p.txt")), live)
    assert looked == [0, 2, 4]
    assert written == [(0, ""), (0, ""), (2, ""), (3, ""), (4, ""), (4, "trained")]


def trainer_at(out, **more):
    acc = SimpleNamespace(is_main_process=True)
    return SimpleNamespace(**dict(cfg=SimpleNamespace(out=str(out), steps=9), step=3, accelerator=acc, sharded=False) | more)


def test_a_page_that_cannot_be_written_ends_no_training(tmp_path):
    live = Live(trainer_at(tmp_path / "gone"), WatchOptions())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        live.page(); live.page(); live.look(SimpleNamespace())
    assert len(told) == 1 and "t2v-turbo report" in str(told[0].message)


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path):
    taught, acc = [], SimpleNamespace(is_main_process=False)
    live = Live(trainer_at(tmp_path, accelerator=acc, sharded=True), WatchOptions())
    for _ in range(2): live.look(SimpleNamespace(prompts=["a"], teach=lambda: taught.append(1)))
    assert taught == [1] and not [*tmp_path.iterdir()]                           # its part of a sharded teacher, once


# ---- what a page says

def run_of(folder, **settings):
    write_json(Path(folder) / "settings.json", dict(settings=dict(teacher="tiny", patience=4, **settings)))
    return Path(folder)


def test_torn_and_missing_files(tmp_path):
    out = run_of(tmp_path / "o", steps=9)
    (out / "log.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    (out / "looks.jsonl").write_text("[]\n"); (out / "launches.json").write_text("{"); (out / "results.json").write_text("3")
    run = read_run(out)
    assert (run.step, run.looks, run.launches, run.results) == (2, [], [], [])
    html = page(run)
    assert "Not running, step 2 of 9" in html and "no <code>launches.json</code>" in html and not Reader(html).wrong
    (out / "log.jsonl").unlink()
    assert "No step is finished yet" in page(read_run(out))


def test_captions_and_settings_are_text(tmp_path):
    out, bad = run_of(tmp_path / "o", reward="</script><b>"), "</h3><script>alert(1)</script>"
    clips = torch.rand(1, 3, 4, 8, 8, generator=make_gen(0))
    sheet = write_sheet(out / "looks/step-00000000.webp", clips)
    write_json(out / "looks/about.json", dict(captions=[bad], seconds=1., others=[], **sheet))
    (out / "looks.jsonl").write_text(json.dumps(dict(step=0, each=dict(held_out=[1.]))) + "\n")
    html = page(read_run(out))
    assert "alert(1)" in html and "<script>alert" not in html and "<b>" not in html.split("</style>")[1].split('id="data"')[0].replace("<b data-score", "")
    assert html.count("</script>") == 2
    with pytest.raises(UserError, match="'cd' has 1 clips for 2 prompts"): write_films(out, ["a", "b"], {"cd": clips})


def test_the_evidence_is_that_of_the_rule():
    gen = make_gen(1)
    for _ in range(40):
        held = torch.randn(11, generator=gen).cumsum(0).tolist()
        rows = [dict(step=i, each=dict(held_out=[h], trained=[float(i)])) for i, h in enumerate(held)]
        told = evidence(rows)
        assert (hacked(rows) is not None) == told["hacked"] == (told["p"] < 11**-3.)
    flat = [dict(step=i, each=dict(held_out=[0.], trained=[float(i)])) for i in range(9)]
    assert evidence(flat)["hacked"] is False and evidence(flat)["p"] == 1             # looks that never change


def test_a_hacked_run_says_so(tmp_path):
    from test_watch import BAD, looks
    rows = looks(BAD, range(13), .01)
    out = run_of(tmp_path / "o", beta_img=1., beta_vid=0.)
    (out / "looks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    told = verdict(read_run(out))
    assert told["kind"] == "hacked" and told["title"] == "Reward hacking since step 6"
    html = page(read_run(out))
    assert 'class="verdict hacked"' in html and "the rule requires p &lt; 0.00046" in html
    assert "**Reward hacking since step 6.**" in model_card(read_run(out))


def test_charts_by_hand():
    rows = [dict(step=i, loss=float(i), cd=None if i == 2 else 1., lr=0.) for i in range(5)]
    c, = charts_of(rows, [])
    assert c["title"] == "Loss" and [n["name"] for n in c["lines"]] == ["loss", "consistency loss"] and c["lines"][1]["numbers"] == [1., 1., None, 1., 1.]
    assert c["x"] == [58, 146, 234, 322, 410] and c["lines"][1]["path"].count("M") == 2          # a gap
    judged, = charts_of([], [dict(step=i, noun=1., look=0.) for i in (0, 50)])
    assert [n["name"] for n in judged["lines"]] == ["noun", "look"]                            # a judge's zero is a result
    many = [dict(step=i, loss=1. + i) for i in range(10_000)]
    big = chart(PANELS[0], many)
    assert len(big["steps"]) == 600 and (big["steps"][0], big["steps"][-1]) == (0, 9999) and big["log"] and big["lines"][0]["mean"]
    assert len(chart(PANELS[0], many[:1])["lines"][0]["path"]) > 3                               # one point is a dot


def test_sheets(tmp_path):
    wide = small_frames(torch.rand(1, 3, 81, 60, 200, generator=make_gen(0)))
    assert wide.shape == (1, 16, 48, SIDE, 3)
    many = write_sheet(tmp_path / "a.webp", torch.zeros(600, 3, 2, 32, 8))
    assert many["clips"] == LONGEST // 32


def test_provenance(tmp_path, monkeypatch):
    assert git_state(tmp_path) == {}
    monkeypatch.setattr(sys, "orig_argv", ["t2v-turbo", "distill", "--out", "a b"])
    note_launch(tmp_path, 7, 8, True)
    row, = read_launches(tmp_path)
    assert row["command"] == "t2v-turbo distill --out 'a b'" and (row["step"], row["processes"]) == (7, 8)
    assert row["resume"] == resume_command(tmp_path, 8, True) and "configs/fsdp2.yaml" in row["resume"] and "--multi_gpu" in resume_command("o", 2)
    assert not {"HOME", "PATH"} & set(json.dumps(row).split('"'))


def test_licences():
    assert licence_of("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")[0] == "apache-2.0" and licence_of("")[0] == "other"
