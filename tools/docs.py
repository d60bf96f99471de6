"""The documentation site, from the notebooks: `python tools/docs.py [--out FOLDER] [--workers N]`

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

    nbdev turns the functions of one cell round, and loses the class and the source of what is decorated."""
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
    run = []
    for i, c in enumerate([*nb["cells"], None]):
        if any(c is s for s in shown): run.append(i)
        elif run:
            place = lambda c: int((url.search(body(c)) or [0]*4)[3])
            for j, old in zip(run, sorted((nb["cells"][j] for j in run), key=place)): nb["cells"][j] = old
            run = []


def process(root, workers):
    "nbdev's own processing -> `_proc`, then what smalldocs needs; the name of each page"
    code = f"from nbdev.serve import proc_nbs; proc_nbs(n_workers={workers if workers > 1 else 0}, force=True)"
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
        cards(nb, root)
        nb["cells"][0]["source"] = re.sub(r"^output-file:.*\n", "", text(nb["cells"][0]["source"]), flags=re.M)
        p.write_text(json.dumps(nb), encoding="utf-8")
    assert len(set(names.values())) == len(names), "two notebooks would have the same page"
    return names


# --- pages ---------------------------------------------------------------------------------------

def katex(folder):
    "KaTeX of the npm registry, checked against its hash, into `folder`; kept in the user's cache"
    version, sha = KATEX
    tgz = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "t2v_turbo" / f"katex-{version}.tgz"
    good = lambda: tgz.exists() and base64.b64encode(hashlib.sha512(tgz.read_bytes()).digest()).decode() == sha
    if not good():
        tgz.parent.mkdir(parents=True, exist_ok=True)
        if shutil.which("npm"):
            subprocess.run(["npm", "pack", f"katex@{version}", "--silent"], cwd=tgz.parent, check=True,
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        else:
            urllib.request.urlretrieve(f"https://registry.npmjs.org/katex/-/katex-{version}.tgz", tgz)
    if not good(): sys.exit(f"{tgz} is not KaTeX {version}: delete it and try again")
    with tempfile.TemporaryDirectory() as tmp, tarfile.open(tgz) as tar:
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
        s = re.sub(r"<svg alt=", '<svg role="img" aria-label=', s)
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
        s = re.sub(rf"{re.escape(home)}/([^<]+)", lambda m: f"{home}/{names.get(m[1], m[1])}", s)
        (site / "sitemap.xml").write_text(s, encoding="utf-8")
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
    p.add_argument("--root", type=Path, default=ROOT, help="the repository")
    a = p.parse_args()
    main(a.out, a.workers, a.root.resolve())
