"The rating page in a real browser: from the first click to the exported file"
import json
import os
import shutil
from pathlib import Path

import pytest

from t2v_turbo.core import make_gen, write_video
from t2v_turbo.rate import QUESTIONS, find_pairs, make_page, rate_report, read_ratings
from t2v_turbo.world import caption, combos, render

pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
SHOTS = os.environ.get("T2V_TURBO_SHOTS")      # a folder for pictures, to be looked at
EVIL = '<img src=x onerror="document.title=1"></script><script>document.title=2</script> "\u2028&amp;'


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    here, attrs = tmp_path_factory.mktemp("study"), combos("heldout")[::170]
    for model, seed in (("a", 0), ("b", 1)):
        (here / model).mkdir()
        for i, (clip, at) in enumerate(zip(render(attrs, make_gen(seed), 8), attrs.tolist())):
            write_video(here / model / f"{i:04d}.mp4", clip)
            (here / model / f"{i:04d}.txt").write_text(EVIL if i == 2 else caption(*at))
    return find_pairs(here / "a", here / "b")


@pytest.fixture(scope="module")
def page_file(pairs, tmp_path_factory):
    "Without a minimum of viewing, so that tests of other things do not wait"
    return make_page(pairs, tmp_path_factory.mktemp("page") / "study.html", repeats=.25, view=0)[0]


@pytest.fixture(scope="module")
def gated(pairs, tmp_path_factory):
    return make_page(pairs, tmp_path_factory.mktemp("page") / "study.html", view=.6)[0]


def one_pair(here, *frames):
    "A page with one pair; 8 frames last 1 s"
    for model, n in zip("ab", frames):
        (here / model).mkdir()
        write_video(here / model / "0.mp4", render(combos("heldout")[:1], make_gen(0), n)[0])
        (here / model / "0.txt").write_text("a fish")
    return make_page(find_pairs(here / "a", here / "b"), here / "study.html")[0]


@pytest.fixture
def visit(browser):
    "Open a page in a profile of its own, and note what goes wrong in it; closed after the test"
    contexts = []

    def visit(page_file, script="", **kw):
        context = browser.new_context(**(dict(viewport=dict(width=1280, height=800)) | kw))
        contexts.append(context)
        if script: context.add_init_script(script)
        page = context.new_page()
        page.wrong = []
        page.on("pageerror", lambda e: page.wrong.append(str(e)))
        page.on("console", lambda m: page.wrong.append(m.text) if m.type == "error" else None)
        page.on("request", lambda r: page.wrong.append(r.url) if r.url.startswith("http") else None)
        page.goto(page_file.as_uri())
        return page
    yield visit
    for c in contexts: c.close()


def until(page, condition):
    "Wait; the page's own policy forbids Playwright's `wait_for_function`"
    for _ in range(600):
        if page.evaluate(condition): return
        page.wait_for_timeout(50)
    raise AssertionError(f"{condition} did not become true in 30 s")


def shot(page, name):
    if SHOTS: page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))


def prefer_a(page):
    "The key of somebody who always likes A better"
    return page.evaluate("list[Math.floor(state.answers.length / 3)].left") == "a" and "1" or "2"


def saved(page, button, path):
    with page.expect_download() as d: page.click(button)
    assert d.value.suggested_filename.startswith("ratings-")
    d.value.save_as(path)
    return path


def test_from_first_click_to_the_exported_file(visit, page_file, pairs, tmp_path):
    page = visit(page_file)
    shot(page, "desktop-start")
    page.fill("#name", "Zoë <b>1</b>")
    page.click("#go")
    assert page.inner_text("#at") == "pair 1 of 10, question 1 of 3"
    until(page, "v1.currentTime > 0 && v2.currentTime > 0 && !v1.paused && !v2.paused")
    for i, asked in enumerate(QUESTIONS.values()):
        assert page.inner_text("#question") == asked
        page.keyboard.press("120"[i])
    assert page.inner_text("#at") == "pair 2 of 10, question 1 of 3"
    page.keyboard.press("Backspace")
    assert page.inner_text("#at") == "pair 1 of 10, question 3 of 3"
    for key in ("Backspace", "ArrowLeft"): page.keyboard.press(key)
    assert page.get_attribute("#back", "aria-disabled") == "true"
    page.keyboard.press("Backspace")
    assert page.inner_text("#at") == "pair 1 of 10, question 1 of 3"
    until(page, "v1.readyState >= 2")
    shot(page, "desktop-pair")
    while page.is_visible("#trial"): page.keyboard.press(prefer_a(page))
    shot(page, "desktop-end")
    table, rows = saved(page, "#csv", tmp_path / "r.csv"), saved(page, "#json", tmp_path / "r.json")
    assert page.input_value("#text") == table.read_text()
    report = rate_report(table, page_file, min_seconds=0)
    assert report["dropped"] == [] and report["votes"] == 30 and report["raters"] == 1
    for q in report["questions"].values():
        assert (q["a"], q["b"], q["tie"]) == (8, 0, 0)
        assert q["consistency"]["same"] == q["consistency"]["shown"] == 2
        assert q["position"]["left"] == 4                        # sides are balanced
    assert read_ratings(rows, page_file) == read_ratings(table, page_file)
    assert json.loads(rows.read_text())[0]["rater"].startswith("Zoeb1b-")
    assert page.wrong == []


def test_reload_in_the_middle(visit, page_file, tmp_path):
    page = visit(page_file)
    page.click("#go")
    for _ in range(10): page.keyboard.press("1")
    look = lambda: [page.inner_text(s) for s in ("#at", "#question", "#caption")] + page.evaluate(
        "[JSON.stringify(list), JSON.stringify(state)]")
    before = look()
    assert before[0] == "pair 4 of 10, question 2 of 3"
    page.reload()
    assert page.is_visible("#start") and "10 answers so far" in page.inner_text("#go")
    assert not page.is_visible("#name")
    shot(page, "desktop-reload")
    page.click("#go")
    assert look() == before
    other = page.context.new_page()                              # closed and opened again
    page.close(); other.goto(page_file.as_uri()); other.click("#go")
    assert other.inner_text("#at") == before[0]
    while other.is_visible("#trial"): other.keyboard.press("0")
    got = read_ratings(saved(other, "#csv", tmp_path / "r.csv"), page_file)
    assert len(got.votes) == 30 and got.dropped == []


def test_phone(visit, page_file, tmp_path):
    page = visit(page_file, viewport=dict(width=390, height=844), has_touch=True, is_mobile=True,
                 device_scale_factor=2)
    shot(page, "phone-start")
    page.tap("#go")
    until(page, "v1.readyState >= 2 && v2.readyState >= 2")
    shot(page, "phone-pair")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    boxes = [page.locator(s).bounding_box() for s in ("#v1", "#v2", "#pause", "#replay", "#question", "[data-choice='1']",
                                                      "[data-choice='2']", "[data-choice='0']")]
    assert all(b["y"] + b["height"] <= 844 and b["x"] + b["width"] <= 390 for b in boxes)
    first, second, *buttons = boxes
    assert first["x"] == second["x"] and first["y"] + first["height"] <= second["y"] and first["width"] > 360     # stacked
    assert boxes[4]["y"] + boxes[4]["height"] <= boxes[5]["y"]                   # the question is not covered
    assert all(b["height"] >= 44 for b in buttons if b is not boxes[4])          # large enough for a thumb
    assert [page.inner_text(f"[data-choice='{c}']").split()[-1] for c in "12"] == ["upper", "lower"]
    while page.is_visible("#trial"): page.tap(f"[data-choice='{prefer_a(page)}']")
    shot(page, "phone-end")
    report = rate_report(saved(page, "#csv", tmp_path / "r.csv"), page_file, min_seconds=0)
    assert report["votes"] == 30 and report["questions"]["text"]["a"] == 8
    assert page.wrong == []


@pytest.mark.parametrize("size", [(320, 568), (844, 390), (768, 1024)])
def test_other_sizes(visit, page_file, size):
    page = visit(page_file, viewport=dict(zip(("width", "height"), size)))
    stacked = size[0] < 640
    page.click("#go")
    until(page, "v1.readyState >= 2")
    page.evaluate("text => { document.querySelector('#caption').textContent = text; }", EVIL)   # the longest
    shot(page, f"{size[0]}x{size[1]}")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for s in ("#question", "[data-choice='1']", "[data-choice='2']", "[data-choice='0']"):
        box = page.locator(s).bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= size[1], s      # without scrolling
    boxes = [page.locator(s).bounding_box() for s in ("#v1", "#v2")]
    asked, choice = [page.locator(s).bounding_box() for s in ("#question", "[data-choice='1']")]
    assert asked["y"] + asked["height"] <= choice["y"] + 1        # the buttons, which stick to the bottom, do not cover it
    assert (boxes[0]["x"] == boxes[1]["x"]) == stacked and (boxes[0]["y"] == boxes[1]["y"]) != stacked
    assert page.inner_text("[data-choice='1']").split()[-1] == ("upper" if stacked else "left")
    page.click("[data-choice='2']")
    assert "question 2" in page.inner_text("#at")


def test_captions_stay_text(visit, page_file):
    page = visit(page_file)
    page.click("#go")
    seen = set()
    while page.is_visible("#trial"):
        seen.add(page.evaluate("document.querySelector('#caption').textContent"))
        assert page.locator("#caption *").count() == 0 and page.title() == "Which video is better?"
        page.keyboard.press("0")
    assert " ".join(EVIL.split()) in seen
    assert page.locator("img").count() == 0 and page.wrong == []


def test_sides_order_and_repeats(visit, page_file):
    page = visit(page_file)
    lists = [page.evaluate(f"trials('{r}')") for r in ("x", "y", "x")]
    assert lists[0] == lists[2] != lists[1]
    for some in lists:
        first = [t for t in some if not t["rep"]]
        assert sorted(t["pair"] for t in first) == list(range(8))
        assert [t["left"] for t in first].count("a") == 4
        for i, t in enumerate(some):
            if t["rep"]:
                j = next(k for k, u in enumerate(some) if u["pair"] == t["pair"])
                assert i > j and i >= 4 and some[j]["left"] != t["left"]
    left = [page.evaluate(f"trials('r{i}')[0].left") for i in range(200)]
    assert 70 < left.count("a") < 130
    first = [page.evaluate(f"trials('r{i}')[0].pair") for i in range(400)]
    assert min(first.count(p) for p in range(8)) > 25            # 50 expected each


def test_the_video_on_the_left_is_the_one_that_is_noted(visit, page_file, pairs):
    watch = """window.blobs = {}; const make = URL.createObjectURL;
        URL.createObjectURL = b => { const u = make(b); blobs[u] = b; return u; };"""
    page = visit(page_file, watch)
    page.click("#go")
    read = "async id => [...new Uint8Array(await blobs[$(id).src].arrayBuffer())]"
    for _ in range(6):
        left, right = [bytes(page.evaluate(read, v)) for v in ("v1", "v2")]
        t = page.evaluate("list[Math.floor(state.answers.length / 3)]")
        pair = next(p for p in pairs if p.id == page.evaluate(f"study.pairs[{t['pair']}].id"))
        want = [pair.a.read_bytes(), pair.b.read_bytes()]
        assert want[0] != want[1] and [left, right] == (want if t["left"] == "a" else want[::-1])
        for _ in range(3): page.keyboard.press("0")


def test_slips(visit, page_file):
    "Held keys, shortcuts and a spoilt memory do not answer"
    page = visit(page_file)
    page.keyboard.press("1")
    assert page.evaluate("state.answers.length") == 0            # not begun
    page.fill("#name", "102")
    assert page.evaluate("state.answers.length") == 0
    page.click("#go")
    page.keyboard.press("Control+1"); page.keyboard.press("x")
    page.keyboard.down("1"); page.keyboard.down("1"); page.keyboard.up("1")
    assert page.evaluate("state.answers.length") == 1
    for bad in ("{", '{"rater": "<b>", "answers": []}', '{"rater": "x", "answers": [["7", 1]]}', "null"):
        page.evaluate("v => localStorage.setItem(place, v)", bad)
        page.reload()
        assert page.inner_text("#go") == "Start"
    page.evaluate("""v => localStorage.setItem(place, JSON.stringify(
        {rater: "x", answers: Array(500).fill(["1", 1])}))""")
    page.reload(); page.click("#go")
    assert page.is_visible("#end") and page.evaluate("state.answers.length") == 30
    assert page.wrong == []


def test_another_person_on_the_same_device(visit, page_file):
    page = visit(page_file)
    page.click("#go")
    first = page.evaluate("state.rater")
    while page.is_visible("#trial"): page.keyboard.press("1")
    page.once("dialog", lambda d: d.dismiss()); page.click("#next")
    assert page.is_visible("#end") and page.evaluate("state.answers.length") == 30
    page.once("dialog", lambda d: d.accept()); page.click("#next")
    assert page.is_visible("#start") and page.is_visible("#name")
    page.click("#go")
    assert page.evaluate("state.rater") != first and page.evaluate("state.answers.length") == 0
    assert page.inner_text("#at").startswith("pair 1 of 10")


def test_without_storage(visit, page_file, tmp_path):
    page = visit(page_file, "Storage.prototype.setItem = () => { throw new Error('full'); };")
    page.click("#go")
    while page.is_visible("#trial"): page.keyboard.press("1")
    assert len(read_ratings(saved(page, "#csv", tmp_path / "r.csv"), page_file).votes) == 30


def test_parts_do_not_share_their_memory(visit, pairs, tmp_path):
    one, two = make_page(pairs, tmp_path / "p.html", parts=2)
    page = visit(one)
    page.click("#go"); page.keyboard.press("1")
    page.goto(two.as_uri())
    assert page.inner_text("#go") == "Start"


# --- watching ---------------------------------------------------------------------------------------

OPEN = "document.querySelector('[data-choice]').getAttribute('aria-disabled') === 'false'"
TIMES = """window.gaps = []; window.marks = []; (function note() {
    if (running && !v1.ended && !v2.ended && v1.currentTime > .2) gaps.push(Math.abs(v1.currentTime - v2.currentTime));
    marks.push([v1.currentTime, v2.currentTime]);
    requestAnimationFrame(note); })()"""


def test_an_answer_counts_after_the_pair_has_played(visit, gated, tmp_path):
    page = visit(gated)
    page.evaluate("window.really = HTMLMediaElement.prototype.play; HTMLMediaElement.prototype.play = async () => {}")
    page.click("#go")
    until(page, "running && v1.readyState >= 2")                  # it would play, but the machine stalls
    page.keyboard.press("1"); page.click("[data-choice='2']", force=True)
    assert page.evaluate("state.answers.length") == 0 and not page.evaluate(OPEN)
    assert page.inner_text("#wait") == "answers open in 1 s"
    page.keyboard.press("p")
    assert page.inner_text("#wait") == "play both to answer" and page.inner_text("#pause").endswith("play")
    page.wait_for_timeout(700)                                    # waiting is not watching
    page.keyboard.press("1")
    assert page.evaluate("state.answers.length") == 0
    shot(page, "desktop-wait")
    page.evaluate("() => { HTMLMediaElement.prototype.play = really; }")
    page.keyboard.press("p")
    until(page, OPEN)
    assert page.evaluate("watched") >= .6 and page.inner_text("#wait") == ""
    for _ in range(3): page.keyboard.press("1")                   # once for the three questions of a pair
    assert page.evaluate("state.answers.length") == 3 and not page.evaluate(OPEN)
    page.keyboard.press("Backspace")                              # a pair that was watched stays open
    assert page.evaluate(OPEN)
    assert page.wrong == []


def test_once_to_the_end_is_enough(visit, pairs, tmp_path):
    page = visit(make_page(pairs, tmp_path / "s.html", view=50)[0])
    page.click("#go")
    until(page, OPEN)
    assert page.evaluate("[v1, v2].every(v => v.duration < 1.2)")


def test_answer_times_are_stored_and_fast_answers_left_out(visit, page_file, tmp_path):
    page = visit(page_file)
    page.click("#go")
    page.wait_for_timeout(600)
    page.keyboard.press("1")
    while page.is_visible("#trial"): page.keyboard.press("0")
    table = saved(page, "#csv", tmp_path / "r.csv")
    slow = [v for v in read_ratings(table).votes if float(v["seconds"]) >= .5]
    assert .5 <= float(slow[0]["seconds"]) < 10 and slow[0]["question"] == "appeal"
    report = rate_report(table, page_file)
    assert report["votes"] == len(slow) and report["fast"]["answers"] == 30 - len(slow) and report["fast"]["min_seconds"] == .5
    assert rate_report(table, page_file, min_seconds=0)["votes"] == 30


def test_the_videos_share_a_clock(visit, page_file):
    "Start and loops: the distance is less than half a frame of 8 a second in all but a few moments"
    page = visit(page_file)
    page.click("#go")
    until(page, "running && v1.currentTime > 0")
    page.evaluate(TIMES)
    page.wait_for_timeout(3500)                                   # three loops of 1 s
    gaps, times = page.evaluate("gaps"), page.evaluate("marks")
    assert len(gaps) > 30 and sorted(gaps)[int(.9 * len(gaps))] < .0625, sorted(gaps)[-20:]
    starts = [i for i in range(1, len(times)) if times[i][0] < times[i - 1][0] - .3]
    assert len(starts) >= 2 and all(times[i][1] < .4 for i in starts)        # the second starts again with the first


@pytest.mark.parametrize("off", [-.2, -1, 1])
def test_a_stall_is_made_up_for(visit, tmp_path, off):
    "Within one showing of 6 s, so that no restart helps"
    page = visit(one_pair(tmp_path, 48, 48))
    page.click("#go")
    until(page, "running && v1.currentTime > .5")
    page.evaluate(TIMES)
    page.evaluate(f"v2.currentTime = v1.currentTime + {off}; gaps.length = 0")
    until(page, "gaps.length > 9 && gaps.slice(-5).every(g => g < .0625) || v1.currentTime > 5")
    assert page.evaluate("v1.currentTime < 5"), page.evaluate("gaps.slice(-5)")


def test_a_longer_video_is_waited_for(visit, tmp_path):
    page = visit(one_pair(tmp_path, 12, 8))
    page.click("#go")
    until(page, "v1.readyState >= 2 && v2.readyState >= 2")
    assert sorted(round(page.evaluate(f"{v}.duration"), 1) for v in ("v1", "v2")) == [1, 1.5]
    short, long = sorted(("v1", "v2"), key=lambda v: page.evaluate(f"{v}.duration"))
    until(page, f"{short}.ended && !{long}.ended")
    assert page.evaluate(f"{short}.currentTime > .9")             # it stays on its last frame
    until(page, "!v1.ended && !v2.ended && v1.currentTime < .9 && v1.currentTime > 0")
    page.evaluate(TIMES)
    page.wait_for_timeout(300)
    assert page.evaluate("gaps.every(g => g < .25)")


def test_pause_and_replay(visit, page_file):
    "By key, by button and by a touch of a video"
    page = visit(page_file)
    page.click("#go")
    until(page, "running && v1.currentTime > .1")
    for key in ("p", "P"):
        page.keyboard.press(key)
        assert page.evaluate("v1.paused && v2.paused && !running") and page.inner_text("#pause").endswith("play")
        at = page.evaluate("[v1.currentTime, v2.currentTime]")
        page.wait_for_timeout(200)
        assert page.evaluate("[v1.currentTime, v2.currentTime]") == at
        page.keyboard.press(key)
        until(page, "running && !v1.paused && !v2.paused")
    page.click("#pause"); assert page.evaluate("!running")
    page.click("#v2"); assert page.evaluate("running")
    until(page, "v1.currentTime > .6")
    page.keyboard.press("p"); page.keyboard.press("r")
    until(page, "running && v1.currentTime < .5 && v2.currentTime < .5 && v1.currentTime > 0")
    assert page.inner_text("#pause").endswith("pause")
    page.keyboard.press("p"); page.click("#replay")
    until(page, "running")
    assert page.wrong == []


def test_keyboard_alone_and_focus_kept(visit, gated, tmp_path):
    "Offline, from a file, with no pointer: name, start, answers by focused button, pause, back, download"
    page = visit(gated)
    page.context.set_offline(True)
    page.reload()
    focus = lambda: page.evaluate("document.activeElement.id || document.activeElement.dataset.choice || document.activeElement.tagName")
    page.keyboard.press("Tab")
    assert focus() == "name"
    page.keyboard.type("ann")
    page.keyboard.press("Enter")
    assert page.is_visible("#trial") and focus() == "trial"
    until(page, OPEN)
    while focus() != "2": page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("state.answers.length") == 1 and focus() == "2"
    page.keyboard.down("Enter"); page.keyboard.down("Enter"); page.keyboard.down("Enter"); page.keyboard.up("Enter")
    assert page.evaluate("state.answers.length") == 2 and focus() == "2"         # a held key answers once
    page.keyboard.press("Space")
    assert "pair 2" in page.inner_text("#at") and focus() == "2"
    page.keyboard.press("Enter")                                  # too early: nothing, and the focus stays
    assert page.evaluate("state.answers.length") == 3 and focus() == "2"
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("state.answers.length") == 2 and focus() == "2"
    while page.is_visible("#trial"):
        until(page, OPEN)
        page.keyboard.press("0")
        assert focus() in ("2", "end")
    assert focus() == "end"
    page.keyboard.press("Tab"); assert focus() == "csv"
    with page.expect_download() as d: page.keyboard.press("Enter")
    d.value.save_as(tmp_path / "r.csv")
    assert len(read_ratings(tmp_path / "r.csv", gated).votes) == 27 and page.wrong == []


def test_reduced_motion(visit, gated):
    page = visit(gated, reduced_motion="reduce")
    page.click("#go")
    until(page, "v1.readyState >= 2 && v2.readyState >= 2")
    page.wait_for_timeout(300)
    assert page.evaluate("!running && v1.currentTime === 0 && v2.currentTime === 0")
    assert page.inner_text("#wait") == "play both to answer" and page.inner_text("#pause").endswith("play")
    page.keyboard.press("p")
    until(page, "v1.ended && v2.ended && !running")               # once, and no loop
    assert page.evaluate(OPEN)
    page.keyboard.press("p")
    until(page, "running && v1.currentTime < .9")


def test_a_broken_video_does_not_block(visit, pairs, tmp_path):
    page_file, = make_page(pairs, tmp_path / "s.html")
    html = page_file.read_text()
    page_file.write_text(html.replace("data:video/mp4;base64,", "data:video/mp4;base64,AAAA"))
    page = visit(page_file)
    page.click("#go")
    until(page, OPEN)
    assert page.is_visible("#broken")
    page.keyboard.press("0")
    assert page.evaluate("state.answers.length") == 1


def test_keys_on_the_first_page_do_nothing(visit, page_file):
    page = visit(page_file)
    page.click("#go"); page.keyboard.press("1")
    page.reload()
    for key in ("Backspace", "ArrowLeft", "p", "r", "1"): page.keyboard.press(key)
    assert page.is_visible("#start") and page.evaluate("state.answers.length") == 1 and page.wrong == []
