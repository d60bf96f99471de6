"""Peak host memory of `T2VTurboPipeline.from_pretrained` and of `t2v-turbo sample`, beside the weights in the precision asked for

    python bench/load_memory.py --folder /tmp/load      # about 15 minutes on 2 cores; writes 8 GB of random weights, once

Networks of 227 M parameters (.87 GB in float32; --channels 320,640,1280,1280 has the published 1.4 B) with random weights, in every form that can be loaded: an
adapter folder, a whole model, and the published students by name, out of a hub's cache without a hub. By name there are two rows: `first` converts and loads,
`kept` finds the conversion. Each row is a process of its own; what was resident before is subtracted. The peak is of memory that belongs to no file (`RssAnon`,
looked at every 2 ms); pages of mapped files, which the kernel can drop at any time, are in the last column. Exit code 1 if a peak is above 1.3 times the
weights."""
import argparse
import subprocess
import sys
from pathlib import Path

CHILD = """
import contextlib, gc, sys, threading, torch
from huggingface_hub import constants
from t2v_turbo.pipeline import T2VTurboPipeline
from t2v_turbo.using import SampleOptions, sample
def status(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name + ":")) / 1024
made, load = [], T2VTurboPipeline.from_pretrained.__func__
def keeping(cls, *args, **kwargs):
    made.append(load(cls, *args, **kwargs))
    made[-1].register_to_config(height=32, width=32, num_frames=4)    # little besides the weights
    return made[-1]
def work(name):
    if {verb!r} == "load": keeping(T2VTurboPipeline, name, dtype=torch.{dtype})
    else: sample(SampleOptions(student=name, prompt="a panda", out={out!r}, steps=1, format="gif", dtype={dtype!r}))
T2VTurboPipeline.from_pretrained = classmethod(keeping)
constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = {cache!r}, True
with contextlib.redirect_stdout(sys.stderr): work({warm!r})           # imports, and small buffers of the libraries
made.clear(); gc.collect(); before, all_before, most, done = status("RssAnon"), status("VmRSS"), [0.], threading.Event()
def watch():
    while not done.wait(.002): most[0] = max(most[0], status("RssAnon"))
thread = threading.Thread(target=watch); thread.start()
with contextlib.redirect_stdout(sys.stderr): work({name!r})
done.set(); thread.join()
nets = [getattr(made[0], n) for n in ("denoiser", "vae", "text_encoder")]
weights = sum(v.nbytes for n in nets for v in n.state_dict().values()) / 2**20
assert {{p.dtype for n in nets for p in n.parameters()}} == {{torch.{dtype}}}
print(f"RESULT {{weights:.0f}} {{most[0] - before:.0f}} {{status('VmHWM') - all_before:.0f}}")
"""


def snapshot(folder, repo):
    "A folder of the hub's cache, as a download leaves it"
    at = folder / "hub" / f"models--{repo.replace('/', '--')}"
    (at / "refs").mkdir(parents=True)
    (at / "refs/main").write_text("0" * 40)
    (at / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return at / "snapshots" / ("0" * 40)


def lora_list(unet, base, rank):
    "The published list for a UNet, with random numbers"
    import torch

    from t2v_turbo.core import make_gen
    from t2v_turbo.teachers.published import layer_shapes
    gen, out = make_gen(1), []
    for o, i, *k in layer_shapes(unet, base).values():
        r = min(rank, o, i)
        out += [.01 * torch.randn(o, r, *[1] * len(k), generator=gen), .01 * torch.randn(r, i, *k, generator=gen)]
    return out


def make_own(folder, channels, rank, layers=2):
    "A teacher in float32, a random student on it, and the same student as a whole model"
    import torch
    from diffusers import UNet3DConditionModel

    from t2v_turbo.core import make_gen
    from t2v_turbo.pipeline import T2VTurboPipeline
    from t2v_turbo.saved import save_student
    from t2v_turbo.standins import tiny_modelscope
    from t2v_turbo.student import Student
    from t2v_turbo.teachers.folders import load_teacher
    if (folder / "whole").is_dir(): return
    tiny_modelscope(folder / "small")
    tiny_modelscope(folder / "teacher")
    kinds = ("CrossAttnDownBlock3D",) * (len(channels) - 1) + ("DownBlock3D",)
    net = UNet3DConditionModel(sample_size=4, block_out_channels=channels, cross_attention_dim=32, down_block_types=kinds, layers_per_block=layers,
                               up_block_types=tuple(k.replace("Down", "Up") for k in reversed(kinds)))
    net.save_pretrained(folder / "teacher/unet")
    for name in ("small", "teacher"):
        student = Student(load_teacher(folder / name), rank if name == "teacher" else 2)
        with torch.no_grad():
            for p in student.trainable().values(): p.copy_(.01 * torch.randn(p.shape, generator=make_gen(0)))
        save_student(student, folder / f"{name} student")
    T2VTurboPipeline.from_pretrained(folder / "teacher student").save_pretrained(folder / "whole")


def make_modelscope(folder, rank):
    "A hub's cache with the student of ModelScopeT2V and its base model; needs `make_own`"
    import shutil

    import torch

    from t2v_turbo.names import STUDENTS, TEACHERS
    from t2v_turbo.teachers.published import base_unet, with_w_projection
    student, base = STUDENTS["t2v-turbo-ms"], TEACHERS["modelscope"]
    shutil.copytree(folder / "teacher", snapshot(folder, base.at), dirs_exist_ok=True)
    pairs = lora_list(with_w_projection(base_unet(folder / "teacher")[0]), "ms", rank)
    torch.save(pairs, snapshot(folder, student.at.rpartition("/")[0]) / "unet_lora.pt")


def make_published(folder, channels, rank, layers=2):
    "A hub's cache with all published students and their base models; needs `make_own`"
    import torch
    from diffusers import UNet3DConditionModel

    from t2v_turbo.names import MERGES, STUDENTS, TEACHERS
    from t2v_turbo.standins import random_videocrafter2, vc2_sizes
    from t2v_turbo.teachers.videocrafter2 import PREFIXES, stock_network, unet_config
    if (folder / "hub").is_dir(): return
    make_modelscope(folder, rank // 2)
    sizes, n = vc2_sizes(tiny=True), len(channels)
    sizes["unet"] |= dict(block_out_channels=list(channels), layers_per_block=layers, down_block_types=["CrossAttnDownBlock3D"] * (n - 1) + ["DownBlock3D"],
                          up_block_types=["UpBlock3D"] + ["CrossAttnUpBlock3D"] * (n - 1))
    state = random_videocrafter2(sizes)
    net = {k.removeprefix(PREFIXES["unet"]): v for k, v in state.items() if k.startswith(PREFIXES["unet"])}
    student, c = stock_network(UNet3DConditionModel, unet_config(net) | dict(time_cond_proj_dim=256)), channels[0]
    merged = net | {"time_cond_proj.weight": torch.zeros(c, 256)}
    motion = {"motion_cond_proj.weight": torch.zeros(c, 256), "combine_proj.weight": torch.zeros(c, 2 * c)}
    (snapshot(folder, MERGES.rpartition("/")[0]) / "merges.txt").write_text("#version: 0.2\np a\npa n\npan d\npand a</w>\na n\nan d</w>\n")
    for s, what in ((TEACHERS["videocrafter2"], dict(state_dict=state)), (STUDENTS["t2v-turbo-vc2"], lora_list(student, "vc2", rank)),
                    (STUDENTS["t2v-turbo-vc2-merged"], merged), (STUDENTS["t2v-turbo-v2"], merged | motion), (STUDENTS["t2v-turbo-v2-no-mg"], merged)):
        repo, _, file = s.at.rpartition("/")
        torch.save(what, snapshot(folder, repo) / file)


def measure(folder, name, dtype, verb="load"):
    "MiB of the weights, of the peak without files, and of the peak with them, above what was there before"
    code = CHILD.format(name=str(name), warm=str(folder / "small student"), dtype=dtype, verb=verb, cache=str(folder / "hub"), out=str(folder / "videos"))
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    line = next((l for l in out.stdout.splitlines() if l.startswith("RESULT")), None)
    if line is None: sys.exit(out.stderr[-2000:])
    return [float(v) for v in line.split()[1:]]


def rows(folder, dtypes):
    "What is measured: a label, the name or folder, the precision and the verb"
    import shutil

    from t2v_turbo.names import STUDENTS
    for kind, name in (("adapters", "teacher student"), ("whole model", "whole")):
        for dtype in dtypes:
            for verb in ("load", "sample"): yield kind, folder / name, dtype, verb
    for name in STUDENTS:
        for dtype in dtypes:
            shutil.rmtree(folder / "t2v_turbo", ignore_errors=True)
            for kind in ("first", "kept"): yield f"{name}, {kind}", name, dtype, "load"
            yield f"{name}, kept", name, dtype, "sample"


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, required=True, help="for the weights; kept, and used again")
    p.add_argument("--channels", default="128,256,512,512", help="of the UNet's levels")
    p.add_argument("--layers", type=int, default=2, help="in a block of the UNet")
    p.add_argument("--rank", type=int, default=64, help="of LoRA")
    p.add_argument("--dtypes", default="float32,float16,bfloat16")
    a = p.parse_args(argv)
    channels = tuple(map(int, a.channels.split(",")))
    for make in ("make_own", "make_published"):                  # in processes of their own, whose memory goes with them
        subprocess.run([sys.executable, "-c", f"from bench.load_memory import {make}; from pathlib import Path\n{make}(Path({str(a.folder.resolve())!r}), "
                        f"{channels}, {a.rank}, {a.layers})"], check=True, cwd=Path(__file__).parent.parent)
    worst = 0.
    print("| | dtype | verb | weights, MiB | peak, MiB | ratio | peak with mapped files, MiB |\n|---|---|---|---|---|---|---|")
    for kind, name, dtype, verb in rows(a.folder.resolve(), a.dtypes.split(",")):
        weights, peak, everything = measure(a.folder.resolve(), name, dtype, verb)
        worst = max(worst, peak / weights)
        print(f"| {kind} | {dtype} | {verb} | {weights:.0f} | {peak:.0f} | {peak / weights:.2f} | {everything:.0f} |", flush=True)
    return int(worst > 1.3)


if __name__ == "__main__": sys.exit(main())
