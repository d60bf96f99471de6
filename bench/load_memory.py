"""Peak host memory of `T2VTurboPipeline.from_pretrained`, beside the weights that it leaves in memory

    python bench/load_memory.py --folder /tmp/load      # about 2 minutes on 2 cores; writes 2.5 GB of random weights, once

A 3-D UNet of 227 M parameters (.87 GB in float32; --channels 320,640,1280,1280 has 1.4 B, as ModelScopeT2V) with random weights, as an adapter folder on
float32 files and as a whole model. Each load runs in a process of its own; what was resident before the load is subtracted. Exit code 1 if a peak is above
1.3 times the weights."""
import argparse
import subprocess
import sys
from pathlib import Path

CHILD = """
import gc, torch
from t2v_turbo.pipeline import T2VTurboPipeline
def status(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name + ":")) / 1024
T2VTurboPipeline.from_pretrained({warm!r})           # imports, and small buffers of the libraries
gc.collect(); before = status("VmRSS")
pipe = T2VTurboPipeline.from_pretrained({folder!r}, dtype=torch.{dtype})
nets = (pipe.denoiser, pipe.vae, pipe.text_encoder)
weights = sum(v.nbytes for n in nets for v in n.state_dict().values()) / 2**20
peak = status("VmHWM")                                # ru_maxrss would count the parent, too
assert {{p.dtype for n in nets for p in n.parameters()}} == {{torch.{dtype}}}
print(f"RESULT {{weights:.0f}} {{peak - before:.0f}}")
"""


def make(folder, channels, rank, layers=2):
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


def measure(folder, warm, dtype):
    "MiB of the weights, and of the peak above what was there before"
    code = CHILD.format(folder=str(folder), warm=str(warm), dtype=dtype)
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    line = next((l for l in out.stdout.splitlines() if l.startswith("RESULT")), None)
    if line is None: sys.exit(out.stderr[-2000:])
    return [float(v) for v in line.split()[1:]]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, required=True, help="for the weights; kept, and used again")
    p.add_argument("--channels", default="128,256,512,512", help="of the UNet's levels")
    p.add_argument("--layers", type=int, default=2, help="in a block of the UNet")
    p.add_argument("--rank", type=int, default=64, help="of LoRA")
    p.add_argument("--dtypes", default="float32,float16,bfloat16")
    a = p.parse_args()
    subprocess.run([sys.executable, "-c", f"from bench.load_memory import make; from pathlib import Path\nmake(Path({str(a.folder)!r}), "
                    f"{tuple(map(int, a.channels.split(',')))}, {a.rank}, {a.layers})"], check=True, cwd=Path(__file__).parent.parent)
    worst = 0.
    for kind, name in (("adapters", "teacher student"), ("whole model", "whole")):
        for dtype in a.dtypes.split(","):
            weights, peak = measure(a.folder / name, a.folder / "small student", dtype)
            worst = max(worst, peak / weights)
            print(f"{kind:12} {dtype:9} weights {weights:6.0f} MiB  peak {peak:6.0f} MiB  ratio {peak / weights:.2f}", flush=True)
    return int(worst > 1.3)


if __name__ == "__main__": sys.exit(main())
