"""The table that `t2v-turbo plan` answers from: parts of a step, for teachers, sizes, rewards and switches

`python tools/plan_table.py` measures what t2v_turbo/tables/plan.json lacks, half a minute a step, and writes the file after each step; run it again to resume.
`--again WORD` measures the steps whose line contains WORD again. `--todo` lists what is missing.
"""
import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from t2v_turbo.files import atomic
from t2v_turbo.fit import TABLE, VERSION

ROOT = Path(__file__).resolve().parents[1]
KEPT = dict(denoiser=False, decode=0, save_rewards=False)
SAVED = dict(denoiser=True, decode=1, save_rewards=True)
SIZES = {                               # frames, height, width: first the teacher's own
    "tiny": [(8, 64, 64)],
    "modelscope": [(16, 256, 256), (16, 320, 512), (8, 256, 256)],
    "videocrafter2": [(16, 320, 512), (16, 256, 256), (8, 320, 512)],
    "wan2.1-1.3b": [(81, 480, 832), (33, 480, 832), (49, 480, 832)],
    "wan2.2-5b": [(121, 704, 1280), (49, 704, 1280)],
    "sana-2b": [(81, 480, 832), (33, 480, 832), (49, 480, 832)],
}
PIXELS = [(256, 256), (320, 512), (480, 832), (704, 1280)]
PAIRS = [("hpsv2.1", "viclip-l14"), ("clipscore", "internvideo2"), ("pickscore", "viclip-b16"), ("aesthetic", "videoprism-base"), ("imagereward", "videoprism-large")]


def small_parts(size):
    "Networks of the classes of ModelScopeT2V, small: frames of any size for a reward, in little time"
    from diffusers import AutoencoderKL, UNet3DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    unet = UNet3DConditionModel(sample_size=size[0] // 8, time_cond_proj_dim=256, block_out_channels=(32,) * 4, layers_per_block=1, attention_head_dim=8,
                                cross_attention_dim=32)
    vae = AutoencoderKL(block_out_channels=(32,) * 4, layers_per_block=1, latent_channels=4, down_block_types=["DownEncoderBlock2D"] * 4,
                        up_block_types=["UpDecoderBlock2D"] * 4)
    return unet, vae, CLIPTextModel(CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4))


def setups():
    "Steps to measure, each with whether only its head is"
    import torch

    from t2v_turbo.plan import Setup
    half, full = torch.bfloat16, torch.float32

    def of(name, clip, rewards, rank=None):
        frames, *size = clip
        s = Setup(name, rewards, frames, tuple(size), rank=rank)
        yield replace(s, dtype=half, **KEPT), False
        yield replace(s, dtype=half, cached="latents", **SAVED), False
        yield replace(s, dtype=half, cached="pairs"), True
        yield replace(s, dtype=full, **KEPT), False

    first = {n: clips[0] for n, clips in SIZES.items()}
    for n, clip in first.items(): yield from of(n, clip, None)
    for n, clip in first.items(): yield from (x for x in of(n, clip, ()) if x[0].dtype == half and not x[1])
    for n, clips in SIZES.items():
        for clip in clips[1:]: yield from of(n, clip, None)
    for size in PIXELS:                 # a reward does not see which teacher made its frames
        for pair in PAIRS:
            s = Setup("small", pair, 16, size, cached="pairs", dtype=half)
            yield replace(s, **SAVED), False
            yield replace(s, **KEPT), False
            yield replace(s, dtype=full, **KEPT), False
    for n in ("modelscope", "videocrafter2"):
        for more in (("hpsv2.1",), ("viclip-l14",)): yield from (x for x in of(n, first[n], more) if not x[1])
    for n, clip in first.items():
        if n != "tiny": yield from (x for x in of(n, clip, None, 0) if not x[1])


def line(s, head):
    return f"{s.teacher} {s.frames}x{s.size[0]}x{s.size[1]} {s.dtype} {s.rewards} rank {s.rank} {'again' if s.denoiser else 'kept'} {s.cached}{' head' if head else ''}"


def wanted(s, head):
    "Keys of the table that a step gives"
    from t2v_turbo.pieces import asked_of
    from t2v_turbo.plan import model_on_meta
    keys = asked_of(s, model_on_meta(s)).keys()
    if head: return [keys["head"]]
    return [k for n, k in keys.items() if s.teacher != "small" or n in ("image", "video")]


def facts(held):
    "Teachers and rewards by name"
    from t2v_turbo.names import TEACHERS
    from t2v_turbo.pieces import facts_of
    from t2v_turbo.plan import Setup, model_on_meta, plan_sampling, reward_on_meta, weights_of
    from t2v_turbo.rewards.names import FACTS, kind_of_reward
    from t2v_turbo.using import listed_models, listed_rewards
    for n in SIZES:
        if n not in held["teachers"]: held["teachers"][n] = facts_of(n)
    for n in FACTS:
        if n in held["rewards"]: continue
        reward, kind = reward_on_meta(n), kind_of_reward(n)
        frames = model_on_meta(Setup("small", (n,))).cfg.video_frames if kind == "video" else 0
        held["rewards"][n] = dict(kind=kind, frames=frames, weights=weights_of(reward))
    for n in TEACHERS:
        if n not in held["sampling"]: held["sampling"][n] = plan_sampling(n).total
    held["list"] = [*listed_models(held["sampling"]), *listed_rewards({n: r["weights"] for n, r in held["rewards"].items()})]


def write(held):
    "Save the table, a line for each key"
    def part(v): return json.dumps(v, separators=(",", ":"))
    def block(d): return "{\n" + ",\n".join(f"{json.dumps(k)}:{part(d[k])}" for k in sorted(d)) + "\n}"
    text = ",\n".join(f"{json.dumps(k)}:{block(v) if isinstance(v, dict) else part(v)}" for k, v in held.items())
    TABLE.parent.mkdir(exist_ok=True)
    with atomic(TABLE, sync=False) as tmp: tmp.write_text("{" + text + "}\n", encoding="utf-8")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--again", default="", help="measure steps with this word again")
    p.add_argument("--todo", action="store_true", help="list what is missing")
    a = p.parse_args(argv)
    held = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    if held.get("version") != VERSION: held = dict(version=VERSION, teachers={}, rewards={}, sampling={}, pieces={})
    from t2v_turbo.pieces import pieces_of
    from t2v_turbo.plan import TEACHERS
    TEACHERS["small"] = small_parts, 16, (256, 256)
    if not a.todo: facts(held); write(held)
    for s, head in setups():
        again = a.again and a.again in line(s, head)
        keys = wanted(s, head)
        if not again and all(k in held["pieces"] for k in keys): continue
        if a.todo: print(line(s, head)); continue
        print(line(s, head), end=": ", flush=True)
        start = time.process_time()
        found = pieces_of(s, head)
        held["pieces"] |= {k: found[k] for k in keys}
        write(held)
        print(f"{time.process_time() - start:.0f} s", flush=True)


if __name__ == "__main__": main()
