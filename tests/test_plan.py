"The prediction of memory: the same on `meta` as with weights, and near what a process really takes"
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from t2v_turbo import cli, train
from t2v_turbo.files import UserError
from t2v_turbo.fit import GB, RESERVE, SWITCHES, Plan, flags_of, plan_table
from t2v_turbo.meter import Meter
from t2v_turbo.optimizer import make_optimizer
from t2v_turbo.plan import (
    Setup,
    bytes_of,
    metered,
    optimizer_bytes,
    predict,
    reward_on_meta,
    save_reward,
    teacher_on_meta,
    weights_of,
)
from t2v_turbo.rewards.names import FACTS
from t2v_turbo.train import Trainer

PATH = next(p/"bench/plan.py" for p in Path(__file__).resolve().parents if (p/"bench/plan.py").is_file())
spec = importlib.util.spec_from_file_location("bench_plan", PATH)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
SMALL = dict(unet=dict(kind="unet", width=16, frames=8, size=32), wan=dict(kind="wan", width=24, frames=29, size=32))


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("switches", [dict(denoiser=False, decode=0), dict(denoiser=True, decode=1, batch=2)],
                         ids=["kept", "again"])
def test_meta_counts_what_a_cpu_counts(kind, switches):
    c = SMALL[kind] | switches
    meta, real = (metered(bench.build(c, d), c.get("batch", 1)) for d in ("meta", "cpu"))
    kept = lambda m: {k: v["kept"] for k, v in m.phases.items() if k != "backward"}     # 80 bytes of decode are only there on a CPU
    assert kept(meta) == pytest.approx(kept(real), rel=0, abs=80) and list(meta.phases)[-1] == "backward" and len(meta.phases) == 9
    assert meta.peak == pytest.approx(real.peak, rel=.02)
    assert meta.flops == real.flops > 0


def test_nothing_is_left_patched(monkeypatch):
    model = bench.build(SMALL["unet"] | dict(denoiser=True, decode=1), "meta")
    monkeypatch.setattr(model.image_reward, "forward", lambda frames, prompts: 1/0)
    before, attention = dict(vars(model)), torch.nn.functional.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError): metered(model)
    assert vars(model).keys() == before.keys()
    assert torch.nn.functional.scaled_dot_product_attention is attention


def test_operations_are_those_of_pytorchs_counter():
    x, net = torch.randn(2, 3, 16, 16), torch.nn.Conv2d(3, 8, 3)
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    def run():
        net(x).sum().backward()
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    with FlopCounterMode(display=False) as theirs: net(x).sum().backward()
    with Meter() as ours: run()
    attention = 2*2*(8*8*4)*2                                  # two products of 8 x 8 x 4 in each of two heads
    assert ours.flops == theirs.get_total_flops() + attention*(1 + 5/2)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_optimizer_bytes(name):
    if name == "adamw8bit": pytest.importorskip("bitsandbytes")
    params = [torch.nn.Parameter(torch.randn(n)) for n in (8192, 100)]
    opt = make_optimizer(name, params, 1e-3)
    for p in params: p.grad = torch.ones_like(p)
    opt.step()
    state = [v for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.ndim]
    assert optimizer_bytes(name, params) == pytest.approx(sum(v.nbytes for v in state), rel=.02)


def there(names):
    "VideoPrism is passed over where transformers has none"
    old = pytest.mark.skipif(not hasattr(transformers, "VideoPrismTokenizer"), reason="transformers has VideoPrism since 5.13")
    return [pytest.param(n, marks=old) if "videoprism" in n else n for n in names]


@pytest.mark.parametrize("name", there(sorted(FACTS)))
def test_every_reward_has_sizes(name):
    reward = reward_on_meta(name)
    frames = torch.rand(1, 3, FACTS[name].frames or 4, 64, 64, device="meta", requires_grad=True)
    with Meter("meta", [*reward.parameters(), *reward.buffers(), frames]):
        torch.autograd.backward(reward(frames, ["a prompt"]).sum())
    assert frames.grad.shape == frames.shape and weights_of(reward) > 0


@pytest.mark.parametrize("name", there(["viclip-b16", "videoprism-base", "hpsv2.1"]))
def test_rewards_run_again_keep_less(name):
    reward = reward_on_meta(name)
    def kept(save):
        n = FACTS[name].frames
        x = torch.rand(3 if n == 1 else 1, 3, n, 64, 64, device="meta", requires_grad=True)
        with Meter("meta", [*reward.parameters(), *reward.buffers(), x]) as m:
            y = save_reward(reward, save)(x, ["a"]*len(x))
            return m.live + 0*y.numel()
    assert kept(True) < .5*kept(False)


def test_shared_storages_count_once():
    x = torch.zeros(10)
    assert bytes_of([x, x.view(2, 5), x[:3]]) == 40 and weights_of(None) == 0


def test_the_goal_at_full_size():
    plan = predict(Setup("modelscope", ("hpsv2.1", "viclip-l14")))
    assert plan.weights["denoiser"] == pytest.approx(2*1.411e9, rel=.01)
    assert plan.total/GB + RESERVE < 24 and plan.highest == "backward"
    assert plan.gb()["total"] == pytest.approx(sum(v for k, v in plan.gb().items() if k in plan.weights or k.startswith("peak")))


def test_a_cache_takes_the_text_encoder_away():
    "Wan's encoder asks whether its mask is full, which `meta` cannot answer by itself"
    plain, cached = (predict(Setup("wan2.1-1.3b", ("hpsv2.1",), 13, (32, 32), cached=c, image_frames=2)) for c in ("", "latents"))
    assert plain.weights["text"] > 0 == cached.weights["text"]
    assert sum(v["flops"] for v in plain.phases.values()) > sum(v["flops"] for v in cached.phases.values())


@pytest.mark.parametrize("name, parameters, text, latents", [
    ("wan2.1-1.3b", 1.42, 5.68, (16, 21, 60, 104)), ("wan2.2-5b", 5.0, 5.68, (48, 31, 44, 80)), ("sana-2b", 2.06, 2.61, (16, 21, 60, 104))])
def test_sizes_of_the_transformers(name, parameters, text, latents):
    "The numbers of parameters that the models are named after, in billions"
    teacher, count = teacher_on_meta(name), lambda net: sum(p.numel() for p in net.parameters())/1e9
    assert count(teacher.denoiser) == pytest.approx(parameters, rel=.01) and count(teacher.text_encoder) == pytest.approx(text, rel=.01)
    assert teacher.latent_shape == latents


def test_sana_is_planned_and_sizes_are_checked():
    plan = predict(Setup("sana-2b", ("clipscore",), 1, (32, 32), image_frames=1))
    assert {k for k, v in plan.phases.items() if v["flops"]} >= {"encode", "text", "student", "decode", "image reward", "backward"}
    assert plan.weights["denoiser"] > 3.5*GB and plan.weights["adapters"] == plan.weights["optimizer"]/2
    for name in ("sana-2b", "wan2.2-5b"):
        with pytest.raises(UserError, match="multiples of 32, the nearest is 64x64"): predict(Setup(name, (), 9, (48, 64)))


def test_two_rewards_of_a_kind_and_an_unknown_optimizer():
    with pytest.raises(UserError, match="clipscore is a second image reward"): predict(Setup("tiny", ("tiny-image", "clipscore")))
    with pytest.raises(UserError, match="optimizer 'sgd' is unknown"): optimizer_bytes("sgd", [])
    with pytest.raises(UserError, match="batch is 0: give 1 or more clips"): Setup("tiny", ("tiny-image",), batch=0)


def test_table_names_the_first_row_that_fits():
    plan = lambda gb: Plan(dict(denoiser=gb*GB), dict(student=dict(kept=0, peak=0, flops=2*10**12)), 0)
    rows = list(zip([n for n, _ in SWITCHES], map(plan, (30, 20, 5))))
    table = lambda gpu, rows=rows: plan_table(rows, gpu).splitlines()
    assert table(48)[-1] == "48 GB are enough as it is" and "the least is 5.0 GB" in table(5)[-1]
    assert table(24)[-2:] == ["24 GB are enough with: frozen weights in bfloat16", "add to distill: --dtype bfloat16"]
    assert table(12)[-2:] == ["12 GB are enough with: frozen weights in bfloat16, denoiser run again in backward",
                              "add to distill: --dtype bfloat16 --save_memory denoiser"]
    assert table(12, rows[2:])[-1] == "add to distill: --dtype bfloat16 --save_memory denoiser"      # also of a part of the rows
    assert table(24)[2].split() == ["frozen", "weights", "in", "bfloat16", "20.0", "0.0", "20.0", "2.0", "student"]


@pytest.mark.parametrize("i", range(len(SWITCHES)), ids=lambda i: SWITCHES[i][0])
def test_the_flags_switch_on_what_the_row_says(i, tmp_path, monkeypatch):
    "Told to `distill`, the flags of a row give a trainer with the switches that the row was computed with"
    seen, on = {}, {k: v for _, more in SWITCHES[:i + 1] for k, v in more.items()}
    monkeypatch.setattr("t2v_turbo.running.distill", lambda cfg, *_: seen.update(cfg=cfg))
    assert cli.main(["distill", *flags_of(SWITCHES[i][0]).split(), "--rank", "2", "--track", ""]) == 0
    c, kind = seen["cfg"], on.get("cached", "")
    assert c.dtype == on["dtype"] and c.optimizer == on.get("optimizer", "adamw")
    assert (c.data, c.texts) == ((f"cache/{kind}", "cache/texts") if kind else ("", ""))
    calls, own = [], {}
    monkeypatch.setattr(train, "save_memory", lambda teacher, denoiser, decode: calls.append((denoiser, decode)))
    monkeypatch.setattr(train, "rewards_from", lambda names, given, vocabulary: own.update(given) or dict(image=None, video=None))
    Trainer(replace(c, out=str(tmp_path), data="", texts="", optimizer="adamw", reward="hpsv2.1@a,viclip-l14@b"), Tone(), Tone())
    assert calls == ([(on["denoiser"], on["decode"])] if on["denoiser"] or on["decode"] else [])
    assert bool(own["hpsv2.1"].get("chunk")) == bool(own["viclip-l14"].get("save_memory")) == on["save_rewards"]


class Tone(torch.nn.Module):
    def forward(self, frames, prompts): return frames.mean((1, 2, 3, 4))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("i", [0, 7], ids=lambda i: bench.CONFIGS[i]["kind"])
def test_within_a_fifth_of_what_a_process_takes(i, tmp_path, capsys):
    assert bench.main(["--only", str(i), "--json", str(tmp_path/"rows.json")]) == 0
    row, = json.loads((tmp_path/"rows.json").read_text())
    assert .8 < row["predicted"]/row["measured"] < 1.2
    assert capsys.readouterr().out.count("|") >= 15


def test_full_size_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--full"]) == 2 and "needs a GPU" in capsys.readouterr().err
