"The documentation: built once from the notebooks, then read as files and opened in a real browser"
import functools
import html
import importlib
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from configparser import ConfigParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
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
    if os.environ.get("SITE"): return Path(os.environ["SITE"])           # one that `make docs` has built
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
    assert len(pages) == len(notebooks) + 1                             # 404.html
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
        links = "](http" in re.sub(r"<[^>]*>", "", "".join(code))
        assert not links or name == "card.html", f"{name} has a Markdown link in its code"      # the card is Markdown
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
    assert 'href="explore.html"' in re.search(r'<nav class="page-navigation">.*?</nav>', pages["core.html"], flags=re.S)[0]
    alone = [n for n, s in pages.items() if 'class="page-navigation"' not in s and n != "404.html"]
    assert not alone, alone


def code_of(page):
    "Blocks of code of a page, without marks -> [(whether it is folded, text)]"
    parts = re.split(r'(<details class="code-fold">|</details>)', page)
    found, folded = [], False
    for part in parts:
        if part.startswith("<details"): folded = True
        elif part == "</details>": folded = False
        else: found += [(folded, html.unescape(re.sub(r"<[^>]*>", "", b))) for b in re.findall(r'<code class="sourceCode python">(.*?)</code>', part, flags=re.S)]
    return found


def test_exported_code_is_on_the_page_open_in_the_method_and_folded_elsewhere(pages):
    of = yaml.safe_load((NBS / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    method = {n for s in of if s["section"] == "The method, in order" for n in s["contents"]}
    seen = dict(shown=0, folded=0)
    for nb in (n for n in notebooks if n[0].isdigit()):
        blocks = code_of(pages[re.sub(r"^\d+\w?_(.*)\.ipynb", r"\1.html", nb)])
        for c in cells(nb):
            src = text(c["source"])
            if c["cell_type"] != "code" or not re.match(r"#\| exports?\n", src) or not re.search(r"^(def|class) ", src, flags=re.M): continue
            code = re.sub(r"^#\|.*\n", "", src, flags=re.M).strip()
            how = [f for f, b in blocks if b.strip() == code]
            assert how, f"{nb}: not on its page:\n{code[:200]}"
            assert all(f == (nb not in method) for f in how), f"{nb}: {'open' if nb not in method else 'folded'}:\n{code[:200]}"
            seen["shown" if nb in method else "folded"] += 1
    assert seen["shown"] > 80 and seen["folded"] > 250, seen


def test_links_around_names_are_links(pages):
    broken = [(n, m) for n, s in pages.items() for m in re.findall(r"\]\([\w./#-]+\)", re.sub(r"<[^>]*>", "", re.sub(
        r"<(script|style|pre|svg)\b.*?</\1>|<code>[^<]*</code>", "", s, flags=re.S)))]
    assert not broken, broken[:5]
    assert 'href="consistency.html#pseudo_huber"' in pages["api.html"] and "t2v_turbo/consistency.py#L" in pages["api.html"]


def test_pages_are_light(site, pages):
    "A page with the pictures and videos that only it shows"
    for name, s in pages.items():
        own = {m for m in re.findall(r'(?:src|href)="((?:\.\./)*media/[^"]+)"', s)}
        size = len(s.encode()) + sum((site / posixpath.normpath(posixpath.join(posixpath.dirname(name), m))).stat().st_size for m in own)
        assert size <= 600_000, f"{name} has {size // 1000} kB"
        assert not re.search(r'(?:src|href)="data:(?:image|video)/[^"]{4000,}', s), f"{name} holds a large picture as text"


def test_a_page_for_lost_readers_and_a_card_for_links(site, pages):
    lost = pages["404.html"]
    assert "There is no page at this address" in lost and '<base href="/t2v_turbo/">' in lost and lost.index("<base") < lost.index("stylesheet")
    assert "404" not in (site / "sitemap.xml").read_text()
    for n, s in pages.items():
        assert '<meta property="og:image" content="https://t2v-turbo.github.io/t2v_turbo/images/card.png">' in s, n
    assert (site / "images/card.png").read_bytes()[16:24] == (1200).to_bytes(4, "big") + (630).to_bytes(4, "big")
    assert re.search(r'href="files.html"[^>]*><span class="menu-text">The method</span>', pages["index.html"])


def test_the_diagram_is_part_of_the_page(pages):
    for n in ("index.html", "distill.html"):
        svg = re.search(r'<svg role="img" aria-label="([^"]{80,})"[^>]*class="method-diagram".*?</svg>', pages[n], flags=re.S)
        assert svg and "x0" in svg[0], n


def glossary(site): return json.loads((site / "glossary.js").read_text(encoding="utf-8").removeprefix("glossary = ").rstrip(";\n"))


def test_letters_of_the_glossary_are_in_the_code(site):
    "A name that the method's code no longer has would highlight nothing"
    found = glossary(site)
    code = "\n".join(text(c["source"]) for n in notebooks if re.match(r"(0\d|1[0-8])\w?_", n) for c in cells(n) if c["cell_type"] == "code")
    assert len(found["letters"]) > 25 and len(found["words"]) > 20
    dead = [c for l in found["letters"] for c in l["code"] if not re.search(rf"\b{c}\b", code)]
    assert not dead, dead
    assert not [l for l in found["letters"] + found["words"] if not l["meaning"] or "$" in l["meaning"] or "`" in l["meaning"]]


def test_citation():
    cff, ini = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8")), ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    assert {"cff-version", "message", "title", "authors", "version", "license", "repository-code", "preferred-citation"} <= cff.keys()
    assert str(cff["version"]) == ini["DEFAULT"]["version"] and cff["license"] == "Apache-2.0" and cff["cff-version"] == "1.2.0"
    assert all({"name"} <= a.keys() or {"family-names", "given-names"} <= a.keys() for a in cff["authors"] + cff["preferred-citation"]["authors"])
    bib = text(next(c for c in cells("index.ipynb") if "```bibtex" in text(c["source"]))["source"])
    assert cff["preferred-citation"]["title"] in bib and str(cff["preferred-citation"]["year"]) in bib


# --- in a browser --------------------------------------------------------------------------------

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *a): pass


@pytest.fixture(scope="module")
def url(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


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
    page = visit("tutorials/first_video.html")
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
    assert link.get_attribute("href") == "https://colab.research.google.com/github/t2v-turbo/t2v_turbo/blob/main/nbs/05_solver.ipynb"
    assert link.is_visible() and link.inner_text() == "Open in Colab"


def test_dark_mode(visit):
    lightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, v) => a + +v, 0)"
    page = visit("core.html", color_scheme="dark")
    assert page.evaluate(lightness) < 200
    assert visit("core.html", color_scheme="light").evaluate(lightness) > 600


READY = "document.documentElement.dataset.ready !== undefined"


def test_a_letter_of_an_equation_and_its_lines_of_code_light_up(visit):
    page = visit("consistency.html")
    page.wait_for_function(READY)
    lit = lambda: {t for t in page.eval_on_selector_all("code .letter-on", "es => es.map(e => e.textContent)")}
    line = """() => [...document.querySelectorAll('.letter-line')].map(l => {
        const r = l.getBoundingClientRect(), pre = l.closest('pre'), text = pre.innerText.split('\\n');
        const rows = pre.querySelector('code').getBoundingClientRect(), each = rows.height/text.length;
        return text[Math.round((r.top - rows.top)/each)]})"""
    letter = page.locator(".katex-display [data-letter]", has_text="skip").first
    letter.scroll_into_view_if_needed()
    letter.hover()
    assert lit() == {"c_skip", "boundary"} and page.locator(".katex .letter-on").count() > 2
    assert any("c_skip, c_out = [expand_to" in l for l in page.evaluate(line)) and any("def boundary(" in l for l in page.evaluate(line))
    assert "weight of zt in f" in page.inner_text("#glossary-note")
    page.mouse.move(0, 0)
    assert not lit() and not page.locator(".letter-line").count() and page.locator("#glossary-note").is_hidden()
    word = page.locator("code .letter", has_text=re.compile("^x0$")).first                # and from the code to the equation
    word.scroll_into_view_if_needed()
    word.hover()
    assert "x" in "".join(page.locator(".katex .letter-on").all_inner_texts()) and page.locator(".katex .letter-on").count() >= 1
    assert not page.wrong


def test_letters_can_be_reached_by_the_keyboard(visit):
    page = visit("consistency.html")
    page.wait_for_function(READY)
    box = page.locator(".katex-display:has([data-letter])").first
    box.focus()
    here = []
    for _ in range(3):
        page.keyboard.press("ArrowRight")
        here.append(page.locator(".letter-here").first.inner_text())
        assert page.locator("#glossary-note").is_visible() and page.locator("code .letter-on").count()
    assert len(set(here)) > 1
    page.keyboard.press("Escape")
    assert page.locator("#glossary-note").is_hidden() and not page.locator(".letter-on").count()


def test_every_equation_is_as_it_was(visit, pages):
    "Letters are marked by setting an equation again: the same signs stand there"
    page = visit("index.html")
    plain = lambda: page.evaluate("[...document.querySelectorAll('.katex-html')].map(e => e.textContent.replace(/[\\u200b\\s]/g, ''))")
    page.route("**/glossary.js", lambda r: r.fulfill(body="", content_type="text/javascript"))
    for name in ("solver.html", "consistency.html", "distill.html"):
        page.goto(page.url.rsplit("/", 1)[0] + "/" + name); page.wait_for_function(READY)
        bare = plain()
        page.unroute("**/glossary.js")
        page.reload(); page.wait_for_function(READY)
        assert page.locator(".katex [data-letter]").count() > 5
        assert plain() == bare, name
        page.route("**/glossary.js", lambda r: r.fulfill(body="", content_type="text/javascript"))


def test_words_have_their_meaning(visit, site):
    page = visit("distill.html")
    page.wait_for_function(READY)
    meaning = {w["word"].lower(): w["meaning"] for w in glossary(site)["words"]}
    words = page.locator("a.term")
    shown = [t.lower() for t in words.all_inner_texts()]
    assert len(shown) > 3 and len(set(shown)) == len(shown)
    words.first.focus()
    assert page.inner_text("#glossary-note") == meaning[shown[0]]
    assert words.first.get_attribute("aria-describedby") == "glossary-note"
    page.keyboard.press("Escape")
    assert page.locator("#glossary-note").is_hidden()
    words.first.click()
    page.wait_for_url(re.compile("glossary.html#words"))


def luminance(c):
    r, g, b = ((v/12.92 if v <= .03928 else ((v + .055)/1.055)**2.4) for v in (int(x)/255 for x in re.findall(r"\d+", c)[:3]))
    return .2126*r + .7152*g + .0722*b


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_search_results_can_be_read(visit, scheme):
    page = visit("index.html", color_scheme=scheme)
    page.locator("#quarto-search input").fill("pseudo_huber")
    page.locator(".search-result").first.wait_for(timeout=30_000)
    ground = page.evaluate("getComputedStyle(document.querySelector('.smalldocs-search-results')).backgroundColor")
    for part in ("title", "section", "text"):
        ink = page.evaluate(f"getComputedStyle(document.querySelector('.search-result-{part}')).color")
        a, b = sorted((luminance(ink), luminance(ground)))
        assert (b + .05)/(a + .05) >= 4.5, (part, ink, ground)


def test_code_is_broken_at_1280_and_on_paper_and_what_scrolls_has_the_keyboard(visit, url):
    page = visit("index.html")
    wide = "[...document.querySelectorAll('main pre.sourceCode')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    cut = """[...document.querySelectorAll('main *')].filter(e => e.scrollWidth > e.clientWidth + 1 && /auto|scroll/.test(getComputedStyle(e).overflowX)
             && e.tabIndex < 0).map(e => e.tagName + '.' + e.className)"""
    for name in ("solver.html", "distill.html", "tutorials/one_screen.html", "memory.html"):
        page.set_viewport_size(dict(width=1280, height=800))
        page.goto(f"{url}/{name}"); page.wait_for_function(READY)
        assert page.evaluate(wide) == 0, name
        page.emulate_media(media="print"); page.set_viewport_size(dict(width=720, height=1000))
        assert page.evaluate(wide) == 0 and page.locator("#quarto-sidebar").is_hidden(), name
        page.emulate_media(media="screen"); page.set_viewport_size(dict(width=390, height=844))
        page.wait_for_timeout(100)
        assert page.evaluate(cut) == [], name


def test_letters_of_drawings_are_large_enough(visit, url):
    page = visit("index.html")
    small = """[...document.querySelectorAll('main svg.figure-ink text, main svg.method-diagram text')].map(t => {
        const m = t.getScreenCTM(); return [parseFloat(getComputedStyle(t).fontSize)*Math.hypot(m.a, m.b), t.textContent]}).filter(([px]) => px < 8.95)"""
    for width in (1280, 390):
        page.set_viewport_size(dict(width=width, height=844))
        for name in ("index.html", "distill.html", "schedule.html", "solver.html", "consistency.html"):
            page.goto(f"{url}/{name}"); page.wait_for_function(READY)
            assert page.locator("svg.figure-ink, svg.method-diagram").count(), name
            assert page.evaluate(small) == [], (name, width)


def test_a_drawing_is_in_the_page_s_ink(visit):
    for scheme, bright in (("light", False), ("dark", True)):
        page = visit("schedule.html", color_scheme=scheme)
        page.wait_for_function(READY)
        fill = page.evaluate("getComputedStyle(document.querySelector('svg.figure-ink text')).fill")
        assert (luminance(fill) > .5) == bright, (scheme, fill)


def test_a_moving_picture_stops(visit):
    page = visit("core.html")
    page.wait_for_function(READY)
    button = page.locator(".moving > button").first
    button.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('.moving > button').textContent === 'Pause'")
    button.click()
    assert button.inner_text() == "Play" and page.locator(".moving > canvas").first.is_visible() and page.locator(".moving > img").first.is_hidden()
    page = visit("core.html", reduced_motion="reduce")
    page.wait_for_function(READY)
    page.locator(".moving").first.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('.moving > button').textContent === 'Play'")


AXE = "4.14.1", "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="


@pytest.mark.parametrize("name", ["index.html", "consistency.html", "memory.html", "api.html", "experiments/three_seeds.html", "tutorials/glossary.html", "404.html"])
def test_axe_finds_nothing_serious(visit, name):
    "A page of each kind, once on a light desk and once on a dark phone"
    sys.path.insert(0, str(ROOT / "tools"))
    try: docs = importlib.import_module("docs")
    finally: sys.path.pop(0)
    try: archive = docs.package("axe-core", *AXE)
    except (OSError, subprocess.CalledProcessError): pytest.skip("axe-core cannot be fetched from the npm registry")
    with tarfile.open(archive) as tar: axe = tar.extractfile("package/axe.min.js").read().decode()
    for kw in (dict(color_scheme="light"), dict(color_scheme="dark", viewport=dict(width=390, height=844))):
        page = visit(name, **kw)
        page.wait_for_function(READY)
        page.evaluate(axe)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        bad = [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]
        assert not bad, bad
