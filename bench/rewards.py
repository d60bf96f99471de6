"""Memory and time of one reward, forward and backward, at full size with random weights.

    python bench/rewards.py --out rewards.csv            every reward at 8 and 16 frames
    python bench/rewards.py --rewards hpsv2.1 --frames 8 --dtype bfloat16 --device cuda
    python bench/rewards.py --small                      tiny networks, to try the script

Each line is measured in a process of its own: on a CPU the peak is the process's largest resident size, on CUDA the
allocator's. `extra` is the peak less what the frozen network and the clip hold before the step. `seconds` are the clock's
on CUDA and the processor's (all threads together) on a CPU, so that other work on the machine does not count.
"""
import argparse
import csv
import json
import subprocess
import sys
import time

import torch

PIXELS = 320, 512                                   # a clip of VideoCrafter2
COLUMNS = "reward frames dtype device saving parameters_M weights_GB peak_GB extra_GB seconds".split()


class Ids:
    "Stands in for a tokenizer: every prompt is the same full row of ids with the marks in place"
    pad_token_id = 0

    def __init__(self, first, last, n): self.row, self.model_max_length = [first, 5, 6, last], n

    def __call__(self, prompts, truncation, max_length=None, **_):
        if not truncation: return dict(input_ids=[self.row for _ in prompts])
        return dict(input_ids=torch.tensor([self.row + [0]*(max_length - 4)]*len(prompts)))


def clip_like(facts, fit, small):
    from transformers import CLIPConfig, CLIPModel

    from t2v_turbo import standins
    from t2v_turbo.rewards import clip
    if small: return lambda: clip.CLIPReward(facts, standins.tiny_clip(), Ids(518, 519, 77), fit)
    config = CLIPConfig(projection_dim=1024, vision_config=dict(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
        patch_size=14, image_size=224, hidden_act="gelu"), text_config=dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        hidden_act="gelu", eos_token_id=49407))
    return lambda: clip.CLIPReward(facts, CLIPModel(config), Ids(49406, 49407, 77), fit)


def builders(small):
    "Name: a function that builds the reward on the current device"
    from t2v_turbo import standins
    from t2v_turbo.rewards import clip, viclip
    from t2v_turbo.rewards import internvideo2 as iv2
    from t2v_turbo.rewards import videoprism as prism

    def with_words(build, words):
        def f():
            rm = build()
            rm.tokenizer = words
            return rm
        return f
    merges = Ids(518, 519, 32) if small else Ids(49406, 49407, 32)
    bert, prism_words = Ids(2, 3, 40), Ids(5, 6, 64)
    tiny = dict(viclip=lambda: viclip.viclip_model(standins.tiny_viclip(), heads=(2, 2)),
                iv2=lambda: iv2.internvideo2_model(standins.tiny_internvideo2(), **standins.TINY),
                prism=lambda n: prism.VideoPrism(prism.PRISM_B, standins.tiny_videoprism(frames=n), None))
    return {
        "hpsv2.1": clip_like(clip.HPS, clip.letterbox, small),
        "viclip-l14": with_words(tiny["viclip"] if small else viclip.viclip_full, merges),
        "viclip-b16": with_words(tiny["viclip"] if small else lambda: viclip.viclip_full(True), merges),
        "internvideo2": with_words(tiny["iv2"] if small else iv2.internvideo2_full, bert),
        "videoprism-base": with_words(
            (lambda: tiny["prism"](16)) if small else prism.videoprism_full, prism_words),
        "videoprism-large": with_words(
            (lambda: tiny["prism"](8)) if small else lambda: prism.videoprism_full(True), prism_words)}


def save_memory(rm):
    "Checkpoint image by image, or layer by layer"
    if hasattr(rm, "chunk"): rm.chunk = 1
    for part in ("eyes", "vision_encoder"):
        if hasattr(rm, part): getattr(rm, part).save_memory = True
    if hasattr(rm, "save_memory"):
        rm.save_memory = True
        rm.net.video_model.activation_checkpointing_enable()


def fits(rm, frames):
    "InternVideo2 takes any number, an image reward too, the others their own"
    return rm.facts.frames in (1, frames) or rm.facts.name == "internvideo2"


def peak(device):
    if device == "cuda": return torch.cuda.max_memory_allocated()/2**30
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20


def one(o):
    "Build, step once to warm up (CUDA only), measure a step; prints one JSON line"
    from dataclasses import replace
    build, dtype = builders(o.small)[o.rewards], getattr(torch, o.dtype)
    torch.manual_seed(0)
    before, default = torch.get_default_dtype(), torch.set_default_dtype
    default(dtype if dtype.is_floating_point else before)
    try:
        with torch.device("meta"): empty = None if o.small else build()
        rm = build() if o.small else empty.to_empty(device=o.device)
    finally: default(before)
    with torch.no_grad():
        for p in rm.parameters(): torch.nn.init.normal_(p, std=.02)
        for k, b in rm.named_buffers():
            n = torch.arange(b.shape[-1], device=b.device)
            b.copy_(n.expand(b.shape)) if k.endswith("position_ids") else b.zero_()
    rm = rm.to(o.device).frozen(dtype)
    if o.saving: save_memory(rm)
    if not fits(rm, o.frames): return print(json.dumps(None))
    if rm.facts.name == "internvideo2": rm.facts = replace(rm.facts, frames=o.frames)
    size = (40, 64) if o.small else PIXELS
    x = torch.rand(1, 3, o.frames, *size, device=o.device).requires_grad_()
    rm.text_features(["warm"])                       # the text tower runs once a prompt, not once a step
    steps, clock = (2, time.perf_counter) if o.device == "cuda" else (1, time.process_time)
    for _ in range(steps):
        if o.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        held, start = (torch.cuda.memory_allocated()/2**30 if o.device == "cuda" else now()), clock()
        g, = torch.autograd.grad(rm(x, ["warm"]).sum(), x)
        if o.device == "cuda": torch.cuda.synchronize()
        seconds = clock() - start
    assert g.isfinite().all() and g.abs().sum() > 0
    n, top = sum(p.numel() for p in rm.parameters()), peak(o.device)
    bytes_ = sum(p.numel()*p.element_size() for p in rm.parameters())
    print(json.dumps(dict(zip(COLUMNS, (o.rewards, o.frames, o.dtype, o.device, int(o.saving),
          round(n/1e6, 1), round(bytes_/2**30, 2), round(top, 2), round(top - held, 2), round(seconds, 2))))))


def now():
    "Resident size of this process in GiB"
    with open("/proc/self/statm") as f: return int(f.read().split()[1])*4096/2**30


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rewards", default="hpsv2.1,viclip-l14,internvideo2,videoprism-base,videoprism-large")
    p.add_argument("--frames", default="8,16")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--device", default="cpu")
    p.add_argument("--saving", default="0,1", help="0: keep activations; 1: run layers or images again")
    p.add_argument("--out", help="csv to write")
    p.add_argument("--small", action="store_true")
    p.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    o = p.parse_args()
    if o.one:
        o.frames, o.saving = int(o.frames), o.saving == "1"
        return one(o)
    rows = []
    print("".join(f"{c:>17}" for c in COLUMNS))
    for name in o.rewards.split(","):
        for frames in o.frames.split(","):
            for saving in o.saving.split(","):
                cmd = [sys.executable, __file__, "--one", "--rewards", name, "--frames", frames, "--saving",
                       saving, "--dtype", o.dtype, "--device", o.device, *["--small"][:o.small]]
                run = subprocess.run(cmd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
                said = run.stdout.strip().splitlines()
                if run.returncode:
                    why = (run.stderr.strip().splitlines() or ["no word"])[-1]
                    print(f"{name} at {frames} frames, saving {saving}: failed ({run.returncode}: {why})")
                elif (row := json.loads(said[-1])):
                    rows.append(row)
                    print("".join(f"{row[c]!s:>17}" for c in COLUMNS), flush=True)
    if o.out:
        with open(o.out, "w", newline="") as f:
            w = csv.DictWriter(f, COLUMNS)
            w.writeheader()
            w.writerows(rows)


if __name__ == "__main__": main()
