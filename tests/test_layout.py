"""The released checkpoint layout, at full size on the meta device and for real at a small one."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers.core_model_loading import revert_weight_conversion

from modeling_omni.configuration_omni import OmniConfig
from modeling_omni.modeling_omni import OmniForConditionalGeneration

DATA = Path(__file__).parent / "data"
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}


def released_tensors() -> dict[str, tuple[list[int], torch.dtype]]:
    """Name -> (shape, dtype) of all tensors of the released checkpoint, unfolded from the table of patterns."""
    pattern = json.loads((DATA / "released_config.json").read_text())["llm_config"]["hybrid_override_pattern"]
    tensors = {}
    for line in (DATA / "released_weights.tsv").read_text().splitlines():
        if line.startswith("#") or line.startswith("stored_name_pattern"):
            continue
        name, shape, dtype, count = line.split("\t")
        places = {"{M}": "M", "{E}": "E", "{A}": "*"}
        names = [name]
        for key, letter in places.items():
            layers = [i for i, kind in enumerate(pattern) if kind == letter]
            names = [n.replace(key, str(i)) for n in names for i in (layers if key in n else [0])]
        names = [n.replace("{e}", str(e)) for n in names for e in (range(128) if "{e}" in n else [0])]
        depth = 52 if name.startswith("language") else 32 if name.startswith("vision") else 24
        names = [n.replace("{i}", str(i)) for n in names for i in (range(depth) if "{i}" in n else [0])]
        lists = [[n] for n in names]
        if choice := re.search(r"\{(\d[\d,]*)\}", name):
            lists = [[n.replace(choice.group(0), number) for number in choice.group(1).split(",")] for n in names]
        unfolded = [n for group in lists for n in group]
        assert len(unfolded) == int(count), name
        for n in unfolded:
            tensors[n] = (json.loads(shape), DTYPES[dtype])
    return tensors


def released_config() -> dict:
    return json.loads((DATA / "released_config.json").read_text())


@pytest.fixture(scope="module")
def full_model():
    with torch.device("meta"):
        model = OmniForConditionalGeneration._from_config(OmniConfig(**released_config()), dtype=torch.bfloat16)
    return model


def test_full_size_saves_the_released_names_shapes_and_dtypes(full_model):
    saved = revert_weight_conversion(full_model, full_model.state_dict())
    expected = released_tensors()
    assert len(expected) == 7349
    assert sorted(saved) == sorted(expected)
    wrong = {n: t for n, t in saved.items() if (list(t.shape), t.dtype) != expected[n]}
    assert not wrong, dict(list(wrong.items())[:5])
    assert sum(t.numel() for t in saved.values()) == 33_015_632_238
    assert sum(t.numel() * t.element_size() for t in saved.values()) == 66_031_270_520


def test_full_size_parameter_counts(full_model):
    counts = {}
    for name, tensor in revert_weight_conversion(full_model, full_model.state_dict()).items():
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + tensor.numel()
    assert counts == {
        "language_model": 31_577_940_288,
        "vision_model": 653_611_526,
        "mlp1": 159_912_960,
        "sound_encoder": 608_962_088,
        "sound_projection": 15_205_376,
    }
    assert sum(p.numel() for p in full_model.parameters()) == 33_015_546_816


def test_released_config_survives_a_round_trip(tmp_path):
    released = released_config()
    (tmp_path / "config.json").write_text(json.dumps(released))
    config = OmniConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    for key, value in released.items():
        if key == "torch_dtype":
            assert saved["dtype"] == value
        elif isinstance(value, dict) and key != "auto_map":
            for inner, expected in value.items():
                if inner not in ("torch_dtype", "architectures"):
                    assert saved[key][inner] == expected, (key, inner)
        else:
            assert saved[key] == value, key
    assert config.text_config is config.llm_config and config.image_token_id == 18
    assert config.vision_config.hidden_size == 1280 and config.vision_config.num_prefix_tokens == 10
