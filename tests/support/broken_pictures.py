"""Files that are not readable images."""

import random

from PIL import Image


def broken_files(folder):
    """Write twenty unreadable files, and return their names."""
    intact = folder / "intact.png"
    Image.effect_noise((60, 60), 90).save(intact)
    png = intact.read_bytes()
    Image.effect_noise((60, 60), 90).convert("RGB").save(intact.with_suffix(".jpg"))
    jpg = intact.with_suffix(".jpg").read_bytes()
    Image.effect_noise((60, 60), 90).save(intact.with_suffix(".gif"))
    gif = intact.with_suffix(".gif").read_bytes()
    Image.effect_noise((60, 60), 90).save(intact.with_suffix(".tif"))
    tif = intact.with_suffix(".tif").read_bytes()
    noise = random.Random(0).randbytes
    contents = {
        "empty.png": b"", "text.png": b"this is not an image\n", "noise.jpg": noise(2_000),
        "half.png": png[: len(png) // 2], "head.png": png[:30], "signature.png": png[:8],
        "no-end.png": png[:-40], "changed.png": png[:60] + noise(200) + png[260:],
        "bad-header.png": png[:16] + b"\xff" * 8 + png[24:], "half.jpg": jpg[: len(jpg) // 2],
        "head.jpg": jpg[:20], "soi.jpg": jpg[:2], "garbage.jpg": jpg[:3] + noise(500),
        "half.gif": gif[: len(gif) // 2], "head.gif": gif[:13], "half.tif": tif[: len(tif) // 2],
        "head.tif": tif[:8],
        "svg.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "page.bmp": b"BM" + noise(60),
    }  # fmt: skip
    for path in folder.iterdir():
        path.unlink()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    Image.new("RGB", (50, 50), "white").save(folder / "blank.png")
    return sorted([*contents, "blank.png"])
