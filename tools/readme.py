"README.md from nbs/index.ipynb: `python tools/readme.py` writes it, `--check` compares."
import base64
import json
import posixpath
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r'(\]\(|(?:src|href)=")(?![a-z][a-z0-9+.-]*:|[#/])([^)"\s]+)')


def text(s):
    "A notebook's string or list of strings, as one string"
    return s if isinstance(s, str) else "".join(s)


def relink(md):
    "Links relative to nbs/ -> links relative to the root, outside fenced code"
    parts = re.split(r"(^```.*?^```)", md, flags=re.M | re.S)
    fix = lambda m: m[1] + posixpath.normpath("nbs/" + m[2])
    return "".join(p if i % 2 else LINK.sub(fix, p) for i, p in enumerate(parts))


def output(o, files):
    "Markdown of one stored output; images are added to `files`"
    data = o.get("data", {})
    if o["output_type"] == "stream":
        return "" if o["name"] == "stderr" else "```\n" + text(o["text"]).strip() + "\n```"
    if "image/png" in data:
        name = f"nbs/index_files/figure-{len(files) + 1}.png"
        files[name] = base64.b64decode(text(data["image/png"]))
        return f"![]({name})"
    if "text/markdown" in data:
        return relink(text(data["text/markdown"])).strip()
    plain = text(data.get("text/plain", "")).strip()
    return f"```\n{plain}\n```" if plain else ""


def render(path=ROOT / "nbs/index.ipynb"):
    "-> {file name: bytes}: README.md and the images it shows"
    blocks, files = [], {}
    for c in json.loads(Path(path).read_text(encoding="utf-8"))["cells"]:
        src = text(c["source"]).strip()
        flags = re.findall(r"^#\|\s*(.+?)\s*$", src, flags=re.M)
        if c["cell_type"] == "markdown":
            blocks.append(relink(src))
        if c["cell_type"] != "code" or {"hide", "include: false"} & set(flags):
            continue
        code = re.sub(r"^#\|.*\n?", "", src, flags=re.M).strip()
        if code and "echo: false" not in flags:
            blocks.append(f"```python\n{code}\n```")
        if "output: false" not in flags:
            blocks += [output(o, files) for o in c["outputs"]]
    note = "<!-- Written by tools/readme.py from nbs/index.ipynb. Edit the notebook. -->"
    md = "\n\n".join(b for b in [note, *blocks] if b) + "\n"
    return {"README.md": md.encode(), **files}


def main(check):
    "Write the files, or name those that differ"
    want = render()
    read = lambda p: p.read_bytes() if p.exists() else None
    stale = [n for n, b in want.items() if read(ROOT / n) != b]
    if check and stale:
        return f"{', '.join(stale)} differ from nbs/index.ipynb; run: python tools/readme.py"
    for n in stale:
        (ROOT / n).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / n).write_bytes(want[n])


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
