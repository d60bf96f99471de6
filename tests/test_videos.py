"Videos as cameras, editors and damaged disks leave them; every file is made here"
import json
import struct
import warnings
from fractions import Fraction
from itertools import product

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image

from t2v_turbo.core import make_gen
from t2v_turbo.data.clips import ClipFolder, Table
from t2v_turbo.data.deal import BLOCK, content_mark, match_record
from t2v_turbo.data.shards import Shards
from t2v_turbo.data.sources import Prompts, open_source
from t2v_turbo.data.tables import find_clips, inside, read_table
from t2v_turbo.data.tars import tar_samples, write_shards
from t2v_turbo.data.videos import BACKGROUND, BadClip, probe, read_clip
from t2v_turbo.files import UserError


def square(i, n, h, w, c=3):
    "A red square that runs over a still grey pattern; frame `i`, as uint8"
    x = np.full((h, w, c), 90, np.uint8)
    x[h // 2:, w // 4:w // 2, :3] = 160
    at = 2 + 3 * i % (w - h // 3 - 4)
    x[2:h // 3, at:at + h // 3, :3] = (255, 0, 0)
    return x


def make(path, codec="libx264", n=24, rate=12, h=48, w=64, pix="yuv420p", options=None, draw=square, sound=0., sar=None, box_options=None, g=6):
    "A video of `n` pictures, with `sound` seconds of silence"
    with av.open(str(path), "w", options=box_options or {}) as box:
        s = box.add_stream(codec, rate=rate, options=options or {})
        s.width, s.height, s.pix_fmt, s.codec_context.gop_size = w, h, pix, g
        if sar: s.codec_context.sample_aspect_ratio = sar
        if sound:
            kind = {".webm": "libopus", ".avi": "pcm_s16le", ".mkv": "pcm_s16le"}.get(path.suffix, "aac")
            a = box.add_stream(kind, rate=48000, layout="mono")
        for i in range(n):
            x = draw(i, n, h, w)
            f = av.VideoFrame.from_ndarray(x, format="rgba" if x.shape[2] == 4 else "rgb24").reformat(format=pix)
            f.pts, f.time_base = i, Fraction(1, rate)
            for p in s.encode(f): box.mux(p)
        for p in s.encode(): box.mux(p)
        for k in range(int(sound * 50) if sound else 0):
            f = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.int16), format="s16", layout="mono")
            f.sample_rate, f.pts, f.time_base = 48000, k * 960, Fraction(1, 48000)
            for p in a.encode(f): box.mux(p)
        if sound:
            for p in a.encode(): box.mux(p)
    return path


def red(x): return (x[0] > .6) & (x[1] < .35) & (x[2] < .35)


def moving(path, seeds=8, **how):
    "How many of some clips could be read; none of them is one picture, or stands still for its second half"
    n = 0
    for seed in range(seeds):
        try: x = read_clip(path, 8, (48, 64), 8, make_gen(seed), **how)
        except BadClip: continue
        change = x.diff(dim=1).abs().amax((0, 2, 3))
        assert (change > .1).sum() >= 2 and (change[4:] > .1).any(), (path, seed, change)
        n += 1
    return n


def frames_of(path, seed=0, size=(48, 64)): return read_clip(path, 8, size, 8, make_gen(seed))


def says(sentence, f, *args, **kw):
    with pytest.raises(UserError) as e: f(*args, **kw)
    assert sentence in str(e.value), str(e.value)
    return str(e.value)


# --- the libraries -------------------------------------------------------------------------------

@pytest.mark.parametrize("version,told", [("15.1.0", {"metadata_errors": "ignore"}), ("18.1.0", {"metadata_errors": "ignore"}), ("19.0.2", {}), ("20.0", {})])
def test_what_av_open_is_told_depends_on_its_version(tmp_path, monkeypatch, version, told):
    path, seen, real = make(tmp_path / "a.mp4"), [], av.open
    monkeypatch.setattr(av, "__version__", version)
    monkeypatch.setattr(av, "open", lambda file, **kw: seen.append(kw) or real(file))
    assert round(probe(path), 3) == 2. and seen == [told]


# --- how a player would show it ------------------------------------------------------------------

def turned(path, a, b, c, d):
    "Write a display matrix into an mp4"
    raw = bytearray(path.read_bytes())
    at = raw.index(b"tkhd") + 4 + 40
    one = 1 << 16
    raw[at:at + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(raw)
    return path


EIGHT = [m for m in product((-1, 0, 1), repeat=4) if abs(m[0] * m[3] - m[1] * m[2]) == 1 and sum(map(abs, m)) == 2]


@pytest.mark.parametrize("a,b,c,d", EIGHT)
@pytest.mark.parametrize("sar", [None, Fraction(2, 1)])
def test_all_eight_orientations(tmp_path, a, b, c, d, sar):
    "A stored pixel at (x, y) is shown at (a x + c y, b x + d y), moved into the picture"
    def corner(i, n, h, w):
        x = np.full((h, w, 3), 60, np.uint8); x[:h // 2, :w // 4] = (255, 0, 0); return x
    path = turned(make(tmp_path / "a.mp4", draw=corner, h=32, w=32, sar=sar), a, b, c, d)
    wide = 2 if sar else 1
    shown = (32 * wide, 32) if a == 0 else (32, 32 * wide)                     # (h w) on the screen
    x = red(frames_of(path, size=shown)[:, 0])
    ys, xs = np.mgrid[:32, :32 * wide] - np.array([15.5, 16 * wide - .5])[:, None, None]
    want = torch.zeros(shown)
    for y, xx in zip(ys[:16, :8 * wide].ravel(), xs[:16, :8 * wide].ravel()):
        want[int(b * xx + d * y + (shown[0] - 1) / 2 + .25), int(a * xx + c * y + (shown[1] - 1) / 2 + .25)] = 1
    assert (x.float() - want).abs().mean() < .06, (x.float().argmax(), want.argmax())


@pytest.mark.parametrize("name,codec", [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.mpg", "mpeg2video")])
def test_pixels_that_are_not_square(tmp_path, name, codec):
    "A disc stored narrow, for a screen of 4:3, is round again"
    def disc(i, n, h, w):
        y, x = np.mgrid[:h, :w]
        return np.where((((x - w / 2) * 16 / 9)**2 + (y - h / 2)**2 < 20**2)[..., None], np.uint8([240] * 3), np.uint8(20))
    path = make(tmp_path / name, codec, draw=disc, h=64, w=48, n=50, rate=25, sar=Fraction(16, 9))
    x = frames_of(path, size=(64, 64))[:, 2].mean(0) > .5
    tall, wide = x.any(1).sum().item(), x.any(0).sum().item()
    assert abs(tall - wide) <= 3 and abs(tall - 40) <= 4, (tall, wide)


ALPHA = {"a.mov": ("qtrle", "argb", {}), "b.mov": ("png", "rgba", {}), "c.mov": ("prores_ks", "yuva444p10le", {"profile": "4444"}),
         "a.mkv": ("ffv1", "yuva420p", {}), "a.webm": ("libvpx", "yuva420p", {"auto-alt-ref": "0"}), "b.webm": ("libvpx-vp9", "yuva420p", {})}


@pytest.mark.parametrize("name", ALPHA)
def test_what_is_behind_a_transparent_picture(tmp_path, name):
    "The stored colour under full transparency is green, and never seen"
    def cut_out(i, n, h, w):
        x = np.zeros((h, w, 4), np.uint8); x[..., 1] = 255
        x[8:40, 16:48] = (255, 0, 0, 255)
        return x
    codec, pix, options = ALPHA[name]
    if codec not in av.codecs_available: pytest.skip(f"this av has no {codec}")
    x = frames_of(make(tmp_path / name, codec, pix=pix, options=options, draw=cut_out, h=48, w=64))[:, 3]
    assert x[0, 24, 32] > .9 and x[1:, 24, 32].max() < .15
    for y, xx in ((2, 2), (45, 60), (24, 4)): assert (x[:, y, xx] - BACKGROUND).abs().max() < .04


def test_a_gif_with_holes(tmp_path):
    frames = []
    for i in range(12):
        im = Image.new("RGBA", (64, 48), (0, 0, 0, 0)); im.paste((255, 0, 0, 255), (4 + 3 * i, 8, 20 + 3 * i, 40)); frames.append(im)
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=120, disposal=2, loop=0)
    x = frames_of(tmp_path / "a.gif")
    assert red(x[:, 0])[20].any() and (x[:, :, 2, 2] - BACKGROUND).abs().max() < .02
    assert moving(tmp_path / "a.gif") == 8


def test_interlaced_frames_show_one_moment(tmp_path):
    "A bar that moves 8 pixels between the two fields of a frame has no comb at its edges"
    def fields(i, n, h, w):
        x = np.full((h, w, 3), 30, np.uint8)
        for k in (0, 1): x[k::2, (16 * i + 8 * k) % (w - 16):][:, :16] = 220
        return x
    path = make(tmp_path / "a.mpg", "mpeg2video", draw=fields, n=50, rate=25, h=64, w=96, options={"flags": "+ildct+ilme"})
    with av.open(str(path)) as box: assert next(box.decode(video=0)).interlaced_frame
    x = frames_of(path, size=(64, 96)).mean(0)
    assert x.amax() > .7 and x.diff(dim=1).abs().amax() < .25                  # neighbouring lines agree
    plain = make(tmp_path / "b.mpg", "mpeg2video", draw=fields, n=50, rate=25, h=64, w=96)
    assert frames_of(plain, size=(64, 96)).mean(0).diff(dim=1).abs().amax() > .5


# --- how long it is ------------------------------------------------------------------------------

LONG = {"a.mp4": "libx264", "a.mov": "mpeg4", "a.mkv": "libx264", "a.webm": "libvpx", "a.avi": "mpeg4", "a.ts": "libx264", "a.flv": "flv"}


@pytest.mark.parametrize("name", LONG)
def test_the_length_is_that_of_the_pictures(tmp_path, name):
    path = make(tmp_path / name, LONG[name], sound=15.)
    assert abs(probe(path) - 2.) < .1
    assert moving(path) == 8


@pytest.mark.parametrize("name", [*LONG, "a.wmv", "a.mpg", "b.mp4"])
def test_half_of_a_file_is_read_to_where_it_ends(tmp_path, name):
    codec = {"a.wmv": "wmv2", "a.mpg": "mpeg2video", "b.mp4": "libx264"}.get(name) or LONG[name]
    fast = {"movflags": "+faststart"} if name[1:] in (".mp4", ".mov") else {}
    rng = np.random.default_rng(0)
    noisy = lambda i, n, h, w: (square(i, n, h, w) // 2 + rng.integers(0, 120, (h, w, 3), np.uint8))
    rate = 25 if name == "a.mpg" else 12
    path = make(tmp_path / name, codec, n=10 * rate, rate=rate, box_options=fast, draw=noisy if name == "b.mp4" else square)
    whole = path.read_bytes(); path.write_bytes(whole[:len(whole) * 6 // 10])
    assert 2. < probe(path) < 8.5
    assert moving(path) == 8
    half = read_clip(path, 8, (48, 64), 8, make_gen(1))
    assert torch.equal(half, read_clip(path, 8, (48, 64), 8, make_gen(1), seconds=probe(path)))


def test_a_file_that_was_cut_after_it_was_looked_at(tmp_path):
    "The length of before leads behind the end: such a clip is refused, and no picture repeated"
    path = make(tmp_path / "a.mkv", n=120); whole = path.read_bytes()
    seconds = probe(path)
    path.write_bytes(whole[:len(whole) // 2])
    assert 0 < moving(path, 20, seconds=seconds) < 20


def test_a_last_picture_that_is_stretched(tmp_path):
    "Over the rest of the sound, or as the pause of a GIF"
    pictures = [Image.fromarray(square(i, 16, 48, 64)) for i in range(16)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=[120] * 15 + [9000], loop=0)
    make(tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as old, av.open(str(tmp_path / "b.mp4"), "w") as box:
        s = box.add_stream_from_template(old.streams.video[0])
        packets = [p for p in old.demux(video=0) if p.size]
        for p in packets:
            if p is packets[-1]: p.duration = int(18 / p.time_base)
            p.stream = s; box.mux(p)
    for name, seconds in (("a.gif", 1.92), ("b.mp4", 2.)):
        assert abs(probe(tmp_path / name) - seconds) < .2, name
        assert moving(tmp_path / name) == 8


def test_pictures_that_stand_still(tmp_path):
    "One picture with a long delay is no clip; a slow file is one; a dark film is one"
    still = [Image.fromarray(square(i, 4, 48, 64)) for i in range(4)]
    still[0].save(tmp_path / "a.gif", save_all=True, append_images=still[1:], duration=[6000, 120, 120, 120], loop=0)
    assert says("no moving pictures", read_clip, tmp_path / "a.gif", 8, (48, 64), 8, make_gen(1))
    slow = make(tmp_path / "slow.mkv", n=12, rate=2)
    assert [read_clip(slow, 8, (48, 64), 8, make_gen(s)).shape[1] for s in range(4)] == [8] * 4
    dark = make(tmp_path / "dark.mp4", draw=lambda i, n, h, w: np.zeros((h, w, 3), np.uint8))
    assert frames_of(dark).max() < .02


def test_damage_in_the_middle_is_never_a_frozen_clip(tmp_path):
    for name, codec in (("a.mkv", "libx264"), ("a.webm", "libvpx"), ("a.ts", "libx264"), ("a.avi", "mpeg4")):
        path = make(tmp_path / name, codec, n=96)
        raw = bytearray(path.read_bytes()); n = len(raw)
        raw[n * 2 // 5:n * 4 // 5] = bytes(n * 4 // 5 - n * 2 // 5)
        path.write_bytes(raw)
        assert moving(path, 20) > 4


def test_blocks_of_zeros_are_no_still_pictures(tmp_path):
    "What a download leaves that was never finished: VP8 decodes it without an error"
    rng = np.random.default_rng(0)
    rough = lambda i, n, h, w: rng.integers(0, 255, (h, w, 3), np.uint8)
    path = make(tmp_path / "a.webm", "libvpx", n=96, draw=rough, options={"b": "2000000"})
    raw = bytearray(path.read_bytes())
    with av.open(str(path)) as box: packets = [(p.pos, p.size) for p in box.demux(video=0) if p.size]
    assert min(n for _, n in packets) > 400
    for at, n in packets[48:]: raw[at + 60:at + n] = bytes(n - 60)
    path.write_bytes(raw)
    assert 0 < moving(path, 20) < 20
    says("a block of zeros", read_clip, path, 8, (48, 64), 8, next(g for g in map(make_gen, range(99)) if torch.rand((), generator=make_gen(g.initial_seed())) > .8))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_uneven_times(tmp_path, name):
    "Frames are picked by their time, not by their number"
    times = [0, 1, 2, 3, 4, 5, 6, 7, 15, 23, 31, 39, 47, 48, 49, 50, 51, 52, 53, 54]
    with av.open(str(tmp_path / name), "w") as box:
        s = box.add_stream("mpeg4", rate=24); s.width, s.height, s.pix_fmt = 64, 48, "yuv420p"
        s.codec_context.time_base = Fraction(1, 24)
        for t in times:
            f = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * t, np.uint8), format="rgb24")
            f.pts, f.time_base = t, Fraction(1, 24)
            for p in s.encode(f): box.mux(p)
        for p in s.encode(): box.mux(p)
    x = read_clip(tmp_path / name, 8, (16, 16), 8, make_gen(3)).mean((0, 2, 3)) * 255 / 4 / 24
    seconds = probe(tmp_path / name)
    start = torch.rand((), generator=make_gen(3)).item() * (seconds - 1)
    near = [min(times, key=lambda t: abs(t / 24 - start - i / 8)) / 24 for i in range(8)]
    assert (x - torch.tensor(near)).abs().max() < .06


def test_an_edit_list(tmp_path):
    "An editor cut 3 s out of 8 without coding again: the file holds all frames, and a list of those to show"
    path = make(tmp_path / "a.mp4", n=96, draw=lambda i, n, h, w: np.full((h, w, 3), 2 * i, np.uint8))
    raw = bytearray(path.read_bytes()); at, scale = raw.index(b"elst") + 4, struct.unpack_from(">I", raw, raw.index(b"mdhd") + 16)[0]
    begin = struct.unpack_from(">I", raw, at + 12)[0]
    struct.pack_into(">II", raw, at + 8, 3000, begin + 2 * scale); path.write_bytes(raw)
    assert abs(probe(path) - 3) < .1
    for seed in range(6):
        shown = read_clip(path, 8, (16, 16), 8, make_gen(seed)).mean((0, 2, 3)) * 255 / 2 / 12
        start = torch.rand((), generator=make_gen(seed)).item() * 2
        assert (shown - 2 - start - torch.arange(8) / 8).abs().max() < .13


# --- what is a picture stream ---------------------------------------------------------------------

def with_cover(path, pictures):
    "Sound with cover art, and perhaps moving pictures behind it"
    with av.open(str(path), "w", format={".m4a": "mp4"}.get(path.suffix)) as box:
        a = box.add_stream("libmp3lame" if path.suffix == ".mp3" else "aac", rate=48000, layout="mono")
        cover = box.add_stream("mjpeg", rate=1); cover.width, cover.height, cover.pix_fmt = 96, 96, "yuvj420p"
        cover.disposition = Disposition.attached_pic.value
        if pictures: s = box.add_stream("libx264", rate=12); s.width, s.height, s.pix_fmt = 64, 48, "yuv420p"
        for p in [*cover.encode(av.VideoFrame.from_ndarray(np.full((96, 96, 3), 200, np.uint8), format="rgb24")), *cover.encode()]: box.mux(p)
        for k in range(100):
            f = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="fltp", layout="mono")
            f.sample_rate, f.pts, f.time_base = 48000, k * 960, Fraction(1, 48000)
            for p in a.encode(f): box.mux(p)
        for p in a.encode(): box.mux(p)
        for i in range(24 if pictures else 0):
            for p in s.encode(av.VideoFrame.from_ndarray(square(i, 24, 48, 64), format="rgb24")): box.mux(p)
        if pictures:
            for p in s.encode(): box.mux(p)
    with av.open(str(path)) as box:
        assert any(v.disposition & Disposition.attached_pic for v in box.streams.video)
    return path


def test_cover_art_is_no_video(tmp_path):
    for name in ("song.mp4", "song.m4a", "song.mp3"):
        says("has no pictures in it", probe, with_cover(tmp_path / name, False))
    film = with_cover(tmp_path / "film.mp4", True)
    assert abs(probe(film) - 2) < .1 and moving(film) == 8


# --- names ----------------------------------------------------------------------------------------

ENDINGS = {".m4v": "libx264", ".MOV": "mpeg4", ".qt": "mpeg4", ".ts": "libx264", ".MTS": "libx264", ".m2ts": "libx264", ".mpeg": "mpeg2video",
           ".vob": "mpeg2video", ".flv": "flv", ".wmv": "wmv2", ".asf": "wmv2", ".3gp": "libx264", ".3g2": "mpeg4", ".ogv": "libtheora",
           ".mxf": "mpeg2video", ".y4m": "wrapped_avframe", ".nut": "mpeg4", ".ivf": "libvpx", ".f4v": "libx264", ".webm": "libvpx-vp9",
           ".Mkv": "ffv1", ".m2v": "mpeg2video", ".apng": "apng", ".gif": "gif"}


def test_every_common_ending(tmp_path):
    "Each file is found, and gives moving clips; what the encoder of this av cannot write is left out"
    made, formats = [], {".vob": "vob", ".m2ts": "mpegts", ".MTS": "mpegts", ".qt": "mov", ".f4v": "mp4", ".y4m": "yuv4mpegpipe", ".MOV": "mov", ".Mkv": "matroska"}
    for ending, codec in ENDINGS.items():
        if codec not in av.codecs_available: continue
        path, box_of = tmp_path / f"a{ending}", formats.get(ending)
        pix = {"gif": "rgb8", "apng": "rgb24"}.get(codec, "yuv420p")
        with av.open(str(path), "w", format=box_of) as box:
            s = box.add_stream(codec, rate=25); s.width, s.height, s.pix_fmt = 64, 48, pix
            for i in range(50):
                for p in s.encode(av.VideoFrame.from_ndarray(square(i, 50, 48, 64), format="rgb24").reformat(format=pix)): box.mux(p)
            for p in s.encode(): box.mux(p)
        path.with_suffix(".txt").write_text("a red square")
        made.append(path)
    assert len(made) > 18 and [c.path for c in find_clips(tmp_path)] == sorted(made)
    for path in made: assert abs(probe(path) - 2) < .2 and moving(path, 4) == 4, path


ODD = ["file:a.mp4", "concat:a.mp4|b.mp4", "a:b.mp4", "-x.mp4", "%03d.mp4", "%03d.gif", "*.gif", "[a].mp4", "http:x.mp4", "pipe:0.mp4", "subfile,,start,9,end,99,,:x.mp4",
       "clip #1.mp4", "clip?.gif", "cache:x.mkv", "a\nb.mp4", "ümläut.mp4", "'quoted'.mp4"]


@pytest.mark.parametrize("name", ODD)
def test_a_name_is_a_name(tmp_path, monkeypatch, name):
    "No protocol, no pattern, no option; the neighbours that they would lead to show something else"
    black = lambda i, n, h, w: np.zeros((h, w, 3), np.uint8)
    for decoy in ("a.mp4", "b.mp4", "x.mp4", "x.mkv", "000.gif", "001.gif", "clipX.gif", "000.mp4"):
        ending = decoy[-4:]
        make(tmp_path / decoy, "gif" if ending == ".gif" else "libx264", pix="rgb8" if ending == ".gif" else "yuv420p", draw=black)
    kind = name[-4:]
    made = make(tmp_path / f"made{kind}", "gif" if kind == ".gif" else "libx264", pix="rgb8" if kind == ".gif" else "yuv420p")
    made.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert moving(name, 2) == 2 and abs(probe(name) - 2) < .1
    (tmp_path / f"{name[:-4]}.txt").write_text("it")
    with warnings.catch_warnings(): warnings.simplefilter("ignore"); source = ClipFolder(".")
    assert [c.path.name for c in source.clips] == [name] and source.batch(0, 1)[1] == ["it"]


@pytest.fixture
def folder(tmp_path):
    d = tmp_path / "d"; d.mkdir()
    for i, n in enumerate("abc"):
        make(d / f"{n}.mp4", draw=lambda k, m, h, w, i=i: np.roll(square(k, m, h, w), 7 * i, 0)); (d / f"{n}.txt").write_text(f"clip {n}")
    return d


def test_what_a_mac_leaves_is_not_data(folder):
    junk = b"\0\5\x16\7\xff\xfe" + bytes(60)
    for n in ("._a.mp4", "._a.txt", "._captions.csv", "__MACOSX/._b.mp4", "__MACOSX/d/b.mp4", ".tmp-x/a.mp4", "._000.tar"):
        (folder / n).parent.mkdir(parents=True, exist_ok=True); (folder / n).write_bytes(junk)
    with warnings.catch_warnings(): warnings.simplefilter("error"); assert len(ClipFolder(folder)) == 3
    members = [("a.mp4", 1, 2), ("a.txt", 2, 2), ("._a.mp4", 0, 9), ("__MACOSX/d/a.mp4", 0, 9), ("__MACOSX/._a.txt", 0, 9)]
    assert tar_samples(members) == ({"a": {".mp4": (1, 2), ".txt": (2, 2)}}, [])


def test_endings_that_are_passed_over_are_named_and_counted(folder):
    for n in ("x.xyz", "y.xyz", "thumb.jpg", "noending", ".DS_Store", "README.md"): (folder / n).write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"4 files in .* are passed over for their endings \(2 .xyz, 1 .jpg, 1 no ending\): noending, thumb.jpg, x.xyz, y.xyz|4 files") as w:
        assert len(ClipFolder(folder)) == 3
    told = str(w[0].message)
    assert all(n in told for n in ("2 .xyz", "1 .jpg", "x.xyz", "y.xyz", "thumb.jpg", "noending")) and "DS_Store" not in told and "README" not in told


# --- captions -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["metadata.csv", "captions.csv", "metadata.jsonl", "captions.tsv", "Metadata.CSV", "captions.json"])
@pytest.mark.parametrize("columns", [("file_name", "text"), ("filename", "caption"), ("File_Name", "Caption"), ("video_path", "prompt"), (" video ", "description")])
def test_tables_of_any_name(folder, name, columns):
    for t in folder.glob("*.txt"): t.unlink()
    rows = [(f"{n}.mp4", f"said of {n}, in short") for n in "abc"]
    if name.endswith("jsonl"): text = "".join(json.dumps(dict(zip(columns, r))) + "\r\n" for r in rows)
    elif name.endswith("json"): text = json.dumps([dict(zip(columns, r)) for r in rows])
    else:
        mark = "\t" if name.endswith("tsv") else ","
        text = f"\ufeff{columns[0]}{mark}{columns[1]}\r\n" + "".join(f'{f}{mark}"{c}"\r\n' for f, c in rows)
    (folder / name).write_bytes(text.encode())
    assert [(c.path, c.caption) for c in find_clips(folder)] == [(folder / f, c) for f, c in rows]
    assert open_source(folder / name, size=(48, 64)).batch(0, 3)[1] == open_source(folder, size=(48, 64)).batch(0, 3)[1]


@pytest.mark.parametrize("mark", [";", "\t", "|", ","])
def test_separators(folder, mark):
    table = folder / "captions.csv"
    table.write_text(f"id{mark}file{mark}caption\n1{mark}a.mp4{mark}" + ("a red, wide square" if mark != "," else '"a red, wide square"') + "\n")
    assert read_table(table)[0].caption == "a red, wide square"


def test_json_tables(folder):
    for t in folder.glob("*.txt"): t.unlink()
    table = folder / "captions.json"
    table.write_text(json.dumps({"a.mp4": "one", "b.mp4": ["two", "three"]}))
    assert [(c.path.name, c.caption, c.others) for c in find_clips(folder)] == [("a.mp4", "one", ()), ("b.mp4", "two", ("three",)), ("c.mp4", "", ())]
    for bad in ('{"a": 1}', "[1]", "{", '"x"'): table.write_text(bad); says("is not a table of captions", find_clips, folder)
    table.rename(folder / "metadata.json"); assert len(find_clips(folder)) == 3        # settings of some other tool
    (folder / "captions.csv").write_text("file,caption\na.mp4,x\n"); (folder / "b.TXT").write_text("in capitals")
    assert [c.caption for c in find_clips(folder)] == ["x", "in capitals", ""]
    (folder / "m").mkdir(); (folder / "metadata.csv").write_text("file_name,text\na.mp4,x\n")
    make(folder / "m" / "x.mp4"); (folder / "m" / "metadata.csv").write_text("file_name,text\nx.mp4,x\n")
    says("has both captions.csv and metadata.csv", find_clips, folder)


def test_a_folder_of_folders_with_tables(folder):
    for n in ("train", "test"):
        (folder / n).mkdir(); make(folder / n / "x.mp4")
        (folder / n / "metadata.csv").write_text(f"file_name,text\nx.mp4,of {n}\n")
    (folder / "metadata.csv").write_text("views,likes\n1,2\n")                 # another table altogether
    got = {c.path.relative_to(folder).as_posix(): c.caption for c in find_clips(folder)}
    (folder / "captions.csv").write_text("file,caption\ntest/x.mp4,of test\n"); (folder / "metadata.csv").unlink()
    assert len(find_clips(folder)) == 5                                        # named alike by both tables
    (folder / "captions.csv").unlink()
    assert got == {"train/x.mp4": "of train", "test/x.mp4": "of test", **{f"{n}.mp4": f"clip {n}" for n in "abc"}}
    (folder / "train" / "captions.jsonl").write_text('{"file": "x.mp4", "caption": "y"}')
    says("has both captions.jsonl and metadata.csv", find_clips, folder)


def test_several_captions_of_one_clip(folder, tmp_path):
    for t in folder.glob("*.txt"): t.unlink()
    table = folder / "metadata.csv"
    table.write_text('file_name,caption\na.mp4,"[""one"", "" two  words""]"\nb.mp4,"[\'three\', \'four\']"\nc.mp4,[music] five\n')
    assert [(c.caption, c.others) for c in read_table(table)] == [("one", ("two words",)), ("three", ("four",)), ("[music] five", ())]
    (folder / "x.jsonl").write_text("".join(json.dumps(dict(file=f"{n}.mp4", caption=c)) + "\n" for n, c in (("a", ["one", "two words"]), ("b", ["three", None, "four"]), ("c", "[music] five"))))
    assert [c.others for c in read_table(folder / "x.jsonl")] == [("two words",), ("four",), ()]
    source = ClipFolder(folder, size=(48, 64), seed=5)
    seen = [c for s in range(8) for c in source.batch(s, 3)[1]]
    assert set(seen) == {"one", "two words", "three", "four", "[music] five"}
    assert seen == [c for s in range(8) for r in range(3) for c in ClipFolder(folder, size=(48, 64), seed=5).batch(s, 3, slice(r, r + 1))[1]]
    shards = Shards(write_shards(folder, tmp_path / "tars"), size=(48, 64), seed=5)
    assert [c for s in range(8) for c in shards.batch(s, 3)[1]] == seen
    assert shards.captions == ["one", "two words", "three", "four", "[music] five"]
    table.write_text('prompt\n"[""a"", ""b""]"\nc\n'); assert Prompts(table).prompts == ["a", "b", "c"]


def test_utf16_is_named(folder):
    for text in ("file,caption\na.mp4,x\n".encode("utf-16"), "file,caption\na.mp4,x\n".encode("utf-16-le")):
        (folder / "captions.csv").write_bytes(text); says("UTF-16", find_clips, folder)
    (folder / "captions.csv").unlink(); (folder / "a.txt").write_bytes("ein Kreis".encode("utf-16")); says("UTF-16", find_clips, folder)


def test_a_table_stays_in_its_folder(folder, tmp_path):
    outside = make(tmp_path / "private.mp4")
    table = folder / "captions.csv"
    (folder / "link").symlink_to(tmp_path); (folder / "shortcut.mp4").symlink_to(outside)
    def file(name): table.write_text(f'file,caption\n"{name}",a\n'); return read_table(table)[0].path
    for name in ("../private.mp4", str(outside), "x/../../private.mp4", "/etc/passwd", "..", "./../d/../private.mp4"):
        assert "outside of the table's folder" in says(f"line 2 of {str(table)!r} names {name!r}", file, name)
        with pytest.raises(UserError, match="outside"): Table(table, missing="skip")
    assert file("a.mp4") == file("./a.mp4") == file("x/../a.mp4") == file(str(folder / "a.mp4")) == folder / "a.mp4"
    assert file("shortcut.mp4") == folder / "shortcut.mp4"                     # a link in the folder was put there on purpose
    says("has no such file", file, "link/../private.mp4")                      # what the link leads to has no say in `..`
    assert inside("d", "/d/a.mp4") is None and inside("/", "a.mp4") is not None


def test_advice_names_an_option(folder):
    (folder / "captions.csv").write_text("file,caption\na.mp4,x\nlost.mp4,y\n")
    says("--missing skip", ClipFolder, folder)
    with pytest.warns(UserWarning, match="lost.mp4"): source = open_source(folder, missing="skip")
    assert len(source) == 3 and open_source(folder / "a.txt", missing="skip").kind == "prompts"
    says("missing is 'stop': give 'error' or 'skip'", open_source, folder, missing="stop")
    says("has no option mix", open_source, folder, mix=2)


# --- what data are --------------------------------------------------------------------------------

def kinds(folder, tmp_path):
    table = folder.parent / "t" ; table.mkdir(exist_ok=True)
    return {"folder": lambda: ClipFolder(folder, size=(48, 64)), "unchecked": lambda: ClipFolder(folder, size=(48, 64), check=False)}


def swap(path):
    "Another video under the name, of the same size and time, which only its bytes tell"
    import os
    old, was = path.read_bytes(), path.stat()
    path.write_bytes(old[:-9] + bytes([old[-9] ^ 1]) + old[-8:])
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


@pytest.mark.parametrize("check", [True, False])
def test_a_fingerprint_is_of_contents(folder, tmp_path, check):
    new = lambda: ClipFolder(folder, size=(48, 64), check=check)
    first = new().fingerprint()
    assert first == new().fingerprint()
    moved = folder.rename(tmp_path / "elsewhere"); assert ClipFolder(moved, size=(48, 64), check=check).fingerprint() == first; moved.rename(folder)
    swap(folder / "b.mp4"); second = new().fingerprint(); assert second != first
    (folder / "c.txt").write_text("something else"); third = new().fingerprint(); assert third not in (first, second)
    (folder / "c.mp4").rename(folder / "d.mp4"); (folder / "c.txt").rename(folder / "d.txt"); assert new().fingerprint() not in (first, second, third)


def test_marks(tmp_path):
    path, n = tmp_path / "a", 5 * BLOCK
    path.write_bytes(bytes(n)); zero = content_mark(path)
    for at in (0, n // 2 + 5, n - 1):
        x = bytearray(n); x[at] = 1; path.write_bytes(x); assert content_mark(path) != zero, at
    path.write_bytes(bytes(n + 1)); assert content_mark(path) != zero
    small = bytearray(4 * BLOCK); path.write_bytes(small); a = content_mark(path)
    small[BLOCK + 7] = 1; path.write_bytes(small); assert content_mark(path) != a      # small ones are read whole


@pytest.mark.parametrize("how", ["same bytes count", "caption", "renamed"])
def test_a_shard_is_known_by_its_contents(folder, tmp_path, how):
    import os
    tars = write_shards(folder, tmp_path / "tars", per_shard=2)
    first, was, raw = Shards(tars).fingerprint(), tars[0].stat(), tars[0].read_bytes()
    assert Shards(tars).fingerprint() == first == Shards(tmp_path / "tars").fingerprint()
    if how == "same bytes count": at = raw.index(b"mdat") + 40; new = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1:]
    elif how == "caption": new = raw.replace(b"clip a", b"clip x")
    else: tars[0].rename(tars[0].with_name("x.tar")); new = None
    if new: tars[0].write_bytes(new); os.utime(tars[0], ns=(was.st_atime_ns, was.st_mtime_ns))
    assert Shards(tmp_path / "tars").fingerprint() != first


def test_a_run_goes_on_when_a_clip_breaks_or_goes(folder):
    "The deal stays; the lost clip is named and gets a stand-in, as in the process that saw it break"
    new = lambda: ClipFolder(folder, size=(48, 64), seed=3)
    run = new(); record, print_, before = run.record(), run.fingerprint(), [run.batch(s, 2) for s in range(6)]
    kept = (folder / "b.mp4").read_bytes()
    for harm in (lambda p: p.write_bytes(b"torn"), lambda p: p.unlink()):
        harm(folder / "b.mp4")
        with warnings.catch_warnings(): warnings.simplefilter("ignore"); seen = [run.batch(s, 2) for s in range(6)]; again = new()
        assert again.fingerprint() != print_
        with pytest.warns(UserWarning, match="b.mp4 is gone or broken since the run began"): again.take_over(json.loads(json.dumps(record)))
        assert again.fingerprint() == print_ and again.record() == record and len(again) == 3
        got = [again.batch(s, 2) for s in range(6)]
        assert all(torch.equal(x[0], y[0]) and x[1] == y[1] for x, y in zip(got, seen))
        assert any("clip b" in c for _, c in before) and not any("clip b" in c for _, c in got)
        assert "b.mp4" in {str(n) for n, _ in again.skipped}
    (folder / "b.mp4").write_bytes(kept); back = new(); back.take_over(record)
    assert all(torch.equal(x[0], y[0]) and x[1] == y[1] for x, y in zip((back.batch(s, 2) for s in range(6)), before))


def test_a_run_does_not_go_on_with_other_clips(folder, tmp_path):
    new = lambda: ClipFolder(folder, size=(48, 64))
    record = new().record()
    swap(folder / "b.mp4"); says("'b.mp4' is another than when the run began", new().take_over, record)
    swap(folder / "b.mp4"); new().take_over(record)
    (folder / "a.txt").write_text("another caption"); says("'a.mp4' is another", new().take_over, record)
    (folder / "a.txt").write_text("clip a")
    make(folder / "z.mp4"); (folder / "z.txt").write_text("z"); says("'z.mp4' is new since the run began", new().take_over, record)
    assert match_record([["a", 1], ["a", 1], ["b", 2]], [["b", 2], ["a", 1], ["a", 1], ["c", 3]]) == [2, 0, 1, None]


def test_a_run_goes_on_without_a_shard(folder, tmp_path):
    tars = write_shards(folder, tmp_path / "tars", per_shard=1)
    new = lambda: Shards(f"{tmp_path}/tars/*.tar", size=(48, 64), seed=1, missing="skip")
    run = new(); record, print_, before = run.record(), run.fingerprint(), [run.batch(s, 3)[1] for s in range(2)]
    raw = tars[1].read_bytes()
    for harm in (lambda: tars[1].write_bytes(raw[:-9000]), tars[1].unlink):
        harm()
        with warnings.catch_warnings(): warnings.simplefilter("ignore"); seen = [run.batch(s, 3) for s in range(2)]; again = new()
        with pytest.warns(UserWarning, match="000001.tar is gone or broken"): again.take_over(record)
        if not tars[1].exists(): says("000001.tar is gone or broken since the run began: bring it back, or give --missing skip", Shards(tmp_path / "tars", size=(48, 64)).take_over, record)
        assert again.fingerprint() == print_ and len(again) == 3 and again.captions == ["clip a", "clip c"]
        for s in range(2):
            x, y = again.batch(s, 3), seen[s]
            assert torch.equal(x[0], y[0]) and x[1] == y[1] and "clip b" in before[s] and "clip b" not in x[1]
