"Intervals over prompts, votes and seeds; one bootstrap for all of them"
import numpy as np
import pytest

from t2v_turbo.files import UserError
from t2v_turbo.stats import (
    bootstrap,
    detectable,
    half_width,
    holm,
    interval,
    krippendorff,
    over_prompts,
    p_value,
    paired,
    prompts_needed,
    redraw,
    share_interval,
    together,
    two_spreads,
    verdict,
    wilson,
)


def test_redraw_agrees_with_scipy():
    "The same draws, also for several groups and more draws than fit into one block"
    from scipy import stats
    rng = np.random.default_rng(4)
    a, b = rng.random(7), rng.random(11)
    both = lambda x, y, axis=-1: x.mean(axis) - y.mean(axis)
    want = stats.bootstrap([a, b], both, n_resamples=1300, batch=500, vectorized=True, method="percentile", rng=np.random.default_rng(2))
    got = redraw([7, 11], lambda i, j: a[i].mean(-1) - b[j].mean(-1), 1300, 2)
    assert got.shape == (1300,) and (got == want.bootstrap_distribution).all()
    assert interval(got) == pytest.approx([want.confidence_interval.low, want.confidence_interval.high], rel=1e-12)


def test_one_group_is_drawn_as_in_one_piece():
    "Published intervals were drawn with one call for all draws"
    x, at = np.random.default_rng(0).random(24), np.random.default_rng(3).integers(24, size=(2000, 24))
    assert (bootstrap(x, 2000, 3) == x[at].mean(1)).all()


def test_shares():
    assert wilson(8, 10) == pytest.approx((.4902, .9433), abs=1e-4) and wilson(0, 0) is None
    won, n = np.array([3., 0., 5., 0.]), np.array([4., 2., 5., 0.])
    low, high = share_interval(won, n, 500, 1)
    at = np.random.default_rng(1).integers(3, size=(500, 3))
    assert (low, high) == tuple(np.quantile(won[at].sum(1) / n[at].sum(1), [.025, .975]))
    assert share_interval(won[:1], n[:1]) is None is share_interval(won[[0, 3]], n[[0, 3]])


def test_bootstrap():
    assert half_width(bootstrap([.5] * 9)) == 0
    assert abs(half_width(bootstrap([0.] * 50 + [1.] * 50)) - 1.96 * .05) < .015
    assert (bootstrap([0, 1, 1], seed=1) == bootstrap([0, 1, 1], seed=1)).all() and len(bootstrap([0, 1])) == 1000


def test_a_verdict_needs_the_interval():
    "By hand: differences 1, 2, 3 have mean 2, standard deviation 1, and t = 4.303 with two degrees of freedom"
    d = paired([2, 4, 6], [1, 2, 3])
    assert d == pytest.approx((2, 2 - 4.302653 / 3**.5, 2 + 4.302653 / 3**.5)) and verdict(*d) == "not told apart"
    assert verdict(*paired([1, 1.1, .9], [0, 0, 0])) == "agrees" and verdict(*paired([0, 0, 0], [1, 1.1, .9])) == "disagrees"
    assert verdict(*paired([9], [0])) == "not told apart" == verdict(*paired([1, 1], [1, 1]))


@pytest.mark.parametrize("effect, n", [(.2, 199), (.3, 90), (.5, 34), (.8, 15)])
def test_prompts_needed_against_the_textbook(effect, n):
    assert prompts_needed(effect, 1) == prompts_needed(-effect, 1) == n


def test_prompts_needed_is_enough():
    from scipy import stats
    n, rng = prompts_needed(.1), np.random.default_rng(0)
    x = (rng.random((4000, n)) < .6) - .5
    assert abs((stats.ttest_1samp(x, 0, axis=1).pvalue < .05).mean() - .8) < .03
    assert prompts_needed(.1, power=.9) > n > prompts_needed(.1, alpha=.1) and prompts_needed(3., .01) == 2
    for bad in (dict(d=0), dict(d=.1, sd=0), dict(d=.1, power=1), dict(d=.1, alpha=0), dict(d=.1, power=.01)):
        with pytest.raises(UserError): prompts_needed(**bad)


def test_prompts_add_in_squares():
    assert over_prompts([dict(ci95=.3)] * 2, [dict(ci95=.4)] * 2) == pytest.approx(.5)
    assert paired([1., 1.], [0., 0.], .5) == (1, .5, 1.5)


def test_agreement_by_krippendorffs_own_example():
    coders = ["1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 ."]
    units = list(zip(*(c.split() for c in coders)))
    assert krippendorff([[u.count(str(v)) for v in range(1, 6)] for u in units]) == pytest.approx(.743, abs=5e-4)


def test_many_comparisons():
    "Holm by its definition, on p-values in any order; `together` gives them to the verdicts"
    from scipy import stats
    rng = np.random.default_rng(0)
    p = rng.random(9)**3
    by_hand = [max(min(1, (9 - k) * q) for k, q in enumerate(sorted(p)) if q <= v) for v in p]
    assert holm(p) == pytest.approx(by_hand) and (holm(p) >= p).all()
    a, b = rng.normal(size=(2, 5))
    assert p_value(a, b) == pytest.approx(stats.ttest_rel(a, b).pvalue)
    same, far = (a, a), (a + 3 + b / 100, a)
    assert [v[4] for v in together([same, far])] == ["not told apart", "agrees"] and together([far] * 40)[0][3] == pytest.approx(min(1, 40 * p_value(*far)))


def test_power_and_spreads():
    "As often as promised, by simulation; a student that is judged twice tells its two kinds of luck apart"
    rng = np.random.default_rng(1)
    seen = [p_value(rng.normal(detectable(2., 5), 2., 5), np.zeros(5)) < .05 for _ in range(4000)]
    assert np.mean(seen) == pytest.approx(.8, abs=.03)
    students = rng.normal(size=(2000, 5)) * .3
    parts = [two_spreads(s + rng.normal(size=5) * .1, s + rng.normal(size=5) * .1) for s in students]
    training, judging = (np.mean(np.square(v))**.5 for v in zip(*parts))
    assert training == pytest.approx(.3, abs=.02) and judging == pytest.approx(.1, abs=.005)
