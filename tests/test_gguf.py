"""What llama.cpp's converter (convert_hf_to_gguf.py: NemotronHModel, NemotronNanoV2VLModel) needs of our folders.

The converter itself is no package; the names that it maps come from `gguf`, which it takes them from.
"""

import json

import pytest
from safetensors import safe_open
from tiny_model import tiny_model

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_model(pattern="ME*M").save_pretrained(folder)
    return folder


def test_every_tensor_of_the_language_model_has_a_name_in_gguf(folder):
    config = json.loads((folder / "config.json").read_text())
    # by these it finds its classes, for the text model and for the towers (--mmproj)
    assert config["llm_config"]["architectures"] == ["NemotronHForCausalLM"]
    assert config["vision_config"]["architectures"] == ["RADIOModel"]
    keys = {"hybrid_override_pattern", "num_experts_per_tok", "moe_intermediate_size", "n_routed_experts", "n_group",
            "moe_shared_expert_intermediate_size", "n_shared_experts", "norm_topk_prob", "routed_scaling_factor",
            "head_dim", "mamba_num_heads", "conv_kernel", "ssm_state_size", "n_groups", "vocab_size"}  # fmt: skip
    assert not keys - config["llm_config"].keys()
    pattern = config["llm_config"]["hybrid_override_pattern"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.NEMOTRON_H_MOE, len(pattern))
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = [name for name in file.keys() if name.startswith("language_model.")]
    found = {}
    for name in stored:
        name = name.removeprefix("language_model.")
        if ".mixer.experts." in name:  # it stacks them under this name
            layer, part = name.split(".")[2], name.split(".")[-2]
            name = f"model.layers.{layer}.mlp.experts.{part}.weight"
        name = name.replace("mixer.dt_bias", "mixer.dt.bias")
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        found[name] = names.get_name(name, try_suffixes=(".weight", ".bias"))
    missing = [name for name, mapped in found.items() if mapped is None]
    assert not missing
    # what its graph of this architecture reads: a layer of each kind, embeddings, norm and head
    expected = {"token_embd.weight", "output_norm.weight", "output.weight"}
    own = {"M": ("ssm_in.weight", "ssm_conv1d.weight", "ssm_conv1d.bias", "ssm_dt.bias", "ssm_a", "ssm_d",
                 "ssm_norm.weight", "ssm_out.weight"),
           "*": ("attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight"),
           "E": ("ffn_gate_inp.weight", "exp_probs_b.bias", "ffn_up_exps.weight", "ffn_down_exps.weight",
                 "ffn_up_shexp.weight", "ffn_down_shexp.weight")}  # fmt: skip
    for layer, kind in enumerate(pattern):
        expected |= {f"blk.{layer}.{name}" for name in ("attn_norm.weight", *own[kind])}
    assert set(found.values()) == expected


def test_every_tensor_of_the_towers_has_a_name_in_gguf(folder):
    """Of sound too where gguf knows this encoder: 0.19 does not."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 32)
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = [name for name in file.keys() if not name.startswith("language_model.")]
    starts = ("vision_model.radio_model.model.", "mlp1.", "sound_encoder.", "sound_projection.")
    hears = hasattr(gguf.VisionProjectorType, "PARAKEET")
    found = 0
    for name in stored:
        if "input_conditioner" in name or "video_embedder" in name or "num_batches" in name:
            continue  # it leaves these out: normalisation is llama.cpp's, video is not there yet
        assert name.startswith(starts), name
        if hears or not name.startswith("sound_"):
            name += ".weight" if name.endswith("pos_embed") else ""
            assert names.get_name(name, try_suffixes=(".weight", ".bias")), name
            found += 1
    assert found >= 30
