"The tiny world: what the teacher was trained on must not change"
import hashlib

import pytest
import torch
import torch.nn.functional as F

from t2v_turbo import core, sprites
from t2v_turbo.core import make_gen
from t2v_turbo.files import UserError
from t2v_turbo.world import (
    ATTRS,
    COLOURS,
    COUNTS,
    HELD_PAIRS,
    KINDS,
    MOTIONS,
    NOUNS,
    REVERSED,
    SCENES,
    WHERE,
    WORDS,
    Clips,
    World,
    blur,
    caption,
    combos,
    compose,
    flicker,
    is_heldout,
    logo,
    parse,
    paths,
    render,
    sample_attrs,
    watermark,
    web,
)

close = torch.testing.assert_close
small = dict(frames=4, size=16)


def test_captions_round_trip():
    assert COUNTS == (12, 8, 6, 8) and len(ATTRS) == len({caption(*a) for a in ATTRS}) == 4608
    assert [parse(caption(*a)) for a in ATTRS] == list(ATTRS)
    assert parse("  A RED fish   moving left in the sea ") == (0, 0, 1, 0)
    assert caption(10, 1, 3, 6) == "an orange cat spinning at night"


def test_the_words_are_those_of_the_captions():
    "Their order is the order of the tokens"
    texts = [caption(*a).split() for a in ATTRS]
    assert set(WORDS) == {w for t in texts for w in t} and len(WORDS) == len(set(WORDS)) == 41
    assert max(map(len, texts)) <= 9
    assert WORDS[:7] == ("a", "an", "moving", "in", "at", "by", "the") and WORDS[7:] == sum(((*COLOURS,), NOUNS, SCENES, MOTIONS), ())
    assert len(WHERE) == len(SCENES) and all(s in w.split() for s, w in zip(SCENES, WHERE))


@pytest.mark.parametrize("text", ["", "red fish", "a red fish moving left", "a red fish moving left at night sky", "a orange fish growing at night",
                                  "an red fish growing at night", "a black fish growing at night", "a red circle moving left"])
def test_foreign_caption(text):
    with pytest.raises(UserError, match="is not a caption of the tiny world"): parse(text)


def test_split():
    train, held = (set(map(tuple, combos(s).tolist())) for s in ("train", "heldout"))
    assert (len(train), len(held), train & held, train | held) == (3262, 1346, set(), set(ATTRS))
    assert torch.equal(combos("all"), torch.tensor(ATTRS))
    with pytest.raises(UserError, match="no split 'val'"): combos("val")
    with pytest.raises(UserError, match="no split 'val'"): World("val")
    combos("train").zero_(); assert combos("train").any()               # callers own what they get


def test_training_lacks_the_held_pairs_alone():
    "Every other pair of words of two kinds occurs"
    words = {frozenset((a, b)) for i, k in enumerate(KINDS) for j, l in enumerate(KINDS) if i < j for a in k for b in l}
    seen = set()
    for a in combos("train").tolist():
        w = [kind[i] for kind, i in zip(KINDS, a)]
        seen |= {frozenset((w[i], w[j])) for i in range(4) for j in range(i)}
    assert words - seen == {frozenset(p) for p in HELD_PAIRS} and len(HELD_PAIRS) == 25


def test_no_training_clip_holds_a_held_out_pair():
    "Neither what is shown nor what its caption says"
    for step in range(4):
        batch = World(**small).known(step, 32)
        assert not any(is_heldout(*a) for a in torch.cat([batch.attrs, batch.said]).tolist())
    assert all(is_heldout(*parse(t)) for t in World("heldout", **small).batch(0, 32)[1])


# caption, mean length of the flow, and the brightness (0..255) of 24 points: of the code that the shipped weights were trained with
WEB = [
    ("a blue tree shrinking by the wall", 0.15152,
     "b9722020bcaea1b26e803c3f6f665e695eb1949b5f58515a"),
    ("a purple star moving down in the meadow", 0.32910,
     "b99f5a8cb9b9839fe24aa7c7e2e23f4af7e14b69f7f7bae1"),
    ("a blue boat moving up in the desert", 0.40527,
     "fbfbec2d491decebcef4b0633c1cb0af98ce6aeb3f366a68"),
    ("a white house moving up in the sky", 0.43896,
     "797966f27945a7a7baba62f2ba4ed7d7f9f96ef2f961fdfd"),
]
CLEAN = [
    ("a red heart shrinking in the sea", 0.19591,
     "221c1ae12525165b6519352c8f8f641f882c5731bbbba02e"),
    ("a white flower moving left in the sky", 0.43457,
     "78fca6f9fd7841a6b8fcd5f9fdb89bd5f7fcfbf9fdf748fb"),
    ("a red house growing at night", 0.18549,
     "1f1f357e1f3c21501919279a191b1a364a4a64af4a2b3644"),
    ("a blue rocket moving down at night", 0.26660,
     "2a20373720201d37531a28281a1a1928c24c67674c4c2e67"),
]


@pytest.mark.parametrize("world, step, want", [(World(seed=7), 3, WEB), (World("all", 1, clean=True), 99, CLEAN)], ids=["web", "clean"])
def test_clips_are_those_the_weights_were_trained_on(world, step, want):
    "A change of the world would make its teacher a teacher of another one"
    got = world.known(step, 4)
    assert got.captions() == [t for t, _, _ in want]
    close(got.flow().double().abs().mean((1, 2, 3, 4)), torch.tensor([f for _, f, _ in want], dtype=torch.double), atol=2e-4, rtol=0)
    points = (got.video[:, :, ::7, 20::24, 20::24] * 255).round().flatten(1)
    pinned = torch.tensor([list(bytes.fromhex(h)) for _, _, h in want]).float()
    close(points, pinned, atol=1, rtol=0)


def test_batches_depend_on_seed_and_step_alone():
    world = World(seed=3, **small)
    a = world.batch(10, 4); world.batch(11, 4); b = World(seed=3, **small).batch(10, 4)
    assert torch.equal(a[0], b[0]) and a[1] == b[1]
    assert a[0].shape == (4, 3, 4, 16, 16) and 0 <= a[0].min() and a[0].max() <= 1
    for other in (world.batch(11, 4), World(seed=4, **small).batch(10, 4)): assert not torch.equal(a[0], other[0])
    known = world.known(10, 4)
    assert isinstance(known, Clips) and torch.equal(known.video, a[0]) and known.captions() == a[1]
    rows = world.batch(10, 4, slice(1, 3))
    assert torch.equal(rows[0], a[0][1:3]) and rows[1] == a[1][1:3]
    prints = {World(seed=3).fingerprint(), World(seed=4).fingerprint(), world.fingerprint(), World(clean=True).fingerprint()}
    assert len(prints) == 4
    assert torch.isfinite(World(seed=-5, **small).batch(0, 2)[0]).all() and World(seed=2**40, frames=1, size=8).batch(2**40, 2)[0].shape[2] == 1


def test_wrong_captions_and_clean():
    known = World("all", frames=1, size=8).known(0, 2000)
    close((known.attrs != known.said).any(1).float().mean(), torch.tensor(.06), atol=.015, rtol=0)
    clean = World("all", frames=1, size=8, clean=True).known(0, 100)
    assert torch.equal(clean.attrs, clean.said) and not clean.flaws.any()
    assert torch.equal(clean.video, compose(clean.attrs, *_after_attrs(100), 1, 8)[0])


def _after_attrs(n):
    "The generator of step 0 once the tuples of `n` clips are drawn"
    gen = make_gen(0)
    sample_attrs(n, "all", gen)
    return [gen]


@pytest.mark.parametrize("frames, size", [(8, 64), (5, 48)])
def test_flow_leads_to_the_next_frame(frames, size):
    "The next frame, fetched along the flow, shows the sprite as it is now"
    b = World("all", seed=2, clean=True, frames=frames, size=size).known(0, 32)
    flow, shape = b.flow(), (32, frames - 1, size, size)
    assert flow.shape == (32, 2, *shape[1:])
    here = F.affine_grid(torch.eye(2, 3)[None], (1, 1, size, size), False)
    grid = here + flow.permute(0, 2, 3, 4, 1).flatten(0, 1) * 2 / size
    after = b.video[:, :, 1:].transpose(1, 2)
    fetched = F.grid_sample(after.flatten(0, 1), grid, align_corners=False).unflatten(0, shape[:2])
    inside = (b.alpha[:, :-1] > .99) & (grid.abs().amax(-1).view(shape) < 1)
    now = b.video[:, :, :-1].transpose(1, 2)
    error = lambda x: (x - now).abs().mean(2)[inside].mean()
    assert error(fetched) < .25 * error(after)
    assert not flow[(b.alpha[:, None, :-1] < .5).expand_as(flow)].any()  # scenes stand still


def test_motions_are_the_motions():
    m = torch.arange(8).repeat_interleave(20)
    path = paths(m, make_gen(0))
    walk = path.centre.diff().view(8, 20, 2, 7)
    for i, way in enumerate([(-1, 0), (1, 0), (0, -1), (0, 1)]): close(walk[i], (torch.tensor(way) / 16)[None, :, None].expand(20, 2, 7))
    assert not walk[4:7].any() and not walk[7, :, 0].any() and walk[7, :, 1].any(1).all()
    grow = path.half.diff().view(8, 20, 2, 7)
    assert not grow[[0, 1, 2, 3, 6]].any() and (grow[4] > 0).all() and (grow[5] < 0).all()
    turn = path.angle.diff().view(8, 20, 7)
    assert (turn[6] > 0).all() and not turn[[0, 1, 2, 3, 4, 5, 7]].any()
    assert path.half.isfinite().all() and .05 < path.half.min() and path.half.max() < .4
    assert (path.centre - .5).abs().max() <= .5


@pytest.mark.parametrize("frames", [1, 2, 4, 8, 15, 29])
def test_other_numbers_of_frames_spread_the_same_path(frames):
    m = torch.arange(8).repeat(3)
    path, fine = paths(m, make_gen(4), frames), paths(m, make_gen(4), 29)
    every = 28 // max(frames - 1, 1)
    if frames in (1, 2, 8, 15, 29, 5):                                   # those that 28 steps contain
        for k in ("centre", "half", "angle"): close(getattr(path, k), getattr(fine, k)[..., ::every][..., :frames], atol=1e-5, rtol=0)
    assert path.centre.shape == (24, 2, frames) and path.angle.shape == (24, frames)
    assert fine.half.max() < .4 and fine.centre.isfinite().all()


def test_backwards_is_the_opposite_motion():
    "Growers exactly; movers, whose ends are drawn, in every step"
    assert {REVERSED[REVERSED[m]] for m in MOTIONS} == set(MOTIONS)
    for m in ("growing", "shrinking"):
        there, back = (torch.tensor([(1, 2, 0, MOTIONS.index(k))]) for k in (m, REVERSED[m]))
        close(render(there, make_gen(5), **small).flip(2), render(back, make_gen(5), **small))
    for m in MOTIONS[:4]:
        there, back = (paths(torch.tensor([MOTIONS.index(k)]), make_gen(5)).centre.diff() for k in (m, REVERSED[m]))
        close(-there.flip(-1), back)


def test_colours_are_the_colours():
    "The middle of a star, house roof and balloon is of the caption's colour, or nearer to it than to others of its brightness"
    attrs = torch.tensor([(n, c, 5, 0) for n in range(12) for c in range(8)])
    clips, _, cover = compose(attrs, make_gen(1), frames=1)
    rgb = torch.tensor(list(COLOURS.values()))
    near = (clips[:, None] - rgb[None, :, :, None, None, None]).abs().amax(2)[:, :, 0]     # (n 8 h w)
    count = ((near < .09) & (cover[:, None, 0] > .99)).flatten(2).sum(2)
    assert (count.gather(1, attrs[:, 1:2])[:, 0] > 12).float().mean() > .95
    assert (count[:, :7].argmax(1) == attrs[:, 1])[attrs[:, 1] < 7].float().mean() > .95   # white is in eyes and panes, too


@pytest.mark.parametrize("size", [32, 128])
def test_size_is_only_resolution(size):
    attrs = combos("heldout")[::30]
    usual, other = render(attrs, make_gen(2), 2), render(attrs, make_gen(2), 2, size)
    few, many = sorted((usual, other), key=lambda x: x.shape[-1])
    assert (few - F.avg_pool3d(many, (1, 2, 2))).abs().mean() < .02


def test_flaws():
    flat = torch.full((2, 3, 8, 64, 64), .5)
    close(blur(flat), flat)
    spot = torch.zeros(1, 3, 1, 64, 64); spot[..., 32, 32] = 1
    close(blur(spot).sum(), spot.sum()); assert blur(spot).max() < .08
    marked = watermark(flat)
    assert ((marked != flat) == logo().bool()).all()
    g = flicker(flat, make_gen(0))
    assert g.std((3, 4)).max() < 1e-6 and g.std(2).min() > .01 and (g[0] != g[1]).any()
    for n in (16, 32, 100): assert logo(n).shape == (n, n) and abs(logo(n).mean() - logo().mean()) < .004
    assert watermark(flat[..., :16, :16]).shape == (2, 3, 8, 16, 16) == blur(flat[..., :16, :16]).shape
    logo().zero_(); assert logo().any()


def test_web_rates_and_strengths():
    clips = render(sample_attrs(1500, "train", make_gen(0)), make_gen(1), frames=2, size=16)
    before = clips.clone()
    seen, flaws = web(clips, make_gen(2))
    close((flaws > 0).float().mean(0), torch.tensor([.4, .4, .45]), atol=.04, rtol=0)
    assert flaws[flaws > 0].min() >= .35 and flaws.max() <= 1
    clean = ~flaws.any(1)
    close(clean.float().mean(), torch.tensor(.6 * .6 * .55), atol=.03, rtol=0)
    assert torch.equal((seen != clips).flatten(1).any(1), ~clean) and torch.equal(clips, before)
    close(web(clips, make_gen(0), chance=(0, 0, 0))[0], clips, rtol=0, atol=0)


def test_streams_share_no_numbers():
    "Name, seed and step each make another generator; the tiny world's clips keep the numbers of their own"
    first = lambda gen: torch.rand(2, generator=gen).tolist()
    ways = [(s, i, n) for s in (0, 1, 1_000_003, -1) for i in (-3, 0, 17, 1_000_003) for n in ("clips", "noise", "evaluate", "looks")]
    assert len({tuple(first(core.step_gen(*w))) for w in ways}) == len(ways)
    assert first(core.step_gen(3, 5)) == first(core.step_gen(3, 5, "clips"))
    plain = [first(make_gen((1_000_003 * s + i) % 2**63)) for s, i, _ in ways]
    assert not [w for w in ways if first(core.step_gen(*w)) in plain]
    assert all(0 <= core.step_seed(*w) < 2**63 for w in ways)
    assert core.step_seed(0, 17, "noise") == int(hashlib.sha256(b"noise/0/17").hexdigest()[:16], 16) // 2


# --- what is drawn ---------------------------------------------------------------------------------

def points(n=41):
    g = torch.linspace(-1.3, 1.3, n)
    return torch.meshgrid(g, g, indexing="xy")


@pytest.mark.parametrize("d", [lambda x, y: sprites.circle(x, y, .2, -.1, .7), lambda x, y: sprites.box(x, y, .1, 0, .6, .4, .1),
                               lambda x, y: sprites.poly(x, y, (-.5, -.6), (.7, -.2), (.1, .8))], ids=["circle", "box", "poly"])
def test_distances_are_distances(d):
    "They change by at most what the point moves, and by as much nearly everywhere"
    (x, y), eps = points(), 1e-3
    slope = torch.stack([d(x + eps, y) - d(x - eps, y), d(x, y + eps) - d(x, y - eps)]).norm(dim=0) / (2 * eps)
    assert slope.max() < 1.01 and (slope > .98).float().mean() > .95


def test_a_polygon_and_a_box_agree():
    x, y = points()
    close(sprites.poly(x, y, (-1, -.5), (1, -.5), (1, .5), (-1, .5)), sprites.box(x, y, 0, 0, 1, .5), atol=1e-5, rtol=0)
    close(sprites.union(x, -x), -x.abs()); close(sprites.both(x, -x), x.abs())


def test_templates():
    "Sprites fit in, take the caption's colour, and differ in their outline"
    every = sprites.templates()
    assert every.shape == (4, 12, 5, 64, 64) and 0 <= every.min() and every.max() <= 1 + 1e-5
    for side in (0, -1): assert every[2:, :, 4, side].max() < .2 and every[2:, :, 4, :, side].max() < .2
    assert (every[2, :, 0].mean((1, 2)) > .04).all()
    cover = (every[2, :, 4] > .5).flatten(1).float()
    apart = torch.cdist(cover, cover, p=1)
    assert apart[~torch.eye(12, dtype=torch.bool)].min() > 150
    close(sprites.stamp(every[2], torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1))[:, :, 0], torch.zeros(12, 3, 64), atol=.02, rtol=0)


@pytest.mark.parametrize("size", [8, 64])
def test_backgrounds(size):
    s = torch.arange(6).repeat(2)
    a, b = sprites.backgrounds(s, make_gen(0), size), sprites.backgrounds(s, make_gen(1), size)
    assert a.shape == (12, 3, size, size) and 0 <= a.min() and a.max() <= 1
    assert ((a - b).abs().amax((1, 2, 3)) > .02).all() and ((a[:6] - a[6:]).abs().amax((1, 2, 3)) > .02).all()
    mean = a.mean((2, 3)); apart = torch.cdist(mean[:6], mean[:6]) + 9 * torch.eye(6)
    assert apart.min() > .05
