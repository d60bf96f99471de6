"Pictures to drag: driven in a real browser, their numbers compared with the library's"
import base64
import contextlib
import io
import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from t2v_turbo.ablate import by_setting, read_table
from t2v_turbo.consistency import boundary
from t2v_turbo.core import make_gen
from t2v_turbo.explore import PICTURES, explorable
from t2v_turbo.gaussian import Gaussian, Mixture
from t2v_turbo.judges import judge_score, load_judges
from t2v_turbo.pipeline import sample_student
from t2v_turbo.saved import load_student
from t2v_turbo.schedule import Schedule, vp_abar
from t2v_turbo.solver import DDIM, ddim_step, guide
from t2v_turbo.teachers.tiny import WEIGHTS

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
SCHED = Schedule(vp_abar())


def stored(name):
    "What bench/explorables.py wrote for a picture"
    return json.loads((NBS / f"explore/{name}.js").read_text(encoding="utf-8").split(" = ", 1)[1].rstrip(";\n"))


@pytest.fixture(scope="module")
def bench():
    return runpy.run_path(str(ROOT / "bench/explorables.py"))


@pytest.fixture
def visit(browser, tmp_path, monkeypatch):
    "Open a picture from a file, as a notebook's output holds it; `page.wrong` must stay empty"
    monkeypatch.chdir(NBS)
    contexts = []

    def visit(name, page=None, context=None, **start):
        if page is None:
            page = tmp_path / f"{name}.html"
            page.write_text("<!doctype html><html lang=en><title>t</title>" + explorable(name, **start).whole(), encoding="utf-8")
        contexts.append(browser.new_context(**(dict(viewport=dict(width=900, height=900)) | (context or {}))))
        tab = contexts[-1].new_page()
        tab.wrong = []
        tab.on("pageerror", lambda e: tab.wrong.append(str(e)))
        tab.on("console", lambda m: tab.wrong.append(m.text) if m.type == "error" else None)
        tab.on("request", lambda q: tab.wrong.append(q.url) if not q.url.startswith(("file:", "data:", "blob:")) else None)
        tab.goto(page.as_uri())
        tab.locator(".explore :is(input, select)").first.wait_for()
        return tab
    yield visit
    wrong = [w for c in contexts for p in c.pages for w in p.wrong]
    for c in contexts: c.close()
    assert not wrong


def read(page, name, which=0):
    "A number of the picture as the reader sees it"
    text = page.locator(f"output[data-name={name}]").inner_text().replace("\u2212", "-")
    return [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", text)][which]


def to(page, label, text):
    "Move a slider until it shows `text`"
    found = page.get_by_role("slider", name=label, exact=True).evaluate("""(e, text) => {
      for (let i = 0; i <= +e.max; i++) {
        e.value = i;
        e.dispatchEvent(new Event("input"));
        if (e.getAttribute("aria-valuetext") === text) return true;
      }}""", text)
    assert found, f"{label} never shows {text}"


def choose(page, name, **which):
    page.get_by_role("combobox", name=name, exact=True).select_option(**which)


# --- the curves: every number is computed in the page --------------------------------------------

class Guided(Mixture):
    "The mixture's teacher with classifier-free guidance, whose flow is then the guided one"
    def _eps(self, z, a, label): return guide(super()._eps(z, a, label), super()._eps(z, a, None), self.w)


def teacher_of(data, w):
    "The teacher and the label of a data set of the picture"
    if data == "gaussian": return Gaussian(.5, .4, SCHED), None
    m = Guided([-1., 1.], .25, [.5, .5], SCHED)
    object.__setattr__(m, "w", w)
    return m, {"minus": torch.tensor([0]), "plus": torch.tensor([1])}.get(data)


def by_python(data, w, t, k, z):
    "All numbers of the picture, by the library"
    m, label = teacher_of(data, w)
    more = () if data == "gaussian" else (label,)
    at = lambda v: torch.tensor([v])
    flow = lambda x, a, b: x if a == b else m.flow(x, at(a), at(b), *more)
    def step(x, a, b):
        eps = m.eps(x, at(a), *more)
        x0 = SCHED.x0_from_eps(x, eps, at(a))
        return x0, eps, ddim_step(SCHED, x0, eps, at(b))
    s, start = max(t - k, 0), torch.tensor([[z]])
    zt = flow(start, 999, t)
    x0, eps, z_prev = step(zt, t, s)
    c_skip, c_out = boundary(at(t))
    alpha, sigma = SCHED.alpha_sigma(at(t), zt)
    ddim, x = DDIM(SCHED, 1000//k), start
    for i in range(ddim.n - 1, -1, -1): x = step(x, ddim.t(at(i)).item(), ddim.t_prev(at(i)).item())[2]
    f, walked_to = flow(zt, t, 0), flow(start, 999, 0)
    got = dict(zt=zt, x0=x0, eps=eps, step=z_prev, exact=flow(zt, t, s), f=f, target=flow(z_prev, s, 0), c_skip=c_skip, c_out=c_out,
               untrained=c_skip*zt + c_out*x0, error=z_prev - flow(zt, t, s))
    pairs = dict(scales=(alpha, sigma), walked=(x, walked_to))
    return {k: [v.item()] for k, v in got.items()} | {k: [v.item() for v in vs] for k, vs in pairs.items()}


def assert_as_python(page, data, w, t, k, z):
    for name, values in by_python(data, w, t, k, z).items():
        for i, v in enumerate(values): assert abs(read(page, name, i) - v) < 1e-3, (name, i, read(page, name, i), v)
        if name == "c_skip": assert abs(read(page, name)/values[0] - 1) < 6e-3                # three digits, also of 7e-6


KINDS = dict(gaussian="one Gaussian, mean 0.5", mixture="two Gaussians, no prompt", minus="two Gaussians, prompt \u22121", plus="two Gaussians, prompt +1")


def test_the_curves_have_the_librarys_numbers(visit):
    page = visit("flow", data="gaussian", z=.6, t=599, k=200)
    assert_as_python(page, "gaussian", 0, 599, 200, .6)
    assert page.get_by_role("slider", name="guidance w").is_disabled()                       # it has no prompt
    page.get_by_role("slider", name="noise level t").focus()
    for _ in range(3): page.keyboard.press("ArrowRight")
    assert_as_python(page, "gaussian", 0, 659, 200, .6)
    for data, w, t, k in (("mixture", 0, 399, 20), ("plus", 2, 759, 100), ("minus", 7.5, 999, 500), ("plus", 4.5, 19, 1000), ("plus", 1, 0, 40)):
        choose(page, "data", label=KINDS[data])
        if data in ("plus", "minus"): to(page, "guidance w", str(w))
        to(page, "noise level t", str(t))
        to(page, "skip k", f"{k}, {1000//k} step" + "s"*(k < 1000))
        assert_as_python(page, data, w, t, k, .6)
    assert (read(page, "c_skip"), read(page, "c_out")) == (1, 0) and read(page, "untrained") == read(page, "zt")     # at t = 0


def test_the_ring_is_dragged(visit):
    page = visit("flow", data="plus", w=2, z=0)
    ring = page.get_by_role("slider", name="start noise z")
    box = ring.bounding_box()
    x, y = box["x"] + box["width"]/2, box["y"] + box["height"]/2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 5, y - 60, steps=4)
    page.mouse.up()
    z = read(page, "z")
    assert 1 < z < 2                                                                         # 60 of 266 pixels for 6.4
    assert_as_python(page, "plus", 2, 599, 200, z)
    page.mouse.move(x, y + 40)                                                               # released
    assert read(page, "z") == z
    assert ring.get_attribute("aria-valuenow") == f"{z:.2f}"


def test_the_ring_is_dragged_by_a_finger(visit):
    page = visit("flow", data="mixture", z=0, context=dict(viewport=dict(width=390, height=844), has_touch=True, is_mobile=True, device_scale_factor=2))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    box = page.get_by_role("slider", name="start noise z").bounding_box()
    x, y, cdp = box["x"] + box["width"]/2, box["y"] + box["height"]/2, page.context.new_cdp_session(page)
    touch = lambda kind, *at: cdp.send("Input.dispatchTouchEvent", dict(type=kind, touchPoints=[dict(x=a, y=b) for a, b in at]))
    touch("touchStart", (x, y))
    for i in range(1, 6): touch("touchMove", (x, y + 8*i))
    touch("touchEnd")
    z = read(page, "z")
    assert -2 < z < -.5 and page.evaluate("scrollY") == 0
    assert_as_python(page, "mixture", 0, 599, 200, z)


def test_the_ring_by_keyboard(visit):
    page = visit("flow", z=.5)
    page.get_by_role("slider", name="start noise z").focus()
    for keys, z in (("ArrowUp", .55), ("PageDown", .05), ("End", 3), ("ArrowRight", 3), ("Home", -3)):
        page.keyboard.press(keys)
        assert read(page, "z") == z
    assert page.evaluate("document.activeElement.getAttribute('role')") == "slider"          # drawn anew, and still in focus
    assert_as_python(page, "gaussian", 0, 599, 200, -3.)


# --- stored clips --------------------------------------------------------------------------------

def tile(sheet, clip, frame):
    "One frame of a stored sheet, as PIL reads it"
    page = Image.open(io.BytesIO(base64.b64decode(sheet["image"].split(",")[1]))).convert("RGB")
    n, w, h = clip*sheet["frames"] + frame, sheet["width"], sheet["height"]
    x, y = n % sheet["cols"]*w, n//sheet["cols"]*h
    return torch.tensor(list(page.crop((x, y, x + w, y + h)).tobytes())).view(-1, 3).float()


def assert_drawn(page, sheet, which, clip):
    "A canvas shows this clip of the sheet"
    canvas = page.locator(".explore canvas").nth(which)
    assert canvas.get_attribute("data-clip") == str(clip)
    drawn = canvas.evaluate("c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]")
    drawn = torch.tensor(drawn).view(-1, 4)[:, :3].float()
    assert (drawn - tile(sheet, clip, int(canvas.get_attribute("data-frame")))).abs().mean() < 3


CALM = dict(reduced_motion="reduce")


def test_levels(visit):
    page, d = visit("levels", context=CALM), stored("levels")
    for t in (359, 999):
        to(page, "noise level t", str(t))
        a, at = SCHED.abar[t].item(), d["times"].index(t)
        assert abs(read(page, "scales", 0) - a**.5) < 1e-3 and abs(read(page, "scales", 1) - (1 - a)**.5) < 1e-3
        assert abs(read(page, "snr") - 10*torch.tensor(a/(1 - a)).log10().item()) < .06
        for i in range(3): assert_drawn(page, d["sheet"], i, 3*at + i)
        for i, name in ((1, "x0"), (2, "f")): assert abs(read(page, name) - d["parts"][i]["distance"][at]) < 1e-3
    assert d["parts"][1]["distance"][-1] > 3*d["parts"][1]["distance"][0]
    page = visit("levels", only="zt", t=599)
    assert page.locator("canvas").count() == 1 and page.locator("output[data-name=f]").count() == 0


def test_players(visit):
    page, d = visit("players", context=CALM), stored("players")
    assert d["models"][:3] == ["teacher, 50 steps", "teacher, 4 steps", "plain CD, 4 steps"] and len(d["models"]) >= 4
    for caption, seed in ((0, 0), (2, 1), (3, 0)):
        choose(page, "caption", index=caption)
        choose(page, "seed", index=seed)
        to(page, "frame", f"{2 + caption} of {d['sheet']['frames']}")
        for i in range(len(d["models"])):
            clip = (i*len(d["captions"]) + caption)*len(d["seeds"]) + seed
            assert_drawn(page, d["sheet"], i, clip)
            assert abs(read(page, f"m{i}") - d["scores"][clip]) < 1e-3
            assert d["captions"][caption] in page.locator("canvas").nth(i).get_attribute("aria-label")
    frames = page.locator("canvas").evaluate_all("cs => cs.map(c => c.dataset.frame)")
    assert set(frames) == {"4"}


def test_players_play_in_step(visit):
    page = visit("players")
    assert page.get_by_role("button", name="Pause").is_visible()
    seen = {tuple(page.locator("canvas").evaluate_all("cs => cs.map(c => c.dataset.frame)")) for _ in range(12) if not page.wait_for_timeout(60)}
    assert len(seen) > 2 and all(len(set(s)) == 1 for s in seen)                             # moving, always the same frame
    page.get_by_role("button", name="Pause").focus()
    page.keyboard.press("Space")
    still = page.locator("canvas").first.get_attribute("data-frame")
    page.wait_for_timeout(400)
    assert page.locator("canvas").first.get_attribute("data-frame") == still
    assert page.get_by_role("button", name="Play").is_visible()


@pytest.mark.parametrize("name", ["levels", "players", "guidance", "ablation"])
def test_reduced_motion_plays_nothing_by_itself(visit, name):
    page = visit(name, context=CALM)
    page.wait_for_timeout(500)
    assert set(page.locator("canvas").evaluate_all("cs => cs.map(c => c.dataset.frame)")) == {"0"}
    page.get_by_role("button", name="Play").click()                                          # and plays when asked to
    page.wait_for_function("document.querySelector('canvas').dataset.frame > 0")


def test_guidance(visit):
    page, d = visit("guidance", context=CALM), stored("guidance")
    n = 0
    for m in d["models"]:
        choose(page, "model", label=m["name"])
        for steps in m["steps"]:
            for w in d["w"]:
                if n % 7 == 0:
                    to(page, "steps", str(steps))
                    to(page, "guidance w", str(w))
                    assert read(page, "calls") == steps*m["calls"]
                    for c in d["columns"]: assert abs(read(page, c) - d["rows"][n][c]) < 1e-3
                    assert_drawn(page, d["sheet"], 0, n)
                n += 1
    assert n == len(d["rows"])


def test_the_ablation(visit):
    page, d = visit("ablation", context=CALM), stored("ablation")
    rows = read_table(NBS / "ablation.csv")
    xs, ys = d["values"]
    for x, y in dict.fromkeys(((xs[0], ys[0]), (xs[-1], ys[-1]), (xs[-1], ys[0]), (xs[len(xs) // 2], ys[len(ys) // 2]))):
        if len(xs) > 1: to(page, "beta_img", f"{x:g}")
        if len(ys) > 1: to(page, "beta_vid", f"{y:g}")
        for c in d["columns"]:
            mean, spread, n = by_setting(rows, ("beta_img", "beta_vid"), c)[x, y]
            assert abs(read(page, c) - mean) < 1e-3 and abs(read(page, c, 1) - (spread if n > 1 else 0)) < 6e-3
        clip = d["values"][0].index(x)*len(d["values"][1]) + d["values"][1].index(y)
        for i in range(len(d["captions"])): assert_drawn(page, d["sheet"], i, clip*len(d["captions"]) + i)


def test_the_stored_numbers_are_those_of_the_shipped_student():
    "New weights need new files: bench/explorables.py"
    cd, judges, d = load_student(WEIGHTS / "tiny-cd"), load_judges(), stored("players")
    clips = sample_student(cd, d["captions"], make_gen(d["seeds"][1]), 4)
    got, i = judge_score(judges, clips, d["captions"]), d["models"].index("plain CD, 4 steps")
    want = torch.tensor(d["scores"]).view(len(d["models"]), len(d["captions"]), len(d["seeds"]))[i, :, 1]
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


def test_the_script_writes_the_committed_ablation(bench, tmp_path):
    bench["main"](["--only", "ablation", "--out", str(tmp_path)])
    text = (tmp_path / "ablation.js").read_text(encoding="utf-8")
    new, old = json.loads(text.split(" = ", 1)[1].rstrip(";\n")), stored("ablation")
    assert text.startswith("(window.exploreData ??= {}).ablation = ")
    assert (new["sheet"].pop("image")[:30], new) == (old["sheet"].pop("image")[:30], old)


def test_another_world_needs_no_other_script(bench, visit, tmp_path):
    "Larger clips, more frames, other models and captions"
    clips = torch.rand(2*1*2, 3, 5, 1, 1, generator=make_gen(0)).expand(-1, -1, -1, 48, 64)
    d = dict(models=["slow", "fast"], calls=[2, 1], captions=["<b>a cat</b>"], seeds=[3, 4], scores=[-1., -2., -3., -4.], about="", sheet=bench["sheet"](clips, 130))
    assert d["sheet"]["cols"] % 5 == 0 and (d["sheet"]["width"], d["sheet"]["height"], d["sheet"]["frames"]) == (64, 48, 5)
    (tmp_path / "data.js").write_text(f"(window.exploreData ??= {{}}).players = {json.dumps(d)};")
    shutil.copy(NBS / "explore/explore.js", tmp_path)
    (tmp_path / "p.html").write_text(f"<!doctype html><html lang=en><title>t</title>{explorable('players').place()}<script src=data.js></script><script src=explore.js></script>")
    page = visit("players", tmp_path / "p.html", CALM)
    choose(page, "seed", label="4")
    to(page, "frame", "5 of 5")
    for i in range(2): assert_drawn(page, d["sheet"], i, 2*i + 1)
    assert read(page, "m1") == -4 and page.get_by_text("<b>a cat</b>").count()                # a caption is text, not HTML


def test_pictures_that_do_not_fit_are_refused(bench):
    with pytest.raises(bench["UserError"], match="do not fit 1 kB: give more --kilobytes"):
        bench["sheet"](torch.rand(8, 3, 8, 32, 32, generator=make_gen(0)), 1)


# --- on a page, and in a notebook ----------------------------------------------------------------

@pytest.mark.parametrize("name", list(PICTURES))
def test_by_keyboard_alone(visit, name):
    "Tab reaches every control once, each has a name, and its focus can be seen"
    page = visit(name, context=CALM, **(dict(data="plus") if name == "flow" else {}))
    count = page.locator(".explore :is(input, select, button, [tabindex='0'])").count()
    seen = []
    for _ in range(count):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("""() => { const e = document.activeElement, s = getComputedStyle(e);
          return [e.getAttribute('aria-label') || (e.closest('label')?.querySelector('span').textContent) || e.textContent, s.outlineStyle, !!e.closest('.explore')] }"""))
    assert len({s[0] for s in seen}) == count and all(s[0].strip() and s[1] != "none" and s[2] for s in seen), seen
    assert page.locator("canvas:not([aria-label])").count() == 0


@pytest.mark.parametrize("where", ["", "tutorials/"])
def test_a_page_of_the_site_from_a_file(visit, tmp_path, where):
    "The line of _quarto.yml finds explore.js from any folder, and explore.js its data"
    shutil.copytree(NBS / "explore", tmp_path / "explore")
    include = yaml.safe_load((NBS / "_quarto.yml").read_text(encoding="utf-8"))["format"]["html"]["include-after-body"]["text"]
    (tmp_path / "tutorials").mkdir()
    for name in ("styles.css", "glossary.js"): (tmp_path / name).touch()
    shutil.copy(NBS / "site.js", tmp_path)
    page, up = tmp_path / where / "p.html", "../" if where else ""
    page.write_text(f'<!doctype html><html lang=en><title>t</title><link rel="stylesheet" href="{up}styles.css"><body>'
                    + "".join(explorable(n).place() for n in PICTURES) + include + "</body>", encoding="utf-8")
    tab = visit("", page, dict(viewport=dict(width=390, height=844)) | CALM)
    for i, n in enumerate(PICTURES):
        tab.locator(".explore").nth(i).scroll_into_view_if_needed()
        tab.locator(".explore").nth(i).get_by_role("slider").first.wait_for()
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.locator("text=does not work").count() == 0


def test_a_missing_file_is_reported_in_the_page(visit, tmp_path):
    shutil.copy(NBS / "explore/explore.js", tmp_path)
    page = tmp_path / "p.html"
    page.write_text(f"<!doctype html><html lang=en><title>t</title>{explorable('flow').place()}{explorable('levels').place()}<script src=explore.js></script>")
    tab = visit("", page)
    tab.get_by_text("This picture does not work: levels.js is missing.").wait_for()
    tab.wrong = [w for w in tab.wrong if "ERR_FILE_NOT_FOUND" not in w]


def test_a_running_notebook_holds_everything(monkeypatch, tmp_path):
    p = explorable("levels", t=19)
    assert p._repr_html_() == p.place()                                                     # no kernel around
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1)))
    monkeypatch.setenv("T2V_TURBO_FILES", NBS.as_uri())
    with contextlib.chdir(tmp_path): text = p._repr_html_()                                 # as on Colab: files are fetched
    assert {"explore.js", "levels.js"} == {f.name for f in (tmp_path / "explore").iterdir()}
    assert "window.exploreData" in text and 'data-t="19"' in text and "class Mixture" in text
    (tmp_path / "tutorials").mkdir()
    monkeypatch.delenv("T2V_TURBO_FILES")
    with contextlib.chdir(tmp_path / "tutorials"): assert p._repr_html_() == text           # files of the folder above
    assert not any((tmp_path / "tutorials").iterdir())


def test_stored_outputs_hold_the_place_only():
    "A frozen script would not follow explore.js"
    shown = 0
    for nb in NBS.rglob("*.ipynb"):
        for c in json.loads(nb.read_text(encoding="utf-8"))["cells"]:
            html = ["".join(o["data"].get("text/html", "")) for o in c.get("outputs", []) if "data" in o]
            for h in (h for h in html if 'class="explore"' in h):
                shown += 1
                assert len(h) < 500 and "<script" not in h, nb.name
    assert shown >= 8


def test_pages_stay_light():
    sizes = {n: (NBS / f"explore/{n}.js").stat().st_size/1000 for n in ("explore", "levels", "players", "guidance", "ablation")}
    assert max(sizes.values()) < 215 and sum(sizes.values()) < 850, sizes
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", (NBS / "explore/explore.js").read_text(encoding="utf-8"))
