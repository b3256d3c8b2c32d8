"""Videos of episodes: enlarged frames with a caption."""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 256  # smallest side of a frame in the video, pixels
BAR = 40  # height of the caption below it, pixels
MAX_FPS = 20  # robots run at up to 80, too fast to follow


def annotate(frame: np.ndarray, lines: Items[str], good: bool | None = None) -> np.ndarray:
    """Enlarges a frame and adds text below it: uint8 [Y X 3] of even height and width.

    Args:
        frame: uint8 [Y X 3].
        lines: up to two lines; longer text is truncated.
        good: True renders the last line in green, False in red.
    """
    height, width = frame.shape[:2]
    factor = max(1, -(-SIDE // min(height, width)))
    width, height = (width * factor + 1) // 2 * 2, (height * factor + 1) // 2 * 2
    canvas = Image.new("RGB", (width, height + BAR), (16, 16, 16))
    canvas.paste(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    colours = [(240, 240, 240)] * len(lines)
    if lines and good is not None:
        colours[-1] = (90, 220, 110) if good else (250, 110, 100)
    for i, (line, colour) in enumerate(zip(lines, colours, strict=True)):
        pen.text((6, height + 3 + 18 * i), _fitted(line, width - 12, font), fill=colour, font=font)
    return np.asarray(canvas)


def _fitted(line: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"


def write(out: Path, frames: Items[np.ndarray], fps: int = MAX_FPS) -> Path:
    """Writes an mp4 (H.264, playable in browsers) and returns its path.

    Args:
        out: file to write, ending in .mp4; missing folders are created.
        frames: uint8 [Y X 3] of one even size, at least one.
        fps: frames per second, at most `MAX_FPS`.
    Raises:
        ValueError: there are no frames, or the name does not end in .mp4.
    """
    if out.suffix != ".mp4" or not frames:
        raise ValueError(
            f"video is {out} with {len(frames)} frames, expected name.mp4 and at least one frame"
        )
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ImportError('videos need the extra: pip install "mmdlm[sim]"') from error
    out.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames[0].shape[:2]
    writer = imageio_ffmpeg.write_frames(
        str(out), (width, height), fps=min(fps, MAX_FPS), macro_block_size=1, quality=7
    )
    writer.send(None)
    for frame in (*frames, *[frames[-1]] * 10):  # show the last frame for half a second
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    return out
