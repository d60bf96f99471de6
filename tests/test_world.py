"The tiny world: what the teacher was trained on must not change"
import hashlib

import pytest
import torch

from t2v_turbo import core
from t2v_turbo.core import make_gen
from t2v_turbo.files import UserError
from t2v_turbo.world import (
    ATTRS,
    COLOURS,
    MOTIONS,
    REVERSED,
    SHAPES,
    World,
    blur,
    caption,
    combos,
    flicker,
    is_heldout,
    logo,
    parse,
    render,
    sample_attrs,
    step_gen,
    watermark,
    web,
)

close = torch.testing.assert_close


def test_captions_round_trip():
    assert len(ATTRS) == len({caption(*a) for a in ATTRS}) == 120
    assert [parse(caption(*a)) for a in ATTRS] == list(ATTRS)
    assert parse("  A RED circle   moving left ") == (0, 0, 0)


@pytest.mark.parametrize("text", ["", "red circle", "a red circle moving", "a pink circle growing"])
def test_foreign_caption(text):
    with pytest.raises(UserError, match="is not a caption of the tiny world"): parse(text)


def test_split():
    train, held = (set(map(tuple, combos(s).tolist())) for s in ("train", "heldout"))
    assert (len(train), len(held), train & held, train | held) == (96, 24, set(), set(ATTRS))
    for s in range(len(SHAPES)):
        for m in range(len(MOTIONS)):
            assert sum(is_heldout(s, c, m) for c in range(len(COLOURS))) == 1
    with pytest.raises(UserError, match="no split 'val'"): combos("val")
    with pytest.raises(UserError, match="no split 'val'"): World("val")


def test_unseen_triples_have_seen_pairs():
    train = combos("train")
    assert [len(train[:, p].unique(dim=0)) for p in ([0, 1], [0, 2], [1, 2])] == [20, 24, 30]


@pytest.mark.parametrize("a", ATTRS[::7], ids=lambda a: caption(*a).replace(" ", "_"))
def test_backwards_is_the_opposite_motion(a):
    s, c, m = a
    back = (s, c, MOTIONS.index(REVERSED[MOTIONS[m]]))
    clips = [render(torch.tensor([t]), make_gen(5)) for t in (a, back)]
    close(clips[0].flip(2), clips[1])
    assert (clips[0] - clips[1]).abs().max() > .1


def test_movers_move_more_than_two_pixels_a_frame():
    attrs = combos("all"); attrs = attrs[attrs[:, 2] < 4]
    clips = render(attrs, make_gen(0))
    d = (clips - clips[..., :1, :1]).abs().sum(1)
    g = torch.arange(32.)
    x, y = [(d * v).sum((2, 3)) / d.sum((2, 3)) for v in (g, g[:, None])]
    way = torch.tensor([(-1., 0), (1, 0), (0, -1), (0, 1)])[attrs[:, 2]]
    along = x.diff() * way[:, :1] + y.diff() * way[:, 1:]
    assert along.min() > 2 and along.max() < 2.6


def test_colours_are_the_colours():
    attrs = combos("all")
    clips = render(attrs, make_gen(1))
    d = (clips - clips[..., :1, :1]).abs().sum(1, keepdim=True)
    seen = clips.amax((3, 4)).mean(2)                # a bright background may hide weak channels
    assert (d.amax((2, 3, 4)) > .2).all()
    rgb = torch.tensor(list(COLOURS.values()))
    assert (torch.cdist(seen, rgb).argmin(1) == attrs[:, 1]).float().mean() > .9


def test_size_is_only_resolution():
    attrs = combos("heldout")
    small, large = render(attrs, make_gen(2)), render(attrs, make_gen(2), size=64)
    pooled = torch.nn.functional.avg_pool3d(large, (1, 2, 2))
    assert (small - pooled).abs().mean() < .01


# mean and standard deviation over the 96 clips of training, and how many have each flaw
PINNED = {"render": (.217017, .141942), "web": (.222913, .148806)}
FLAW_COUNTS = [50, 54, 56]


def test_pinned_pictures():
    "The shipped teacher saw these clips; a change of the world would make it a teacher of another one"
    gen = make_gen(123)
    clips = render(combos("train"), gen)
    seen, flaws = web(clips, gen)
    for name, x in (("render", clips), ("web", seen)):
        got = torch.stack([x.double().mean(), x.double().std()])
        close(got, torch.tensor(PINNED[name], dtype=torch.double), atol=2e-5, rtol=0, msg=f"{name} {got}")
    assert flaws.sum(0).tolist() == FLAW_COUNTS


def test_flaws():
    flat = torch.full((2, 3, 8, 32, 32), .5)
    close(blur(flat), flat)
    spot = torch.zeros(1, 3, 1, 32, 32); spot[..., 16, 16] = 1
    close(blur(spot).sum(), spot.sum()); assert blur(spot).max() < .12
    marked = watermark(flat)
    assert ((marked != flat) == logo().bool()).all()
    g = flicker(flat, make_gen(0))
    assert g.std((3, 4)).max() < 1e-6 and g.std(2).min() > .01 and (g[0] != g[1]).any()


def test_web_rates_and_labels():
    clips = render(sample_attrs(2000, "train", make_gen(0)), make_gen(1), frames=2)
    seen, flaws = web(clips, make_gen(2))
    close(flaws.float().mean(0), torch.tensor([.5, .6, .5]), atol=.04, rtol=0)
    clean = ~flaws.any(1)
    close(clean.float().mean(), torch.tensor(.1), atol=.02, rtol=0)
    changed = (seen != clips).flatten(1).any(1)
    assert (changed == ~clean).all()
    close(web(clips, make_gen(0), p=(0, 0, 0))[0], clips, rtol=0, atol=0)


def test_batches_depend_on_seed_and_step_alone():
    world = World(seed=3)
    a = world.batch(10, 4); world.batch(11, 4); b = World(seed=3).batch(10, 4)
    assert torch.equal(a[0], b[0]) and a[1] == b[1]
    assert a[0].shape == (4, 3, 8, 32, 32) and 0 <= a[0].min() and a[0].max() <= 1
    for other in (world.batch(11, 4), World(seed=4).batch(10, 4)): assert not torch.equal(a[0], other[0])


def test_wrong_captions_and_clean():
    "The clean world says what it shows; the other lies in 8 % of its captions"
    attrs = sample_attrs(4000, "train", make_gen(0))
    told = World()._mix_up(attrs, make_gen(1))
    close((told != attrs).any(1).float().mean(), torch.tensor(.08 * 95 / 96), atol=.015, rtol=0)
    assert not any(is_heldout(*a) for a in told.tolist())
    for split in ("train", "heldout"):
        clips, captions = World(split, clean=True).batch(0, 64)
        assert all(is_heldout(*parse(t)) == (split == "heldout") for t in captions)
        corner = lambda i: clips[..., i, i]                          # the background, in all frames
        close(corner(0), corner(0)[..., :1].expand(64, 3, 8), atol=.02, rtol=0)  # no flicker
        assert ((corner(-3) - corner(0)).abs().amax((1, 2)) < .05).float().mean() > .9  # no watermark


def test_streams_share_no_numbers():
    "Name, seed and step each make another generator; the tiny world's clips keep the numbers of their own"
    first = lambda gen: torch.rand(2, generator=gen).tolist()
    ways = [(s, i, n) for s in (0, 1, 1_000_003, -1) for i in (-3, 0, 17, 1_000_003) for n in ("clips", "noise", "evaluate", "looks")]
    assert len({tuple(first(core.step_gen(*w))) for w in ways}) == len(ways)
    assert first(step_gen(3, 5)) == first(core.step_gen(3, 5, "clips")) == first(core.step_gen(3, 5))
    plain = [first(make_gen(1_000_003 * s + i)) for s, i, _ in ways]
    assert not [w for w in ways if first(core.step_gen(*w)) in plain]
    assert all(0 <= core.step_seed(*w) < 2**63 for w in ways)
    assert core.step_seed(0, 17, "noise") == int(hashlib.sha256(b"noise/0/17").hexdigest()[:16], 16) // 2


def test_clips_of_the_world_are_those_the_weights_were_trained_on():
    "Drawn by the formula of the shipped weights, whatever `step_gen` does"
    gen = make_gen(7 * 1_000_003 + 3)
    attrs = sample_attrs(4, "train", gen)
    clips, _ = web(render(attrs, gen), gen)
    assert torch.equal(World(seed=7).batch(3, 4)[0], clips)
    assert not torch.equal(sample_attrs(64, "train", step_gen(7, 3)), sample_attrs(64, "train", make_gen(7 * 1_000_003 + 3)))
