"""Videos of a run: images as people see them, an episode on film, and files."""

import imageio.v2 as imageio


def visible(video, stack):
    """Images (T, H, W, C) -> what a person sees of them (T, H, W, 3): the last of `stack`, gray or in colour."""
    last = video[..., -(video.shape[-1] // stack) :]
    return last.repeat(3, -1) if last.shape[-1] == 1 else last[..., :3]


def film(envs, act, longest=2000):
    """Pictures of an episode of the first of `envs`, or of its first `longest` steps.

    Args:
      act: function (observations, memory) -> actions, memory.
    Raises UserError if the environment cannot be filmed.
    """
    frames, obs, memory = [], envs.reset(), None
    while not obs["is_last"][0] and len(frames) < longest:
        frames.append(envs.render(0))
        actions, memory = act(obs, memory)
        obs = envs.step(actions)
    return frames


def write_gif(path, frames, fps):
    """Write frames (T, H, W, 3) as a GIF without end, and make the folder for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.mimwrite(path, list(frames), duration=1000 / fps, loop=0)


def write_mp4(path, frames, fps):
    """Write a list of frames (H, W, 3), and make the folder for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.mimwrite(path, frames, fps=fps, macro_block_size=2)
