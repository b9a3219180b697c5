"""Videos: convert observed images to frames, arrange predictions in a grid, write files."""

import imageio.v2 as imageio
import numpy as np


def visible(video, stack):
    """Return frames (T, H, W, 3) of images (T, H, W, C): the newest of `stack` images, in gray or color."""
    last = video[..., -(video.shape[-1] // stack) :]
    return last.repeat(3, -1) if last.shape[-1] == 1 else last[..., :3]


def grid(panels):
    """Arrange panels (truth, model, error), each (B, T, H, W, C), in rows and sequences in columns.

    Returns: (T, 3 H, B W, C)
    """
    video = np.concatenate(panels, 2)  # (B, T, 3 H, W, C)
    batch, time, height, width, channels = video.shape
    return video.transpose(1, 2, 0, 3, 4).reshape(time, height, batch * width, channels)


def write_mp4(path, frames, fps):
    """Write a list of frames (H, W, 3) as an MP4; create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.mimwrite(path, frames, fps=fps, macro_block_size=2)
