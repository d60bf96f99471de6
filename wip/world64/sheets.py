"""Clips as PNG sheets: one row a clip, one column a frame, captions above"""
import torch
from PIL import Image, ImageDraw
from torch import Tensor


def sheet(clips: Tensor, titles: list[str], path: str, scale: int = 2, columns: int = 1) -> None:
    "Write clips `(b 3 t h w)` in [0,1] as rows, in one or more columns"
    b, _, t, h, w = clips.shape
    cell = (w * t * scale + 8, h * scale + 14)
    rows = -(-b // columns)
    page = Image.new("RGB", (cell[0] * columns, cell[1] * rows), "white")
    draw = ImageDraw.Draw(page)
    for i, (clip, title) in enumerate(zip(clips, titles)):
        left, top = cell[0] * (i // rows), cell[1] * (i % rows)
        strip = clip.permute(2, 1, 3, 0).reshape(h, t * w, 3)
        pixels = (strip.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        picture = Image.fromarray(pixels).resize((w * t * scale, h * scale), Image.NEAREST)
        draw.text((left + 2, top + 1), title, fill="black")
        page.paste(picture, (left, top + 13))
    page.save(path)
