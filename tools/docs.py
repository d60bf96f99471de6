"""The documentation site, from the notebooks: `python tools/docs.py [--out FOLDER] [--workers N] [--proc]`

nbdev processes the notebooks as it does for Quarto, smalldocs renders them from the same `_quarto.yml`, and the rest is
done here: pages get the names that Quarto would give them, links between pages stay inside the site, figures get a text,
and nothing is loaded from another host: KaTeX is fetched once from the npm registry and put beside the pages.
"""
import argparse
import ast
import base64
import hashlib
import html
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import urllib.request
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KATEX = "0.16.11", "RQrI8rlHY92OLf3rho/Ts8i/XvjgguEjOkO1BEXcU3N8BqPpSzBNwV/G0Ukr+P/l3ivvJUE/Fa/CwbS6HesGNQ=="
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
INK = "#262626"                                               # of Matplotlib's letters and axes, in nbs/matplotlibrc
WIDTH = 98                                                    # letters of a print that fit beside the contents
BAR = re.compile(r"\d+%\|")                                   # a progress bar that was stored


def text(s):
    "A notebook's string or list of strings, as one string"
    return s if isinstance(s, str) else "".join(s)


# --- notebooks -----------------------------------------------------------------------------------

def plain(md):
    "The first sentence of Markdown, without its marks"
    s = re.sub(r"\$\$?(.*?)\$\$?", r"\1", md.strip(), flags=re.S)
    s = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", s)
    s = re.sub(r"[`*_>]|\\(?=[a-z])", "", s.split("\n\n")[0].replace("\n", " "))
    return re.split(r"(?<=[.!?:])\s", s)[0].strip()[:200]


def describe(nb):
    "Give every cell that shows a picture a `fig-alt`: the heading above it and the sentence after it"
    head = ""
    for i, c in enumerate(nb["cells"]):
        src = text(c["source"])
        if c["cell_type"] == "markdown":
            head = (re.findall(r"^#+ (.+)$", src, flags=re.M) or [head])[-1]
            continue
        pictures = [o for o in c.get("outputs", []) if {"image/png", "image/svg+xml"} & o.get("data", {}).keys()]
        if c["cell_type"] != "code" or not pictures or "fig-alt" in src: continue
        after = [text(n["source"]) for n in nb["cells"][i+1:i+3] if n["cell_type"] == "markdown"]
        after = [a for a in after if not re.match(r"\s*(#|\$\$|\||-|!|<)", a)]
        alt = ". ".join(filter(None, [plain(head), plain(after[0]) if after else ""])) or "figure"
        c["source"] = f"#| fig-alt: {json.dumps(alt, ensure_ascii=False)}\n{src}"


def without_bars(nb):
    "Drop progress bars, and widgets, which are dead without a kernel"
    dead = lambda o: ("application/vnd.jupyter.widget-view+json" in o.get("data", {}) or BAR.search(text(o.get("text", "")))
                      or BAR.search(text(o.get("data", {}).get("text/plain", ""))))
    for c in nb["cells"]:
        if c["cell_type"] == "code": c["outputs"] = [o for o in c["outputs"] if not dead(o)]


def unlink_code(nb):
    "nbdev links names in the comments of a signature too; inside code that is noise"
    for c in nb["cells"]:
        for o in c.get("outputs", []):
            if "text/markdown" not in o.get("data", {}): continue
            parts = re.split(r"(^```.*?^```)", text(o["data"]["text/markdown"]), flags=re.M | re.S)
            parts[1::2] = [re.sub(r"\[(`[^`]+`)\]\(https?://[^)]*\)", r"\1", p) for p in parts[1::2]]
            o["data"]["text/markdown"] = "".join(parts)


def unnest(nb):
    "nbdev links a name that stands inside a link already: the outer link counts"
    inner = re.compile(r"(\[[^\[\]\n]*)\[(`[^`\n]+`)\]\([^)\n]*\)((?:[^\[\]\n]|\[`[^`\n]+`\]\([^)\n]*\))*\]\()")
    def mend(md):
        while (new := inner.sub(r"\1\2\3", md)) != md: md = new
        return md
    for c in nb["cells"]:
        if c["cell_type"] == "markdown": c["source"] = mend(text(c["source"]))
        for o in c.get("outputs", []):
            if "text/markdown" in o.get("data", {}): o["data"]["text/markdown"] = mend(text(o["data"]["text/markdown"]))


def join_prints(nb):
    "What a cell prints arrives in pieces, cut wherever the kernel was ready to send: one block for each stream"
    for c in nb["cells"]:
        whole = []
        for o in c.get("outputs", []):
            if whole and o["output_type"] == "stream" and (whole[-1]["output_type"], whole[-1].get("name")) == ("stream", o["name"]):
                whole[-1] = whole[-1] | dict(text=text(whole[-1]["text"]) + text(o["text"]))
            else: whole.append(o)
        if c["cell_type"] == "code": c["outputs"] = whole


def fold(nb):
    "A sentence wider than the page is broken as the reader's window would; a table, which has aligned columns, stays"
    wide = lambda line: len(line) > WIDTH and not re.search(r"\S {2,}\S", line)
    how = dict(width=WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    for c in nb["cells"]:
        for o in c.get("outputs", []):
            if o["output_type"] == "stream":
                o["text"] = "\n".join(textwrap.fill(l, **how) if wide(l) else l for l in text(o["text"]).split("\n"))


def line_of(path, name):
    "Where `name`, or `Class.method`, is defined in a file, in the class or patched onto it; 0 if it is not"
    top = ast.parse(path.read_text(encoding="utf-8")).body
    *owner, last = name.split(".")
    inside = [m for n in top if isinstance(n, ast.ClassDef) and [n.name] == owner for m in n.body]
    patched = [n for n in top if isinstance(n, ast.FunctionDef) and n.args.args and n.args.args[0].arg == "self"
               and [ast.unparse(n.args.args[0].annotation or ast.Name(*owner))] == owner]
    return next((n.lineno for n in (inside + patched if owner else top) if getattr(n, "name", None) == last), 0)


def cards(nb, root):
    """Names and signatures as nbdev shows them, in the order of the source and with the whole name

    nbdev turns the functions of one cell round, and loses the class and the source of what is decorated. The code of an exported
    cell follows its cards; where it is open, a card is only the name and the link."""
    card = re.compile(r"(?:#\|.*\n)*show_doc\(([\w.]+)")
    url = re.compile(r"\[source\]\((\S+/blob/\w+/)(\S+?)#L(\d+)\)(\{[^}]*\})")
    body = lambda c: text(c["outputs"][0]["data"]["text/markdown"])
    shown = [c for c in nb["cells"] if c["cell_type"] == "code" and card.match(text(c["source"])) and c.get("outputs")]
    first = next((m for m in map(lambda c: url.search(body(c)), shown) if m), None)
    for c in shown:
        name, md = card.match(text(c["source"]))[1], body(c)
        md = re.sub(r"^(#+) .*$", lambda m: f"{m[1]} " + name.replace("_", r"\_"), md, count=1, flags=re.M)
        md = md.replace("*Call self as a function.*", "").replace("->__main__.", "->")      # no docstring; a class of this page
        line = first and not url.search(md) and line_of(root / first[2], name)
        if line: md = md.replace("---\n", f"---\n\n[source]({first[1]}{first[2]}#L{line}){first[4]}\n", 1)
        c["outputs"][0]["data"]["text/markdown"] = md
    place = lambda c: int((url.search(body(c)) or [0]*4)[3])
    whole, run, source = [], [], None
    for c in [*nb["cells"], None]:
        if any(c is s for s in shown):
            run.append(c)
            continue
        if source and source["metadata"]["exported"] == "shown":           # its first lines are the signature
            for r in run: r["outputs"][0]["data"]["text/markdown"] = re.sub(r"(?m)(^#+ .*$)(?s:.*)", r"\1\n", body(r), count=1)
        whole += [*sorted(run, key=place), *filter(None, [source])]
        run, source = [], c if c and "exported" in c["metadata"] else None
        if c and not source: whole.append(c)
    nb["cells"] = whole


def process(root, workers):
    "nbdev's own processing -> `_proc`, then what smalldocs needs; the name of each page"
    code = (f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import nbdev.serve as s, shown; s.FilterDefaults = shown.Shown; "
            f"s.proc_nbs(n_workers={workers if workers > 1 else 0}, force=True)")
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONWARNINGS": "ignore", "MPLBACKEND": "Agg"}
    subprocess.run([sys.executable, "-c", code], cwd=root, env=env, check=True)
    names = {}
    for p in (root / "_proc").rglob("*.ipynb"):
        nb = json.loads(p.read_text(encoding="utf-8"))
        found = re.search(r"^output-file: (\S+)", text(nb["cells"][0]["source"]), flags=re.M)
        page = p.relative_to(root / "_proc").with_suffix(".html")
        names[page.as_posix()] = (page.parent / (found[1] if found else page.name)).as_posix()
        describe(nb)
        without_bars(nb)
        join_prints(nb)
        fold(nb)
        unlink_code(nb)
        unnest(nb)
        cards(nb, root)
        nb["cells"][0]["source"] = re.sub(r"^output-file:.*\n", "", text(nb["cells"][0]["source"]), flags=re.M)
        p.write_text(json.dumps(nb), encoding="utf-8")
    names["404.html"] = "404.html"
    glossary(root)
    assert len(set(names.values())) == len(names), "two notebooks would have the same page"
    return names


def glossary(root):
    "The tables of tutorials/glossary.ipynb, as a script that nbs/site.js reads -> `_proc/glossary.js`"
    page = "tutorials/glossary.ipynb"
    if not (root / "nbs" / page).exists(): return
    md = "\n\n".join(text(c["source"]) for c in json.loads((root / "nbs" / page).read_text(encoding="utf-8"))["cells"])
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in md.split("\n") if re.match(r"\| (?!---)", line)]
    clear = lambda s: re.sub(r"[`$]|[_^]\{?(?=\w)|\\", "", s)
    letters = [dict(tex=re.findall(r"\$([^$]+)\$", r[0]), code=re.findall(r"`(\w+)`", r[1]), meaning=clear(r[2])) for r in rows if len(r) == 3]
    words = [dict(word=r[0], meaning=clear(r[1])) for r in rows if len(r) == 2]
    found = dict(letters=[l for l in letters if l["tex"]], words=[w for w in words if w["word"] != "word"], page=page.replace(".ipynb", ".html"))
    (root / "_proc/glossary.js").write_text(f"glossary = {json.dumps(found, ensure_ascii=False)};\n", encoding="utf-8")


# --- pages ---------------------------------------------------------------------------------------

def package(name, version, sha):
    "The archive of a package of the npm registry, checked against its hash and kept in the user's cache"
    tgz = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "t2v_turbo" / f"{name}-{version}.tgz"
    good = lambda: tgz.exists() and base64.b64encode(hashlib.sha512(tgz.read_bytes()).digest()).decode() == sha
    if not good():
        tgz.parent.mkdir(parents=True, exist_ok=True)
        if shutil.which("npm"):
            subprocess.run(["npm", "pack", f"{name}@{version}", "--silent"], cwd=tgz.parent, check=True,
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        else:
            urllib.request.urlretrieve(f"https://registry.npmjs.org/{name}/-/{name}-{version}.tgz", tgz)
    if not good(): sys.exit(f"{tgz} is not {name} {version}: delete it and try again")
    return tgz


def katex(folder):
    "KaTeX into `folder`"
    with tempfile.TemporaryDirectory() as tmp, tarfile.open(package("katex", *KATEX)) as tar:
        tar.extractall(tmp, filter="data")
        dist = Path(tmp) / "package/dist"
        for f in ("katex.min.css", "katex.min.js", "contrib/auto-render.min.js", *(f"fonts/{p.name}" for p in dist.glob("fonts/*.woff2"))):
            (folder / f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(dist / f, folder / f)


def relink(url, page, names, home, ids):
    "A link on `page` (its new name), with new names of pages and without the address of the site itself"
    if url.startswith(home):
        path, mark, rest = url[len(home):].lstrip("/").partition("#")
        if rest not in ids.get(path, ()):             # nbdev links private names and methods, which have no place
            rest = rest.split(".")[0] if rest.split(".")[0] in ids.get(path, ()) else ""
            mark = "#" if rest else ""
    elif re.match(r"[a-z][a-z0-9+.-]*:|#|//|$", url):
        return url
    else:
        path, mark, rest = url.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
        if path not in names: return url
    path = names.get(path or "index.html", path or "index.html")
    return posixpath.relpath(path, posixpath.dirname(page) or ".") + mark + rest


def outside(s, up, site):
    "Put pictures and videos that a page holds as text into files of their own, which a browser loads when they come into view"
    def file(m):
        data, ext = base64.b64decode(re.sub(r"\s|%0A", "", m[4])), {"svg+xml": "svg", "jpeg": "jpg"}.get(m[3], m[3])
        path = f"media/{hashlib.sha256(data).hexdigest()[:16]}.{ext}"
        (site / "media").mkdir(exist_ok=True)
        (site / path).write_bytes(data)
        return f'{m[1]}="{up}{path}"'
    s = re.sub(r'((?:xlink:)?href|src)="data:(image|video)/([\w+]+);base64,([^"]{2000,})"', file, s)
    return re.sub(r'<img (?=[^>]*src="[./]*media/)', '<img decoding="async" ', s)


def inked(svg):
    "A figure of Matplotlib in the page's own ink, on the page's own ground; without the names of its parts, which every figure has"
    s = re.sub(rf"(fill|stroke): (?:{INK}|#000000)", r"\1: currentColor", svg)
    s = re.sub(r'(<path\b[^>]*style="[^"]*)fill: #ffffff', r"\1fill: var(--bs-body-bg)", s)
    s = re.sub(r'<g id="\w+?_\d+">', "<g>", re.sub(r'<g id="matplotlib[^"]*">', "<g>", s))
    size, letters = re.search(r'<svg[^>]* width="([\d.]+)pt"', s), re.findall(r'<text style="font(?:-size)?: (?:\w+ )*([\d.]+)px', s)
    least = 9 / min(map(float, letters)) * float(size[1]) if size and letters else 0    # letters of 9 pixels and more
    return s.replace("<svg ", f'<svg class="figure-ink" style="--least: {least:.0f}px" ', 1)


def diagram(img, path):
    "A drawing of nbs/images in the page itself, whose scheme it follows"
    alt = (re.search(r'alt="([^"]*)"', img) or ["", ""])[1]
    return path.read_text(encoding="utf-8").strip().replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1)


def command_links(s, page, names):
    "Link a command that a sentence names to its page, by its verb; what is code, a heading or a link already stays"
    pages = {posixpath.basename(n)[:-5].replace("_", " "): n for n in names.values() if n.startswith("commands/")}
    verbs = "|".join(sorted(map(re.escape, pages), key=len, reverse=True))
    stays = r"(?P<stays><(pre|a|h[1-6]|script|nav|title)\b.*?</\2>)"
    def linked(m):
        at = pages.get(m["verb"])
        if m["stays"] or at == page: return m[0]
        return f'<a href="{posixpath.relpath(at, posixpath.dirname(page) or ".")}">{m[0]}</a>'
    return re.sub(rf"{stays}|<code>t2v-turbo (?P<verb>{verbs})(?![\w-])[^<]*</code>", linked, s, flags=re.S) if pages else s


def finish(site, names, home):
    "Rename the pages, mend their links, and bring in what they would load from elsewhere"
    version = KATEX[0]
    katex(site / "site_libs/katex")
    for css in site.glob("site_libs/themes/*.css"):                      # web fonts; the system's own are used instead
        css.write_text(re.sub(r"@import url\(https?:[^)]*\);?", "", css.read_text(encoding="utf-8")), encoding="utf-8")
    ids = {new: set(re.findall(r'\sid="([^"]+)"', (site / old).read_text(encoding="utf-8"))) for old, new in names.items()}
    for old, new in names.items():
        s = (site / old).read_text(encoding="utf-8")
        up = "../" * new.count("/")
        s = s.replace(f"https://cdn.jsdelivr.net/npm/katex@{version}/dist", f"{up}site_libs/katex")
        s = re.sub(rf'<img\b[^>]*src="{re.escape(BADGE)}"[^>]*>', '<span class="colab-badge">Open in Colab</span>', s)
        s = re.sub(r'(\s(?:href|src))="([^"]*)"',
                   lambda m: f'{m[1]}="{html.escape(relink(html.unescape(m[2]), new, names, home, ids), quote=True)}"'
                   if len(m[2]) < 2000 else m[0], s)
        s = re.sub(r'(<i class="bi [\w-]+") role="img"></i>', r'\1 aria-hidden="true"></i>', s)     # beside its own word
        s = re.sub(rf'(:image" content="{re.escape(home)}/)(?:\w+/)+(?=images/card\.png")', r"\1", s)             # beside the first page, not this one
        s = re.sub(r"<svg alt=", '<svg role="img" aria-label=', s)
        s = re.sub(r'<svg\b[^>]*>(?:(?!</svg>).)*?<g id="figure_1">.*?</svg>', lambda m: inked(m[0]), s, flags=re.S)
        s = re.sub(r'<img\b[^>]*src="([^"]*images/method\.svg)"[^>]*>', lambda m: diagram(m[0], site / posixpath.join(posixpath.dirname(old), m[1])), s)
        s = outside(s, up, site)
        s = re.sub(r"(?<=[\s(])–(?=[a-z])", "--", s)                          # an option, not a dash
        s = command_links(s, new, names)
        s = re.sub(r"(<pre\b.*?</pre>)|<code>([^<]*)</code>", lambda m: m[1] or "<code>" + re.sub(
            r"(?<![\w-])--[\w-]+|-&gt;", r'<span class="option">\g<0></span>', m[2]) + "</code>", s, flags=re.S)
        (site / old).unlink()
        (site / new).write_text(s, encoding="utf-8")
    found = json.loads((site / "search.json").read_text(encoding="utf-8"))
    for entry in found:
        for key in ("objectID", "href"):
            page, mark, rest = entry[key].partition("#")
            entry[key] = names.get(page, page) + mark + rest
    (site / "search.json").write_text(json.dumps(found), encoding="utf-8")
    if (site / "sitemap.xml").exists():
        s = (site / "sitemap.xml").read_text(encoding="utf-8")
        s = re.sub(r"<url>\s*<loc>[^<]*/404\.html</loc>.*?</url>\s*", "", s, flags=re.S)
        s = re.sub(rf"{re.escape(home)}/([^<]+)", lambda m: f"{home}/{names.get(m[1], m[1])}", s)
        (site / "sitemap.xml").write_text(s, encoding="utf-8")
    lost = site / "404.html"                                              # is shown at any address below `home`
    base = posixpath.join("/", home.split("/", 3)[3], "")
    lost.write_text(lost.read_text(encoding="utf-8").replace("<head>", f"<head><script>if (location.pathname.startsWith({json.dumps(base)})) "
                    f"document.write('<base href=\"{base}\">')</script>", 1), encoding="utf-8")
    (site / ".nojekyll").touch()


def main(out="", workers=1, root=ROOT):
    "Build the site and return its folder"
    ini = ConfigParser(delimiters=["="])
    ini.read(root / "settings.ini", encoding="utf-8")
    home = ini["DEFAULT"]["doc_host"] + ini["DEFAULT"]["doc_baseurl"]
    names = process(root, workers)
    from smalldocs.layout import KATEX as wanted
    from smalldocs.site import build
    assert f"katex@{KATEX[0]}/" in wanted, f"smalldocs now wants {wanted}: change KATEX in tools/docs.py"
    site = build(root / "_proc", quiet=True)
    finish(site.out, names, home)
    out = Path(out or root / ini["DEFAULT"]["doc_path"]).resolve()
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(site.out, out)
    renamed = {posixpath.basename(n) for n in names.values()}                # smalldocs looked for these links too early
    for w in site.warnings:
        link = re.search(r"broken link (\S+?)(#\S*)?$", w)
        of_quarto = re.match(r"format[. ]", w)                               # an option that only Quarto knows
        if not of_quarto and not (link and posixpath.basename(link[1]) in renamed): print(f"warning: {w}", file=sys.stderr)
    print(f"{len(names)} pages in {out}")
    return out


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", default="", help="the folder to write (default: doc_path of settings.ini)")
    p.add_argument("--workers", type=int, default=1, help="notebooks to process at a time")
    p.add_argument("--proc", action="store_true", help="only write _proc, for Quarto")
    p.add_argument("--root", type=Path, default=ROOT, help="the repository")
    a = p.parse_args()
    process(a.root.resolve(), a.workers) if a.proc else main(a.out, a.workers, a.root.resolve())
