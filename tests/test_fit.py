"The table that `plan` and `list` answer from, and the page that adds it up: the same numbers as the prediction, and quick"
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from t2v_turbo import cli, fit
from t2v_turbo.fit import GB, SWITCHES, Asked, asked, looked_up, read_table, rows_of_table
from t2v_turbo.fit_page import MADE_OF, SPEED, fit_page, page_data, switches_of_page
from t2v_turbo.memory import savings_of
from t2v_turbo.pieces import asked_of, facts_of, pieces_of
from t2v_turbo.plan import (
    TEACHERS,
    Setup,
    model_on_meta,
    plan_sampling,
    planned_defaults,
    predict,
    reward_on_meta,
    weights_of,
)
from t2v_turbo.rewards.names import FACTS, kind_of_reward
from t2v_turbo.running import for_distill
from t2v_turbo.using import listed_models, listed_rewards

KEPT = dict(denoiser=False, decode=0, save_rewards=False)


def same(got, whole, latent=0):
    "To the byte, but for `latent` bytes of a pair: where they are freed in backward is not in the parts"
    if (got.weights, list(got.phases)) != (whole.weights, list(whole.phases)): return False
    peaks = [(got.peak, whole.peak), *((got.phases[k]["peak"], v["peak"]) for k, v in whole.phases.items())]
    return all(abs(a - b) in (0, latent) for a, b in peaks) and all(got.phases[k] | dict(peak=0) == v | dict(peak=0) for k, v in whole.phases.items())


def latent_of(model): return 4 * math.prod(model.student.teacher.latent_shape)


# ---- the table is of today ----------------------------------------------------------------------

def test_rows_of_the_tiny_teacher(monkeypatch):
    "A number that is not of today is noticed"
    rows, base = rows_of_table("tiny"), Setup("tiny")
    assert [n for n, _ in rows] == [n for n, _ in SWITCHES]
    for i in (1, 4, 7):
        on = {k: v for _, more in SWITCHES[:i + 1] for k, v in more.items()}
        whole = predict(replace(base, **on | dict(dtype=torch.bfloat16)))
        assert same(rows[i][1], whole, (i == 7) * latent_of(model_on_meta(base))), rows[i][0]
        if i == 4: fourth = whole
    t = json.loads(json.dumps(read_table()))
    t["pieces"][asked("tiny").keys()["decode"]]["forward"][0][0] += 1
    monkeypatch.setattr(fit, "read_table", lambda: t)
    assert same(rows[4][1], fourth) and not same(rows_of_table("tiny")[4][1], fourth)


@pytest.mark.parametrize("row", [0, 1, 4, 6])
def test_rows_of_modelscope(row):
    name, got = rows_of_table("modelscope")[row]
    on = {k: v for _, more in SWITCHES[:row + 1] for k, v in more.items()}
    assert same(got, predict(Setup("modelscope", **on | dict(dtype=getattr(torch, on["dtype"]))))), name


@pytest.mark.parametrize("teacher, switches", [("videocrafter2", dict(denoiser=True, decode=0, save_rewards=True, cached="latents")),
                                               ("wan2.1-1.3b", dict(denoiser=True, decode=1, save_rewards=False, cached="pairs")),
                                               ("wan2.2-5b", dict(denoiser=True, decode=1, save_rewards=True, cached="latents")),
                                               ("sana-2b", dict(denoiser=True, decode=0, save_rewards=True, cached=""))])
def test_a_sample_of_large_teachers(teacher, switches):
    "Switches that no measurement had together: the parts of several steps make one"
    got = looked_up(asked(teacher, **switches))
    if got is None: pytest.skip(f"{teacher} is not in the table yet: python tools/plan_table.py")
    whole = predict(Setup(teacher, **switches))
    assert got.weights == whole.weights and got.phases.keys() == whole.phases.keys()
    assert got.total == pytest.approx(whole.total, rel=5e-4)    # with the teacher's answers cached, a noisy latent more or less and got.highest == whole.highest
    for k, v in whole.phases.items(): assert got.phases[k]["flops"] == v["flops"], k


def test_parts_of_different_steps_make_one(monkeypatch):
    "Measured all kept and all saved; asked for a mixture, with one reward and with none"
    pieces, base = {}, Setup("tiny", ("tiny-image",), dtype=torch.bfloat16)
    for s in (replace(base, **KEPT), replace(base, cached="latents"), replace(base, rewards=())): pieces |= pieces_of(s)
    pieces |= pieces_of(replace(base, cached="pairs"), head=True)
    monkeypatch.setattr(fit, "read_table", lambda: dict(pieces=pieces))
    for s in (replace(base, decode=0), replace(base, save_rewards=False, cached="latents"), replace(base, denoiser=False, cached="pairs"), replace(base, rewards=(), cached="pairs")):
        model = model_on_meta(s)
        got, true = looked_up(asked_of(s, model)), predict(s)
        assert same(got, true, (s.cached == "pairs") * latent_of(model)), s
    lacks = asked_of(base, model_on_meta(base))
    assert looked_up(replace(lacks, batch=2)) is None and looked_up(None) is None


def test_facts_of_the_table():
    t = read_table()
    assert t["teachers"].keys() == {"tiny", *TEACHERS} and t["rewards"].keys() == FACTS.keys()
    for n, (_, frames, size) in TEACHERS.items():
        own = planned_defaults(n)
        assert (t["teachers"][n]["frames"], tuple(t["teachers"][n]["size"]), t["teachers"][n]["rank"], t["teachers"][n]["image_frames"]) == (
            frames, size, own.rank, own.image_frames)
    assert all(t["rewards"][n]["kind"] == kind_of_reward(n) for n in FACTS)
    assert t["teachers"]["tiny"] == facts_of("tiny")
    for n in ("tiny-video", "viclip-b16"): assert t["rewards"][n]["weights"] == weights_of(reward_on_meta(n))
    assert all(rows_of_table(n) for n in ("tiny", "modelscope")), "run python tools/plan_table.py"


def test_the_list_is_of_today():
    "Names, licences and sources always; memory of sampling for the tiny teacher, the others have the slow test below"
    t = read_table()
    assert t["list"] == [*listed_models(t["sampling"]), *listed_rewards({n: r["weights"] for n, r in t["rewards"].items()})]
    assert t["sampling"]["tiny"] == plan_sampling("tiny").total


def test_memory_of_sampling_in_the_list():
    assert read_table()["sampling"]["modelscope"] == plan_sampling("modelscope").total


# ---- the commands -------------------------------------------------------------------------------

@pytest.mark.skipif(not hasattr(os, "wait4"), reason="no times of a process")
@pytest.mark.parametrize("words", [["plan"], ["list"], ["plan", "--teacher", "tiny", "--gpu", "8"]], ids=" ".join)
def test_two_seconds_at_most(words):
    "CPU time of the whole command, imports and all: neither brings PyTorch"
    code = f"import sys; from t2v_turbo import cli; assert cli.main({words!r}) == 0; assert not {{'torch', 'diffusers', 'transformers'}} & sys.modules.keys()"
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(p.pid, 0)
    p.returncode = status
    assert status == 0 and used.ru_utime + used.ru_stime < 2


@pytest.mark.parametrize("more", [["--image_frames", "1"], ["--lora_dropout", "0.1"], ["--batch", "3"], ["--frames", "4"]], ids=" ".join)
def test_what_the_table_lacks_is_predicted(more, capsys, monkeypatch):
    rows, seen = rows_of_table("tiny"), []
    monkeypatch.setattr("t2v_turbo.plan.plan_rows", lambda *names, **options: seen.append(options) or rows)
    assert cli.main(["plan", "--teacher", "tiny", "--gpu", "2", *more]) == 0
    said = capsys.readouterr()
    assert [str(seen[0][more[0][2:]])] == more[1:]
    assert "plan: not in the table of this package" in said.err and "2 GB are enough as it is" in said.out
    assert cli.main(["plan", "--teacher", "tiny", "--gpu", "2"]) == 0 and len(seen) == 1
    assert capsys.readouterr().err == ""


def test_what_is_asked_for_is_checked():
    assert asked("nowhere") is None and asked("modelscope", ("nothing",)) is None and rows_of_table("nowhere") is None
    with pytest.raises(fit.UserError, match="clipscore is a second image reward"): asked("modelscope", ("hpsv2.1", "clipscore"))
    own = read_table()["teachers"]["wan2.1-1.3b"]
    assert asked("wan2.1-1.3b", frames=13).window == 13 and asked("wan2.1-1.3b").window == own["window"]
    alone = Asked("a", 8, (32, 32), 4)
    assert alone.keys().keys() == {"head", "student"} and alone.keys()["student"].endswith("again alone")


def test_a_table_of_another_layout_is_not_read(monkeypatch, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(read_table() | dict(version=0)))
    monkeypatch.setattr(fit, "TABLE", tmp_path / "plan.json")
    fit.read_table.cache_clear()
    try: assert fit.read_table() == {} and rows_of_table("tiny") is None
    finally: fit.read_table.cache_clear()


# ---- the page -----------------------------------------------------------------------------------

def test_the_page_of_the_site_is_of_today():
    at = os.path.join(os.path.dirname(__file__), "../nbs/tutorials/will_it_fit.ipynb")
    with open(at, encoding="utf-8") as f: outputs = [o for c in json.load(f)["cells"] for o in c.get("outputs", [])]
    assert ["".join(o["data"]["text/html"]) for o in outputs] == [fit_page()], "run nbs/tutorials/will_it_fit.ipynb again"


def test_assumptions_are_those_of_the_recipes():
    from test_recipes import pages
    assert pages.SPEED == SPEED and len(fit_page()) < 400_000


@pytest.fixture(scope="module")
def page(tmp_path_factory, browser):
    "The page as a file in a browser, with all that it reports or asks another host for"
    at = tmp_path_factory.mktemp("page") / "fit.html"
    at.write_text(f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Will it fit?</title><body>{fit_page()}', encoding="utf-8")
    tab = browser.new_page(viewport=dict(width=390, height=800), has_touch=True)
    tab.told = []
    tab.on("pageerror", lambda e: tab.told.append(str(e)))
    tab.on("console", lambda m: tab.told.append(m.text) if m.type == "error" else None)
    tab.on("request", lambda r: tab.told.append(r.url) if not r.url.startswith("file:") else None)
    tab.goto(at.as_uri())
    return tab


def choose(page, **values):
    for n, v in values.items():
        at = page.locator(f"#will-it-fit [name={n}]")
        if isinstance(v, bool): at.set_checked(v)
        elif n == "gpu": at.fill(str(v))
        else: at.select_option(v)


def number(page, name="total"):
    got = page.locator("#will-it-fit").get_attribute(f"data-{name}")
    return got and float(got)


def lines(page): return page.locator("#will-it-fit pre").inner_text().strip().splitlines()


THERE = page_data()["commands"]


@pytest.mark.parametrize("teacher", THERE)
def test_numbers_of_the_page_are_those_of_python(page, teacher):
    "Every row of the plan, chosen by hand"
    for (name, plan), on in zip(rows_of_table(teacher)[1:], switches_of_page()):
        choose(page, teacher=teacher, **on)
        assert number(page) == pytest.approx(plan.total / GB, rel=1e-3), name
        assert number(page, "tflop") == pytest.approx(sum(v["flops"] for v in plan.phases.values()) / 1e12, rel=1e-3)
        assert f"{plan.total / GB:.1f}" in page.locator("#will-it-fit tr.sum td").inner_text() or plan.total / GB < 9.995
    assert not page.told


def test_the_number_of_the_page_is_what_predict_says(page):
    choose(page, teacher="modelscope", denoiser=True, decode=False, save_rewards=True, cached="latents", optimizer=False)
    assert number(page) == pytest.approx(predict(Setup("modelscope", decode=0, cached="latents")).total / GB, rel=1e-6)


def test_fits_or_not_and_the_switches_for_a_gpu(page):
    choose(page, teacher="modelscope", card="16")
    verdict = page.locator("#will-it-fit .verdict")
    assert verdict.inner_text().startswith("Fits: ") and "of 14.5 GB" in verdict.inner_text()      # the switches follow the GPU
    choose(page, decode=not page.locator("#will-it-fit [name=decode]").is_checked())
    choose(page, denoiser=False, decode=False, save_rewards=False, card="24"), choose(page, card="16")
    assert verdict.inner_text().endswith(": press “Set the switches for this GPU”")                # but not those that a person chose
    choose(page, teacher="modelscope", card="24")
    page.get_by_role("button", name="Set the switches").tap()
    assert page.locator("#will-it-fit .verdict").inner_text().startswith("Fits: 20.1 GB of 21.9 GB")
    assert "s a step of 8 clips on a L4" in page.locator("#will-it-fit .time").inner_text()
    choose(page, gpu=9)
    page.get_by_role("button", name="Set the switches").tap()
    told = page.locator("#will-it-fit .verdict").inner_text()
    assert told.startswith("Fits: 7.") and "of 9 GB" in told and "seconds are not predicted" in page.locator("#will-it-fit .time").inner_text()
    choose(page, gpu=4)
    assert verdict.inner_text().startswith("Does not fit") and verdict.inner_text().endswith(", whatever the switches")
    assert len(page.locator("#will-it-fit .bar i").all()) == 7 and not page.told


@pytest.mark.parametrize("teacher", THERE)
@pytest.mark.parametrize("on", [dict(card="16", cached="", denoiser=False, decode=True, save_rewards=False, optimizer=False),
                                dict(card="80", cached="pairs", denoiser=True, decode=True, save_rewards=True, optimizer=True),
                                dict(card="24", cached="latents", image="", denoiser=False, decode=False, save_rewards=False, optimizer=False)], ids=["plain", "all", "one reward"])
def test_the_command_parses(page, teacher, on):
    "With the real parser, into the settings that were chosen"
    choose(page, teacher=teacher, **on)
    *caches, train = lines(page)
    assert len(caches) == 2 * bool(on["cached"])
    for line in caches: assert cli.read(line.split()[1:])[0].name == "cache"
    verb, got = cli.read(train.split()[1:])
    assert verb.name == "distill" and got["teacher"] == MADE_OF[teacher]["teacher"]
    cfg = for_distill(got | dict(teacher="tiny"))[0]                       # the settings are valid; defaults of the teacher are in its folder
    assert cfg.batch // cfg.accumulate == 1
    assert (cfg.data, cfg.texts) == ((f"cache/{on['cached']}", "cache/texts") if on["cached"] else ("clips", ""))
    saved = {"denoiser": on["denoiser"], "decode": on["decode"], "rewards": on["save_rewards"]}
    assert savings_of(cfg.save_memory) == tuple(n for n, v in saved.items() if v)
    assert cfg.optimizer == ("adamw8bit" if on["optimizer"] else "adamw") and cfg.dtype == ("float16" if on.get("card") == "16" else "bfloat16")
    if "image" in on: assert cfg.objective.beta_img == 0 and "," not in cfg.reward


def test_keyboard_alone_copies_the_command(page):
    "From the first choice with the tab key to the last button, each with a visible focus and a name"
    choose(page, teacher="modelscope", card="24")
    page.locator("#will-it-fit [name=teacher]").focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        at = page.evaluate("[document.activeElement.name, document.activeElement.closest('label')?.innerText ?? document.activeElement.innerText ?? '']")
        assert at[1].strip(), at
        if at[0] == "copy": break
    assert at[0] == "copy"
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#will-it-fit [role=status]').textContent")
    assert page.locator("#will-it-fit [role=status]").inner_text() in ("copied", "selected: press Ctrl+C")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390 and not page.told


def test_what_the_page_lacks_names_the_command(page):
    choose(page, teacher="modelscope", cached="")
    page.evaluate("document.querySelector('#will-it-fit [name=image]').append(new Option('videoprism', 'hpsv2.1x')); ")
    choose(page, image="hpsv2.1x")
    told = page.locator("#will-it-fit .time").inner_text()
    assert "t2v-turbo plan --teacher modelscope" in told and number(page) is None
    assert cli.read(told.partition("t2v-turbo ")[2].split())[0].name == "plan"
    choose(page, image="hpsv2.1")
    assert number(page)
