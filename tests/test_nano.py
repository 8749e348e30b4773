"""The shipped nano checkpoint: its files, and its skills on a sample of held-out data."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from modeling_omni import OmniForConditionalGeneration, OmniProcessor
from modeling_omni.evaluation import heldout_accuracy, taken_away
from modeling_omni.media import VideoClip

NANO = Path(__file__).parents[1] / "modeling_omni" / "nano"


def test_files():
    weights = NANO / "model.safetensors"
    assert weights.stat().st_size < 32e6
    with safe_open(weights, "pt") as file:
        names = list(file.keys())
        assert "language_model.backbone.layers.2.mixer.experts.7.up_proj.weight" in names  # released layout
        assert file.get_tensor("language_model.lm_head.weight").dtype == torch.bfloat16
    assert not [path for path in NANO.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".py")]


@pytest.fixture(scope="module")
def nano():
    model = OmniForConditionalGeneration.from_pretrained("nano", dtype=torch.float32).eval()
    return model, OmniProcessor.from_pretrained("nano")


# least accuracy on 30 held-out samples; about three standard errors below the README's table
FLOORS = {
    "text_copy": 0.9,
    "text_math": 0.9,
    "text_where": 0.9,
    "text_speech": 0.9,
    "text_recall": 0.75,
    "image_colour": 0.9,
    "image_shape": 0.85,
    "image_where": 0.8,
    "image_word": 0.4,
    "image_digits": 0.7,
    "image_handwritten": 0.55,
    "image_recall": 0.7,
    "video_direction": 0.9,
    "video_mover": 0.85,
    "video_describe_motion": 0.8,
}


@pytest.mark.parametrize("skill", FLOORS)
def test_heldout_skill(nano, skill):
    assert heldout_accuracy(*nano, [skill], 30)[skill] >= FLOORS[skill]


def test_an_answer_about_a_picture_needs_the_picture(nano):
    assert heldout_accuracy(*nano, ["image_colour"], 30, without="picture")["image_colour"] <= 0.6
    sound = np.zeros(160, np.float32)
    clip = VideoClip(np.zeros((2, 4, 4, 3), np.uint8), [0, 1], 2.0, 1.0, sound)
    silent = VideoClip(clip.frames, [0, 1], 2.0, 1.0)
    content = [{"type": kind, kind: value} for kind, value in (("video", clip), ("image", "p"), ("audio", "a"))]
    content += [{"type": "video", "video": silent}, {"type": "text", "text": "?"}]
    heard, seen = taken_away(content, "picture"), taken_away(content, "sound")
    assert [part["type"] for part in heard] == ["audio", "audio", "text"] and heard[0]["audio"] == (sound, 16000)
    assert [part["type"] for part in seen] == ["video", "image", "video", "text"]
    assert all(part["video"].audio is None for part in (seen[0], seen[2])) and clip.audio is sound
    assert taken_away("only text", "sound") == "only text"
