"The documentation: built once from the notebooks, then read as files and opened in a real browser"
import functools
import html
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
notebooks = sorted(p.relative_to(NBS).as_posix() for p in NBS.rglob("*.ipynb")
                   if not any(s[0] in "_." for s in p.relative_to(NBS).parts))


def text(s):
    return s if isinstance(s, str) else "".join(s)


def cells(nb):
    return json.loads((NBS / nb).read_text(encoding="utf-8"))["cells"]


# --- what the notebooks promise ------------------------------------------------------------------

@pytest.mark.parametrize("nb", notebooks)
def test_first_cells(nb):
    "nbdev turns the first cell into front matter and drops what else is in it; Colab and the time come in the second"
    first, second = [text(c["source"]) for c in cells(nb)[:2]]
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+", first), f"{nb}: more than a title and a line after > in the first cell"
    if nb == "index.ipynb": return                                      # it is the README
    link = re.search(r"\]\(https://colab\.research\.google\.com/github/t2v-turbo/t2v_turbo/blob/main/nbs/([^)]+)\)", second)
    assert link and link[1] == nb, f"{nb}: its Colab badge opens {link and link[1]}"
    assert re.search(r"· runs in ~\d+ (s|min) on ", second), f"{nb}: no `runs in ~N s on a CPU` beside the badge"
    install = text(cells(nb)[2]["source"])
    assert install.startswith("#| hide\n# on Colab: install the package"), f"{nb}: the third cell does not install on Colab"


def test_sidebar_has_every_notebook_once():
    sections = yaml.safe_load((NBS / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    listed = [n for s in sections for n in s["contents"]]
    assert sorted(listed) == notebooks, set(listed) ^ set(notebooks)


# --- the built site ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("smalldocs", reason="smalldocs is not installed: pip install -e '.[docs]'")
    tmp = tmp_path_factory.mktemp("docs")
    for d in ("nbs", "t2v_turbo"):
        shutil.copytree(ROOT / d, tmp / "repo" / d, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    shutil.copy(ROOT / "settings.ini", tmp / "repo")
    (tmp / "repo/t2v_turbo/weights").symlink_to(ROOT / "t2v_turbo/weights")
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    build = subprocess.run([sys.executable, ROOT / "tools/docs.py", "--root", tmp / "repo", "--out", tmp / "site", "--workers", "2"],
                           env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if "npm" in build.stderr and "katex" in build.stderr and build.returncode:
        pytest.skip("KaTeX cannot be fetched from the npm registry")
    assert build.returncode == 0, build.stderr[-4000:]
    return tmp / "site"


@pytest.fixture(scope="module")
def pages(site):
    return {p.relative_to(site).as_posix(): p.read_text(encoding="utf-8") for p in site.rglob("*.html")}


def visible(page):
    "The text of a page outside code"
    s = re.sub(r"<(script|style|pre|code|svg)\b.*?</\1>", " ", page, flags=re.S)
    return html.unescape(re.sub(r"<[^>]*>", " ", s))


def test_pages_are_named_as_quarto_would(site, pages):
    assert len(pages) == len(notebooks)
    assert {"index.html", "consistency.html", "teachers.html", "experiments/memory.html", "tutorials/quickstart.html"} <= pages.keys()
    assert "consistency.html" in (site / "sitemap.xml").read_text()


def test_no_link_is_broken(site, pages):
    ids = {n: set(re.findall(r'\sid="([^"]+)"', s)) for n, s in pages.items()}
    broken = []
    for name, s in pages.items():
        for url in map(html.unescape, re.findall(r'<(?:a|img|link|script|video|source)\b[^>]*?\s(?:href|src)="([^"]*)"', s)):
            if re.match(r"[a-z]+:", url): continue
            path, _, anchor = unquote(url).partition("#")
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
            if not (site / target).is_file(): broken.append(f"{name}: {url}")
            elif anchor and target in ids and anchor not in ids[target]: broken.append(f"{name}: no {anchor} in {target}")
    assert not broken, broken


def test_nothing_comes_from_another_host(site, pages):
    for name, s in pages.items():
        loaded = re.findall(r'<(?:img|script|video|source|iframe)\b[^>]*?\ssrc="(https?:[^"]*)"', s)
        loaded += re.findall(r'<link\b[^>]*rel="(?:stylesheet|icon)"[^>]*href="(https?:[^"]*)"', s)
        assert not loaded, f"{name} loads {loaded}"
    for css in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:", css.read_text(encoding="utf-8")), css


def test_no_directive_is_left(pages):
    for name, s in pages.items():
        seen = visible(s)
        assert not re.search(r"#\|\s*\w|^:::|\{\.[\w-]+\}|%%(html|time)", seen, flags=re.M), name
        code = re.findall(r"<pre\b.*?</pre>", s, flags=re.S)
        assert not [c for c in code if re.search(r"#\|\s*(export|hide|slow|echo|fig-alt)", re.sub(r"<[^>]*>", "", c))
                    and "slow" not in c], name
        assert "](http" not in re.sub(r"<[^>]*>", "", "".join(code)), f"{name} has a Markdown link in its code"
        assert not re.search(r"\d+%\|", visible(s)), f"{name} shows a progress bar"


def test_every_figure_has_a_text(pages):
    bare = [f"{n}: {tag[:80]}" for n, s in pages.items() for tag in re.findall(r"<img\b[^>]*>", s) if not re.search(r'\salt="[^"]+', tag)]
    assert not bare, bare


def test_cards_are_in_the_order_of_the_source(pages):
    "Every name of a page has its whole name and a link to its line; neighbours stand as they are defined"
    card = r'<hr ?/?>\s*(?:<p><a href="[^"]*?(\w+\.py)#L(\d+)"[^>]*>source</a></p>)?\s*<h3 id="([^"]+)"'
    found = {n: [(m[1], int(m[2] or 0), m[3]) for m in re.finditer(card, s)] for n, s in pages.items()}
    assert sum(map(len, found.values())) > 500
    assert not [(n, c) for n, cs in found.items() for c in cs if not c[1]]
    order = [c[2] for c in found["core.html"]]
    assert order.index("frames_of") < order.index("clips_of")                 # one cell, in this order
    assert {"student.as_teacher", "student.merged"} <= {c[2] for c in found["student.html"]}      # decorated, and plain
    source = (ROOT / "t2v_turbo/student.py").read_text(encoding="utf-8").splitlines()
    line = next(c[1] for c in found["student.html"] if c[2] == "student.as_teacher")
    assert "def as_teacher" in "".join(source[line-1:line+1])
    assert not [n for n, s in pages.items() if "Call self as a function" in s]


def test_what_a_cell_prints_is_one_block(pages):
    halves = r'<div class="cell-output cell-output-(std\w+)">\s*<pre>[^<]*</pre>\s*</div>\s*<div class="cell-output cell-output-\1">'
    assert '<div class="cell-output cell-output-stdout">' in pages["memory.html"]
    assert not [n for n, s in pages.items() if re.search(halves, re.sub(r"</?code[^>]*>", "", s))]


def test_printed_sentences_fit_the_page(pages):
    "What is wider has columns, and can be scrolled"
    blocks = [b for s in pages.values() for b in re.findall(r"cell-output-stdout[^>]*>\s*<pre[^>]*>(.*?)</pre>", s, flags=re.S)]
    lines = [l for b in blocks for l in html.unescape(re.sub(r"<[^>]*>", "", b)).split("\n")]
    assert len(blocks) > 100 and any(l.startswith("    ") and l.endswith("a higher frame rate.") for l in lines)
    long = [l for l in lines if len(l) > 98 and " " in l and not re.search(r"\S {2,}\S", l)]
    assert not long, long


def test_options_keep_their_dashes(pages):
    assert "--version" in visible(pages["tutorials/first_minutes.html"])
    assert not [n for n, s in pages.items() if re.search(r"[\s(]–[a-z]", visible(s))]


def test_pages_lead_on(pages):
    assert 'href="schedule.html"' in re.search(r'<nav class="page-navigation">.*?</nav>', pages["core.html"], flags=re.S)[0]
    alone = [n for n, s in pages.items() if 'class="page-navigation"' not in s]
    assert not alone, alone


# --- in a browser --------------------------------------------------------------------------------

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *a): pass


@pytest.fixture(scope="module")
def url(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    if not BROWSER: pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield b
        b.close()


@pytest.fixture
def visit(browser, url):
    "Open a page; `page.wrong` collects errors and requests to other hosts"
    contexts = []

    def visit(path, **kw):
        context = browser.new_context(**(dict(viewport=dict(width=1280, height=800)) | kw))
        contexts.append(context)
        page = context.new_page()
        page.wrong = []
        page.on("pageerror", lambda e: page.wrong.append(str(e)))
        page.on("console", lambda m: page.wrong.append(m.text) if m.type == "error" else None)
        # what is still on its way when the page is left (an icon, a video) is broken off by the browser itself
        page.on("requestfailed", lambda r: page.wrong.append(f"failed: {r.url}") if r.failure != "net::ERR_ABORTED" else None)
        page.on("response", lambda r: page.wrong.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
        page.on("request", lambda r: page.wrong.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None)
        page.goto(f"{url}/{path}")
        return page
    yield visit
    for c in contexts: c.close()


def test_every_page_opens_without_an_error(visit, pages, url):
    page = visit("index.html", viewport=dict(width=390, height=844))           # a phone
    for name in sorted(pages):
        page.goto(f"{url}/{name}")
        assert not page.wrong, (name, page.wrong)
        raw = page.evaluate("[...document.querySelectorAll('span.math')].filter(e => !e.querySelector('.katex')).length")
        assert raw == 0, f"{name}: {raw} equations are not rendered"
        assert page.locator(".katex-error").count() == 0, f"{name}: {page.locator('.katex-error').first.get_attribute('title')}"
        assert not re.search(r"\$[^$\n]*\\[a-z]+", page.inner_text("main p >> nth=0")), name
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{name} is {wide} pixels wider than a phone"


def test_an_equation_is_drawn(visit):
    page = visit("consistency.html")
    box = page.locator(".katex-display").first.bounding_box()
    assert box["width"] > 50 and box["height"] > 15
    assert page.evaluate("document.fonts.check('12px KaTeX_Math')")


def test_a_video_plays(visit):
    page = visit("core.html")
    page.locator("video").first.scroll_into_view_if_needed()
    page.wait_for_function("(v => v && v.readyState >= 2 && v.currentTime > 0)(document.querySelector('video'))", timeout=30_000)
    assert page.evaluate("document.querySelector('video').videoWidth") == 128


def test_pictures_are_dragged(visit):
    "explore.js is found from the top and from a folder; what it does is tested in tests/test_explore.py"
    for name, count in (("consistency.html", 1), ("tutorials/touch.html", 5)):
        page = visit(name)
        assert page.locator(".explore").count() == count
        ring = page.get_by_role("slider", name="start noise z")
        page.locator(".explore").first.scroll_into_view_if_needed()
        ring.focus()
        page.keyboard.press("End")
        assert page.locator("output[data-name=z]").inner_text() == "3.00" and not page.wrong
        for i in range(count): page.locator(".explore").nth(i).scroll_into_view_if_needed()
        if count > 1: page.locator("output[data-name=held_out]").wait_for()
        assert not page.wrong and page.get_by_text("does not work").count() == 0


def test_search_finds_and_leads_there(visit, url):
    page = visit("index.html")
    page.locator("#quarto-search input, input[type=search], .search input").first.fill("pseudo_huber")
    hit = page.locator("a[href*='consistency.html']", has_text=re.compile("huber", re.I)).first
    hit.wait_for(timeout=30_000)
    hit.click()
    page.wait_for_url(re.compile("consistency.html"))
    assert not page.wrong


def test_the_colab_link(visit):
    page = visit("solver.html")
    link = page.locator("a:has(.colab-badge)")
    assert link.get_attribute("href") == "https://colab.research.google.com/github/t2v-turbo/t2v_turbo/blob/main/nbs/04_solver.ipynb"
    assert link.is_visible() and link.inner_text() == "Open in Colab"


def test_dark_mode(visit):
    lightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, v) => a + +v, 0)"
    page = visit("core.html", color_scheme="dark")
    assert page.evaluate(lightness) < 200
    assert visit("core.html", color_scheme="light").evaluate(lightness) > 600
