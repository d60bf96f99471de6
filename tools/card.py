"The picture that other sites show beside a link to this one, nbs/images/card.png: `python tools/card.py` (needs Chromium and Playwright)"
import base64
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "nbs/images"
PAGE = """<body style="margin:0;width:1200px;height:630px;background:#10243d;color:#fff;font-family:system-ui,'Noto Sans',sans-serif">
<div style="padding:64px 72px"><div style="font-size:76px;font-weight:700">t2v_turbo</div>
<div style="font-size:34px;line-height:1.35;margin-top:14px;max-width:1010px">Distil a text-to-video diffusion model into a 4-step student, with rewards in the same loss.
Every equation beside its code.</div>
<img src="data:image/gif;base64,%s" style="margin-top:38px;height:240px;max-width:1056px;image-rendering:pixelated;border-radius:8px"></div></body>"""


def main():
    from playwright.sync_api import sync_playwright
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = b.new_page(viewport=dict(width=1200, height=630))
        page.set_content(PAGE % base64.b64encode((IMAGES / "teacher-cd-turbo.gif").read_bytes()).decode())
        page.wait_for_timeout(300)
        page.screenshot(path=IMAGES / "card.png")
        b.close()


if __name__ == "__main__": main()
