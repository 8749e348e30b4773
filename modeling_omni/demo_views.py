"""What the model saw, as HTML: pictures and frames put together again from the patches that the vision tower reads with
their grid, the tokens that EVS kept drawn on the frames, and mel spectrograms (paper sections 2 and 4.6).

Everything is drawn from the model's inputs, not from the files. One token stands for 2 x 2 patches; of a video, in both
frames of its tubelet.

Shapes: t, h, w tubelets and patches of a grid; s frames of a tubelet; p side of a patch; T mel frames; M mel bins.
"""

import base64
import html
import io

import numpy as np
import torch
from PIL import Image, ImageDraw

from .configuration_omni import TYPE_AUDIO, TYPE_IMAGE, TYPE_VIDEO
from .conversation import Medium, media_of
from .feature_extraction_omni import clip_token_count

MAX_FRAMES = 64  # drawn of one video
MIN_SIDE, MAX_SIDE = 256, 768  # longer side of a drawing, in pixels
MAX_MEL = 1600  # columns of a mel picture
KEPT, LINE = (118, 205, 20), (255, 255, 255)
MEL_COLOURS = np.array([(0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191)], np.float32)


def unpatchify(patches: torch.Tensor, grid: tuple[int, int, int], p: int, mean: list, std: list) -> np.ndarray:
    """Normalised patches [t * h * w, s * 3 * p * p] -> uint8 frames [t * s, h * p, w * p, 3], the inverse of
    `write_patches` but for rounding."""
    t, h, w = grid
    s = patches.shape[1] // (3 * p * p)
    pixels = patches.float().view(t, h, w, s, 3, p, p).permute(0, 3, 1, 5, 2, 6, 4).reshape(t * s, h * p, w * p, 3)
    pixels = (pixels * torch.tensor(std) + torch.tensor(mean)) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8).numpy()


def draw_grid(pixels: np.ndarray, places: tuple[int, int], kept: np.ndarray | None = None) -> Image.Image:
    """A picture uint8 [H, W, 3] with the grid of its tokens.

    Args:
        places: tokens (rows, columns).
        kept: bool [rows, columns]; tokens that are not kept are darkened, the others framed.
    """
    height, width = pixels.shape[:2]
    longer = max(height, width)
    scale = max(1, -(-MIN_SIDE // longer)) if longer < MAX_SIDE else MAX_SIDE / longer
    size = round(width * scale), round(height * scale)
    picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    layer = Image.new("RGBA", size)
    draw = ImageDraw.Draw(layer)
    rows, columns = places
    xs, ys = np.linspace(0, size[0], columns + 1).round(), np.linspace(0, size[1], rows + 1).round()
    cells = [(r, c) for r in range(rows) for c in range(columns)]
    for r, c in cells if kept is not None else ():
        if not kept[r, c]:
            draw.rectangle((xs[c], ys[r], xs[c + 1], ys[r + 1]), fill=(12, 16, 24, 205))
    for x in xs[1:-1]:
        draw.line((x, 0, x, size[1]), fill=(*LINE, 70))
    for y in ys[1:-1]:
        draw.line((0, y, size[0], y), fill=(*LINE, 70))
    for r, c in cells if kept is not None and not kept.all() else ():
        if kept[r, c]:
            draw.rectangle((xs[c] + 1, ys[r] + 1, xs[c + 1] - 1, ys[r + 1] - 1), outline=(*KEPT, 255), width=2)
    return Image.alpha_composite(picture.convert("RGBA"), layer).convert("RGB")


def draw_mel(mel_TM: np.ndarray) -> Image.Image:
    """A normalised log-mel spectrogram [T, M], low tones at the bottom."""
    if len(mel_TM) > MAX_MEL:  # means of neighbours, as many as fit
        edges = np.linspace(0, len(mel_TM), MAX_MEL + 1).astype(int)
        mel_TM = np.add.reduceat(mel_TM, edges[:-1], axis=0) / np.diff(edges)[:, None]
    low, high = np.percentile(mel_TM, (2, 99.5))
    level = np.clip((mel_TM.T[::-1] - low) / max(high - low, 1e-6), 0, 1) * (len(MEL_COLOURS) - 1)
    first = np.minimum(level.astype(int), len(MEL_COLOURS) - 2)
    share = (level - first)[..., None]
    pixels = MEL_COLOURS[first] * (1 - share) + MEL_COLOURS[first + 1] * share
    picture = Image.fromarray(pixels.astype(np.uint8))
    width = min(MAX_MEL, max(480, 2 * picture.width))
    return picture.resize((width, 2 * picture.height), Image.Resampling.BILINEAR)


def figure(picture: Image.Image, alt: str, caption: str) -> str:
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=88)
    data = base64.b64encode(file.getvalue()).decode()
    caption, alt = html.escape(caption), html.escape(alt, quote=True)
    return f'<figure><img src="data:image/webp;base64,{data}" alt="{alt}"><figcaption>{caption}</figcaption></figure>'


def video_figures(clip, medium: Medium, frames: np.ndarray, places: tuple[int, int], s: int, kept) -> list[str]:
    """Figures of a clip's frames [t * s, H, W, 3], as far as they are real; `kept`: indices of EVS or None."""
    mask = None
    if kept is not None:
        mask = np.zeros(len(frames) // s * places[0] * places[1], bool)
        mask[kept.numpy()] = True
        mask = mask.reshape(-1, *places)
    times = clip.timestamps
    shown = range(len(clip.frames))  # an odd number was filled up with the last one
    if len(shown) > MAX_FRAMES:
        shown = np.linspace(0, len(shown) - 1, MAX_FRAMES).round().astype(int).tolist()
    figures = []
    for i in shown:
        own = None if mask is None else mask[i // s]
        caption = f"frame {i + 1}" + ("" if times is None else f" at {times[i]:.2f} s")
        caption += "" if own is None else f" \u00b7 {int(own.sum())} of {own.size} tokens kept"
        figures.append(figure(draw_grid(frames[i], places, own), caption, caption))
    return figures


def seen_html(processor, messages: list[dict], inputs: dict, kept: dict[bytes, torch.Tensor]) -> str:
    """Every medium of a prompt as a section of figures.

    Args:
        messages: with decoded media (`Turn.messages`). inputs: what `encode` made of them.
        kept: for videos with EVS, which tokens stayed, by `Medium.digest`; where it is missing, that is said.
    """
    image, video, ear = processor.image_processor, processor.video_processor, processor.feature_extractor
    parts = [p for m in messages if isinstance(m["content"], list) for p in m["content"] if p["type"] != "text"]
    queues = {"image": [], "video": [], "sound": []}
    for part in parts:
        queues["sound" if part["type"] == "audio" else part["type"]].append(part)
        if part["type"] == "video" and part["video"].audio is not None:
            queues["sound"].append(part)
    named = {name: iter(items) for name, items in queues.items()}
    sections = []
    for medium in media_of(inputs, image.merge_size):
        if medium.kind == TYPE_AUDIO:
            part = next(named["sound"])
            mel, mask = medium.values["input_features"], medium.values["input_features_mask"]
            frames = mel[mask]  # clips one after the other
            seconds = len(frames) * ear.hop_length / ear.sampling_rate
            tokens = clip_token_count(mask.sum(-1)).tolist()
            title = part["name"] if part["type"] == "audio" else f"sound of {part['name']}"
            clips = f" in {len(tokens)} clips" if len(tokens) > 1 else ""
            about = (
                f"{seconds:.2f} s{clips}, {frames.shape[1]} mel bins, {len(frames):,} frames: {sum(tokens):,} tokens"
            )
            caption = f"0 to {seconds:.2f} s from left to right, low tones at the bottom"
            figures = [figure(draw_mel(frames.numpy()), f"mel spectrogram of {title}", caption)]
            sections.append(section(title, about, figures, wide=True))
            continue
        front, name = (image, "image") if medium.kind == TYPE_IMAGE else (video, "video")
        patches, grid = medium.values.values()
        t, h, w = grid[0].tolist()
        places = h // image.merge_size, w // image.merge_size
        frames = unpatchify(patches, (t, h, w), front.patch_size, front.norm_mean, front.norm_std)
        part = next(named[name])
        if medium.kind == TYPE_VIDEO:
            clip, s = part["video"], video.video_temporal_patch_size
            height, width = clip.frames.shape[1:3]
            own = kept.get(medium.digest)
            size = f"{w * front.patch_size} x {h * front.patch_size}"
            about = f"{len(clip.frames)} frames of {width} x {height} pixels, read at {size}: {t} pairs of "
            about += f"frames with {places[1]} x {places[0]} tokens each"
            if medium.keep is not None:
                about += f"; EVS keeps {medium.keep:,} of {t * places[0] * places[1]:,}"
                about += "" if own is not None else " (which ones is not known any more)"
            about += f": {medium.tokens:,} tokens"
            if len(clip.frames) > MAX_FRAMES:
                about += f"; {MAX_FRAMES} of the frames are shown"
            figures = video_figures(clip, medium, frames, places, s, own)
        else:
            height, width = part["image"].shape[:2]
            about = f"{width} x {height} pixels, read at {w * front.patch_size} x {h * front.patch_size}: {w} x {h} "
            about += f"patches, {places[1]} x {places[0]} = {medium.tokens:,} tokens"
            caption = f"{places[1]} x {places[0]} tokens"
            figures = [figure(draw_grid(frames[0], places), f"{part['name']} as the model reads it", caption)]
        sections.append(section(part["name"], about, figures))
    return "".join(sections)


def section(title: str, about: str, figures: list[str], wide: bool = False) -> str:
    name = "seen-wide" if wide else "seen-grid"
    head = f"<h3>{html.escape(title)}</h3><p>{html.escape(about)}</p>"
    return f'<section class="seen">{head}<div class="{name}">{"".join(figures)}</div></section>'


__all__ = ["draw_grid", "draw_mel", "seen_html", "unpatchify"]
