"""Averaged weights in half precision: `python export.py --vae V --teacher T --out ship`"""
import torch
from safetensors.torch import save_file

from look import parser


def half(weights: dict) -> dict:
    "Contiguous float16 copies"
    return {k: v.half().contiguous() for k, v in weights.items()}


def main() -> None:
    "Write `vae.safetensors` and `teacher.safetensors` and say their sizes"
    a = parser(__doc__).parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    state = torch.load(a.teacher)
    for name, weights in (("vae", torch.load(a.vae)), ("teacher", state["ema"])):
        path = a.out / f"{name}.safetensors"
        save_file(half(weights), path, metadata={"step": str(state["step"])})
        print(path, round(path.stat().st_size / 1e6, 2), "MB")


if __name__ == "__main__":
    main()
