"""Memory and time of `t2v-turbo convert videocrafter2` at full size, on random weights in the published layout.

    python bench/convert.py                       # writes 7.4 GB and as much again, a table in markdown, then removes both
    python bench/convert.py --small               # the same on tiny networks, in seconds
    python bench/convert.py --interrupt SIGINT SIGKILL    # first stopped half way: what is left, and does the next run mind?
    python bench/convert.py --folder /scratch --json rows.json

Building the file, converting it and loading the result are processes of their own, so that the memory of one does not count
for another. Peak memory is what the kernel says of the converter when it has ended (`ru_maxrss`). It counts pages of the
checkpoint that are mapped into memory, which the kernel can drop at any time; the peak of the rest (`RssAnon`) is read from
/proc while it runs.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GIB = 2**30
COMMAND = ["-m", "t2v_turbo.cli"]                        # what the interpreter runs

BUILD = """if 1:
    import sys, torch
    from t2v_turbo.standins import random_videocrafter2, vc2_sizes
    state = random_videocrafter2(vc2_sizes(tiny=sys.argv[2] == 'small'))
    print(len(state), sum(v.numel() for v in state.values()))
    torch.save(dict(state_dict=state, global_step=1), sys.argv[1])"""

LOAD = """if 1:
    import json, sys
    sys.modules['t2v_turbo'] = None                      # stock classes only
    from diffusers import TextToVideoSDPipeline
    pipe = TextToVideoSDPipeline.from_pretrained(sys.argv[1], local_files_only=True)
    count = {n: sum(p.numel() for p in m.parameters()) for n, m in pipe.components.items() if hasattr(m, 'parameters')}
    assert not any(p.is_meta for n in count for p in pipe.components[n].parameters())
    print(json.dumps(count))"""


def size_of(folder):
    "Bytes of all files below; files come and go while a conversion runs"
    total = 0
    for at, _, names in os.walk(folder):
        for n in names:
            try: total += os.path.getsize(os.path.join(at, n))
            except FileNotFoundError: pass
    return total


def python(code, *args):
    "The last line that a process of its own prints"
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], check=True, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1]


def vocabulary(path, n):
    "A merge list of the size of CLIP's, pairs of the letters that bytes are written as"
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    pairs = [f"{a} {b}" for a in letters for b in letters][:n]
    path.write_text("\n".join(["#version: made up", *pairs, ""]), encoding="utf-8")
    return path


def own_memory(pid):
    "Bytes of a process that belong to no file; `None` where there is no /proc"
    try: text = Path(f"/proc/{pid}/status").read_text()
    except OSError: return None
    found = [line.split()[1] for line in text.splitlines() if line.startswith("RssAnon")]
    return 1024 * int(found[0]) if found else None


def convert(checkpoint, out, merges, stop=None, at=0):
    "Run the command; with `stop`, send that signal when `at` bytes are written. What it cost, and how it ended"
    command = [sys.executable, *COMMAND, "convert", "videocrafter2", checkpoint, out, "--vocabulary", merges]
    old, started, own, sent, since = set(out.parent.glob(".tmp-*")), time.perf_counter(), 0, None, 0
    with open(out.with_suffix(".log"), "w+") as log:
        child = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)      # its own usage, not that of all children
            if pid: break
            own = max(own, own_memory(child.pid) or 0)
            written = sum(map(size_of, set(out.parent.glob(".tmp-*")) - old))
            if stop and not sent and written > at:
                sent, since = written, time.perf_counter()
                child.send_signal(stop)
            time.sleep(.005)
        child.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        text = log.read()
    now = time.perf_counter()
    unit = 1 if sys.platform == "darwin" else 1024
    return dict(exit=child.returncode, seconds=now - started, cpu=usage.ru_utime + usage.ru_stime, sent_at=sent, waited=now - since,
                peak_gib=usage.ru_maxrss * unit / GIB, own_gib=own / GIB, bar="%|" in text, said=text)


def left(folder, names):
    "What lies in the folder besides the files that we put there"
    return {p.name: size_of(p) for p in folder.iterdir() if p.name not in names}


def table(rows): return "\n".join(["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows.items())])


def bench(folder, args):
    "All steps in one folder; rows of the table"
    checkpoint, out = folder / "model.ckpt", folder / "vc2"
    tensors, numbers = map(int, python(BUILD, checkpoint, "small" if args.small else "full").split())
    merges, size = vocabulary(folder / "merges.txt", 6 if args.small else 48894), checkpoint.stat().st_size
    ours = {p.name for p in folder.iterdir()} | {"vc2.log"}
    rows = {"checkpoint": f"{size / 1e9:.3g} GB, {tensors} tensors, {numbers / 1e9:.3g} G numbers"}
    for name in args.interrupt:
        got = convert(checkpoint, out, merges, getattr(signal, name), size / 2)
        if got["sent_at"] is None or out.exists(): sys.exit(f"the conversion ended before {name}:\n{got['said']}")
        rest = left(folder, ours)
        ours |= set(rest)
        rows[name] = (f"sent after {got['sent_at'] / 1e9:.3g} GB, ended {got['waited']:.2g} s later, exit code {got['exit']}; left: "
                      + (", ".join(f"{n}/ of {b / 1e9:.3g} GB" for n, b in rest.items()) or "nothing"))
    got = convert(checkpoint, out, merges)
    if got["exit"]: sys.exit(f"the conversion failed:\n{got['said']}")
    if args.interrupt: rows["run after that"] = "fine" if left(folder, ours).keys() == {"vc2"} else "left something behind"
    rows |= {"folder": f"{size_of(out) / 1e9:.3g} GB in {len([p for p in out.rglob('*') if p.is_file()])} files",
             "seconds": f"{got['seconds']:.3g}, of the processor {got['cpu']:.3g}", "peak memory": f"{got['peak_gib']:.2f} GiB",
             "of it not mapped from the file": f"{got['own_gib']:.2f} GiB", "progress bar": "yes" if got["bar"] else "no",
             "stock classes load": ", ".join(f"{n} {v / 1e6:.4g} M" for n, v in json.loads(python(LOAD, out)).items())}
    return rows


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--small", action="store_true", help="tiny networks")
    p.add_argument("--interrupt", nargs="+", default=[], choices=("SIGINT", "SIGTERM", "SIGKILL"),
                   help="before that, a conversion for each signal, which gets it half way")
    p.add_argument("--folder", help="where there is room; the system's temporary folder by default")
    p.add_argument("--json", default="", help="also write the rows to this file")
    args = p.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as d: rows = bench(Path(d), args)
    print(table(rows))
    if args.json: Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__": sys.exit(main())
