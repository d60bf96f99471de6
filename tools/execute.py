"""Execute notebooks and keep their outputs: `python tools/execute.py NOTEBOOK ... [--figures] [--clean]`

Figures are drawn in the one style of nbs/matplotlibrc, as SVG where that is small; in an SVG, a picture of many colours is stored as JPEG.
Progress bars and widgets, which are dead without a kernel, are not kept. Cells marked `#| eval: false` are not run and keep no outputs.
`--figures` keeps only the new figures, and every other output as it was. `--clean` executes nothing: it drops the bars and widgets that are stored.
"""
import argparse
import base64
import io
import json
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
SVG, PNG, WIDGET = "image/svg+xml", "image/png", "application/vnd.jupyter.widget-view+json"
BAR = re.compile(r"\d+%\|")                          # tqdm's
LARGEST = 160_000                                    # letters of a drawing; what has more, and more than half of its pixels' letters, is kept as pixels
EMBEDDED = re.compile(r"data:image/png;base64,\s*([A-Za-z0-9+/=\s]+)")


def text(s): return s if isinstance(s, str) else "".join(s)


def dead(o):
    "Whether an output is a widget or a progress bar"
    data = o.get("data", {})
    return WIDGET in data or bool(BAR.search(text(o.get("text", "")) + text(data.get("text/plain", ""))))


def without_bars(o):
    "An output without its progress bars; `None` if nothing is left"
    if o["output_type"] == "stream" and dead(o):
        lines = [l.rpartition("\r")[2] if not BAR.search(l.rpartition("\r")[2]) else "" for l in text(o["text"]).splitlines(True)]
        kept = [l for l in lines if l.strip()]
        return o | dict(text=kept) if kept else None
    return None if dead(o) else o


def clean(nb):
    "Drop bars and widgets from every cell, and the widgets' state -> whether there were any"
    found = bool(nb["metadata"].pop("widgets", None))
    for c in nb["cells"]:
        if c["cell_type"] != "code": continue
        kept = [k for k in map(without_bars, c["outputs"]) if k]
        found |= kept != c["outputs"]
        c["outputs"] = kept
    return found


def as_jpeg(match):
    "An SVG's embedded PNG as JPEG, if that halves it and the picture is opaque"
    from PIL import Image
    png, small = base64.b64decode(match[1]), io.BytesIO()
    with Image.open(io.BytesIO(png)) as im:
        if im.convert("RGBA").getextrema()[3][0] < 255: return match[0]
        im.convert("RGB").save(small, "JPEG", quality=88, subsampling=0, optimize=True)
    if 2*len(small.getvalue()) > len(png): return match[0]
    return "data:image/jpeg;base64,\n" + base64.b64encode(small.getvalue()).decode()


def one_picture(o):
    "Of a figure in two formats the drawing, where it is small, without the date and the frame of a file of its own"
    data = o.get("data", {})
    if SVG not in data or PNG not in data: return o
    svg = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>|\s*<metadata>.*?</metadata>", "", text(data[SVG]), flags=re.S).strip()
    svg = EMBEDDED.sub(as_jpeg, svg)
    keep = {SVG: svg.splitlines(True)} if len(svg) <= max(LARGEST, len(text(data[PNG])) / 2) else {PNG: data[PNG]}
    return o | dict(data={k: v for k, v in data.items() if k not in (SVG, PNG)} | keep)


def pictures(c): return [o for o in c.get("outputs", []) if {SVG, PNG} & o.get("data", {}).keys()]


def execute(path, figures=False):
    "Run a notebook in its own folder and write its outputs into it"
    os.environ.setdefault("MATPLOTLIBRC", str(NBS / "matplotlibrc"))
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    old, new = json.loads(path.read_text(encoding="utf-8")), read_nb(path)
    os.chdir(path.parent)
    shell = CaptureShell(path=path.parent)
    shell._run("set_matplotlib_formats('svg', 'png')")
    for n, c in zip(new.cells, old["cells"]):
        if n.cell_type != "code": continue
        n.outputs = []
        if re.search(r"^#\|\s*eval:\s*false\b", n.source, flags=re.M):
            c["outputs"] = []
            continue
        if re.search(r"^#\|\s*(cuda|net)\b", n.source, flags=re.M) or re.search(r"^#\| hide\n# on Colab|nbdev_export\(", n.source): continue
        if n.source.rstrip().endswith(";"):                # execnb would drop what such a cell prints
            n.source = n.source.rstrip()[:-1] + "\nNone"
        shell.cell(n)
        if shell.exc: raise shell.exc
        made = [one_picture(k) for k in map(without_bars, json.loads(json.dumps(n.outputs))) if k]
        if not figures: c["outputs"] = made
        elif pictures(c):
            fresh = iter(pictures(dict(outputs=made)))
            c["outputs"] = [next(fresh, o) if o in pictures(c) else o for o in c["outputs"]]
    clean(old)
    return old


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("notebooks", nargs="*", type=Path, help="default with --clean: all")
    p.add_argument("--figures", action="store_true", help="keep every output but figures as it was")
    p.add_argument("--clean", action="store_true", help="only drop stored progress bars and widgets")
    a = p.parse_args(argv)
    if not a.notebooks and not a.clean: p.error("name a notebook")
    for nb in [n.resolve() for n in a.notebooks] or sorted(NBS.rglob("*.ipynb")):
        begin, before = time.time(), nb.read_text(encoding="utf-8")
        if a.clean:
            done = json.loads(before)
            if not clean(done): continue
        else: done = execute(nb, a.figures)
        after = json.dumps(done, indent=1, ensure_ascii=False) + "\n"
        if after != before: nb.write_text(after, encoding="utf-8")
        print(f"{nb.name}  {time.time() - begin:.0f} s  {len(after) // 1000} kB", flush=True)


if __name__ == "__main__": sys.exit(main())
