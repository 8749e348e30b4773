"""Configuration of Nemotron 3 Nano Omni: a language model, a vision tower and an audio tower (paper section 2).

The attribute names are the keys of the released `config.json` (`llm_config`, `vision_config`, `sound_config`,
`img_context_token_id`, ...), so what is loaded is what is saved. The names that transformers uses elsewhere
(`text_config`, `audio_config`, `image_token_id`, ...) read and write the same values, and configs saved by
transformers' native `nemotron_h_omni` class load too.
"""

import math
from pathlib import Path

from transformers import PreTrainedConfig

# The released string; transformers' native class registers another one ("nemotron_h_omni").
MODEL_TYPE = "NemotronH_Nano_Omni_Reasoning_V3"

# One letter per layer of `hybrid_override_pattern` -> transformers' name of that layer type (also used by its caches).
LAYER_TYPES = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
_LAYER_LETTERS = {name: letter for letter, name in LAYER_TYPES.items()} | {"mamba": "M", "attention": "*"}

# hidden size, layers, heads of the timm models that a released RADIO config names in `args.model`
_VIT_SIZES = {
    "vit_base_patch16_224": (768, 12, 12),
    "vit_large_patch16_224": (1024, 24, 16),
    "vit_huge_patch16_224": (1280, 32, 16),
}


TYPE_TEXT, TYPE_IMAGE, TYPE_VIDEO, TYPE_AUDIO = range(4)  # values of mm_token_type_ids


def resolve_checkpoint(name):
    """The folder of the shipped checkpoint for the name "nano"; any other name or path unchanged."""
    return str(Path(__file__).parent / "nano") if name == "nano" else name


class OmniTextConfig(PreTrainedConfig):
    """The hybrid Mamba-2 + MoE + attention language model (`llm_config`; released values are the defaults).

    Args:
        hybrid_override_pattern (`str`): one letter per layer: `M` Mamba-2, `E` mixture of experts, `*` attention,
            `-` plain MLP. `layers_block_type` / `layer_types` lists are accepted instead.
        time_step_limit (`tuple[float, float]`): clamp of Mamba's dt after softplus. Followed as stored; the native
            class clamps at `time_step_min` instead while it prefills.
        chunk_size (`int`): chunk of the Mamba-2 scan that the checkpoint was made with. Not read: it changes no result,
            and which one is fastest is the machine's business.
        moe_latent_size (`int`, *optional*): experts work in a projection of this size (LatentMoE of Nemotron 3 Super
            and Ultra); `None` for Nano.
        num_nextn_predict_layers (`int`): heads of multi-token prediction (modeling_mtp.py); Super and Ultra have 1,
            Nano and Nano Omni none.
        mtp_hybrid_override_pattern (`str`): the layers of such a head, letters as above without `M`;
            `mtp_layers_block_type`, a list, is accepted instead.
        mamba_ssm_cache_dtype (`str`): dtype of the recurrent state kept between steps (paper 4.7: float32).
        kv_cache_dtype (`str`): keys and values are cached in FP8 (paper 4.7): `"auto"`, where the checkpoint has scales
            for it; `"fp8"`, always, with scale 1 where it has none; `"model"`, never. Read when needed, never saved.
        kernels (`str`): `"auto"`, `"torch"` or `"cuda"`: whether tensors on a GPU go through the kernels of other
            packages (see `ssd.cuda_kernels`). A choice of the machine: it is read when it matters and never saved.
    """

    model_type = "nemotron_h"
    base_config_key = "llm_config"
    attribute_map = {"norm_eps": "layer_norm_epsilon", "num_local_experts": "n_routed_experts"}
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 131072
    hidden_size: int = 2688
    hybrid_override_pattern: str = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
    num_hidden_layers: int | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 11
    max_position_embeddings: int = 262144
    # attention
    num_attention_heads: int = 32
    num_key_value_heads: int = 2
    head_dim: int = 128
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    # mlp ("-" layers)
    intermediate_size: int = 1856
    mlp_hidden_act: str = "relu2"
    mlp_bias: bool = False
    # Mamba-2
    mamba_num_heads: int = 64
    mamba_head_dim: int = 64
    n_groups: int = 8
    ssm_state_size: int = 128
    conv_kernel: int = 4
    chunk_size: int = 128
    use_conv_bias: bool = True
    mamba_proj_bias: bool = False
    use_bias: bool = False
    mamba_hidden_act: str = "silu"
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: list[float] | tuple[float, ...] = (0.0, 1e30)
    mamba_ssm_cache_dtype: str = "float32"
    # mixture of experts
    n_routed_experts: int = 128
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 1856
    n_shared_experts: int = 1
    moe_shared_expert_intermediate_size: int = 3712
    moe_latent_size: int | None = None
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int = 2.5
    n_group: int = 1
    topk_group: int = 1
    router_aux_loss_coef: float = 0.0
    # multi-token prediction
    num_nextn_predict_layers: int = 0
    mtp_hybrid_override_pattern: str = "*E"
    # norms and start
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = False
    rescale_prenorm_residual: bool = True
    initializer_range: float = 0.02
    kv_cache_dtype: str = "auto"
    kernels: str = "auto"

    def __post_init__(self, **kwargs):
        names = kwargs.pop("layers_block_type", None) or kwargs.pop("layer_types", None)
        kwargs.pop("layer_types", None)
        if names is not None:
            unknown = sorted(set(names) - set(_LAYER_LETTERS))
            if unknown:
                raise ValueError(
                    f"layers_block_type has unknown layer types {unknown}; known: {sorted(_LAYER_LETTERS)}"
                )
            self.hybrid_override_pattern = "".join(_LAYER_LETTERS[name] for name in names)
        unknown = sorted(set(self.hybrid_override_pattern) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"hybrid_override_pattern has unknown letters {unknown}; known: {sorted(LAYER_TYPES)}")
        names = kwargs.pop("mtp_layers_block_type", None)
        if names is not None:
            self.mtp_hybrid_override_pattern = "".join(_LAYER_LETTERS.get(name, "?") for name in names)
        if self.num_nextn_predict_layers and not set(self.mtp_hybrid_override_pattern) <= set("*E-"):
            raise ValueError(
                f"mtp_hybrid_override_pattern or mtp_layers_block_type: {names or self.mtp_hybrid_override_pattern}; a "
                "head of multi-token prediction may have the layers *, E and - (attention, moe, mlp)"
            )
        if self.num_hidden_layers not in (None, len(self.hybrid_override_pattern)):
            raise ValueError(
                f"num_hidden_layers is {self.num_hidden_layers} but hybrid_override_pattern has "
                f"{len(self.hybrid_override_pattern)} letters"
            )
        self.num_hidden_layers = len(self.hybrid_override_pattern)
        if self.kv_cache_dtype not in ("auto", "fp8", "model"):
            raise ValueError(f"kv_cache_dtype must be 'auto', 'fp8' or 'model', got {self.kv_cache_dtype!r}")
        super().__post_init__(**kwargs)

    def to_dict(self):
        output = super().to_dict() | {"norm_eps": self.layer_norm_epsilon}  # the released config holds both names
        output.pop("kernels", None), output.pop("kv_cache_dtype", None)
        if not self.num_nextn_predict_layers:  # as released: checkpoints without such heads do not name them
            output.pop("num_nextn_predict_layers", None), output.pop("mtp_hybrid_override_pattern", None)
        if output.get("architectures") == ["OmniForCausalLM"]:
            output["architectures"] = ["NemotronHForCausalLM"]  # the released name, for vLLM and NVIDIA's tools
        return output

    # read by the model's parts, which find the language model alone here (modeling_text.py)
    vision_config = sound_config = None

    @property
    def llm_config(self) -> "OmniTextConfig":
        return self

    @property
    def layer_types(self) -> list[str]:
        """transformers' name of each layer, read by its caches."""
        return [LAYER_TYPES[letter] for letter in self.hybrid_override_pattern]

    @property
    def num_experts(self) -> int:
        """Number of routed experts, under the name TRL and transformers' losses read."""
        return self.n_routed_experts

    @property
    def mamba_intermediate_size(self) -> int:
        """Width of Mamba's x and gate: heads x head size (`expand` of the released config is not used)."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_conv_size(self) -> int:
        """Channels of Mamba's causal convolution: x, B and C side by side."""
        return self.mamba_intermediate_size + 2 * self.n_groups * self.ssm_state_size


class OmniVisionConfig(PreTrainedConfig):
    """The C-RADIO vision transformer (`vision_config`).

    A released config gives no sizes but the name of a timm model and RADIO's training arguments (`args`); the sizes
    are read from those when they are not given outright.

    Args:
        num_prefix_tokens (`int`): learned class and register tokens in front of the patches (10 as released).
        max_resolution (`int`): pixels that the square position table spans; its side is `max_resolution / patch_size`.
        video_temporal_patch_size (`int`): frames fused into one tubelet by the video embedder (paper 4.6, T = 2).
        min_num_patches, max_num_patches (`int`): bounds of patches per image (paper section 2: 1,024 to 13,312).
        video_target_num_patches (`int`): patches per video frame that the frame size aims at.
    """

    model_type = "radio"
    base_config_key = "vision_config"

    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    num_prefix_tokens: int | None = None
    patch_size: int = 16
    num_channels: int = 3
    max_resolution: int = 2048
    layer_norm_eps: float = 1e-6
    video_temporal_patch_size: int = 2
    separate_video_embedder: bool = True
    min_num_patches: int = 1024
    max_num_patches: int = 13312
    video_target_num_patches: int = 1024
    video_maintain_aspect_ratio: bool = True
    norm_mean: list[float] | tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    norm_std: list[float] | tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    initializer_range: float = 0.02
    args: dict | None = None

    def __post_init__(self, **kwargs):
        kwargs.pop("patch_dim", None)  # native configs store what is derived here
        args = self.args or {}
        name = args.get("model", "vit_huge_patch16_224")
        if self.hidden_size is None:
            if name not in _VIT_SIZES:
                raise ValueError(
                    f"vision_config.args.model is {name!r}; known: {sorted(_VIT_SIZES)}, or give hidden_size"
                )
            self.hidden_size, self.num_hidden_layers, self.num_attention_heads = _VIT_SIZES[name]
        if self.intermediate_size is None:
            self.intermediate_size = int(self.hidden_size * kwargs.pop("mlp_ratio", 4))
        if self.num_prefix_tokens is None:
            if "num_cls_tokens" in kwargs or "num_registers" in kwargs:  # native names
                self.num_prefix_tokens = kwargs.pop("num_cls_tokens", 3) + kwargs.pop("num_registers", 7)
            else:
                # one class token per teacher, then registers up to the next multiple
                num_cls = len({teacher["name"] for teacher in args.get("teachers", [])}) or 1
                multiple = args.get("register_multiple", 10)
                self.num_prefix_tokens = (num_cls // multiple + 1) * multiple
        self.max_resolution = kwargs.pop("max_img_size", args.get("cpe_max_size", self.max_resolution))
        self.norm_mean, self.norm_std = list(self.norm_mean), list(self.norm_std)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"vision hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads"
            )
        super().__post_init__(**kwargs)

    @property
    def position_grid(self) -> int:
        """Side of the square position-embedding table, in patches (128 as released)."""
        return self.max_resolution // self.patch_size

    @property
    def patch_dim(self) -> int:
        """Values in one flattened image patch (channel, y, x)."""
        return self.num_channels * self.patch_size**2


class OmniAudioConfig(PreTrainedConfig):
    """The Parakeet FastConformer encoder and its projector (`sound_config`; released values are the defaults).

    The tower has no dropout, no LayerDrop and no input scaling: the checkpoint was trained without, and randomness in
    a frozen or shared tower makes ranks and policies disagree.
    """

    model_type = "parakeet"
    base_config_key = "sound_config"

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    intermediate_size: int = 4096
    conv_kernel_size: int = 9
    convolution_bias: bool = False
    attention_bias: bool = False
    scale_input: bool = False
    subsampling_factor: int = 8
    subsampling_conv_channels: int = 256
    subsampling_conv_kernel_size: int = 3
    subsampling_conv_stride: int = 2
    num_mel_bins: int = 128
    sampling_rate: int = 16000
    projection_hidden_size: int = 4096
    projection_bias: bool = False
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.scale_input:
            raise ValueError("sound_config.scale_input is true; this family's encoder is trained without it")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"sound hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads"
            )
        if 2 ** round(math.log2(self.subsampling_factor)) != self.subsampling_factor:
            raise ValueError(f"sound_config.subsampling_factor must be a power of two, got {self.subsampling_factor}")
        super().__post_init__(**kwargs)


class OmniConfig(PreTrainedConfig):
    """Nemotron 3 Nano Omni (defaults are the released 30B-A3B values).

    Args:
        llm_config, vision_config, sound_config (`dict` or config): the three parts.
        downsample_ratio (`float`): pixel shuffle, 0.5 = four patches into one token.
        projector_hidden_size (`int`): width inside the vision projector.
        video_pruning_rate (`float`): EVS rate the checkpoint was made with. Reported, never applied by itself: pass
            `video_pruning_rate` to the processor (paper 4.6: a run-time choice).
        audio_in_video (`str`): `"after"`, the sound of a video follows all its frames (public serving code), or
            `"interleave"`, sound and tubelets in order of time (paper section 2).
    """

    model_type = MODEL_TYPE
    sub_configs_defaults = {
        "llm_config": OmniTextConfig,
        "vision_config": OmniVisionConfig,
        "sound_config": OmniAudioConfig,
    }
    attribute_map = {
        "text_config": "llm_config",
        "audio_config": "sound_config",
        "image_token_id": "img_context_token_id",
        "video_token_id": "video_context_token_id",
        "audio_token_id": "sound_context_token_id",
        "vision_hidden_size": "vit_hidden_size",
    }

    llm_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    sound_config: dict | PreTrainedConfig | None = None
    max_sequence_length: int = 131072
    force_image_size: int | None = 512
    patch_size: int = 16
    downsample_ratio: float = 0.5
    ps_version: str = "v2"
    vit_hidden_size: int | None = None
    projector_hidden_size: int = 20480
    norm_mean: list[float] | tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    norm_std: list[float] | tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    video_pruning_rate: float = 0.0
    video_temporal_patch_size: int = 2
    audio_in_video: str = "after"
    eos_token_id: int | list[int] | None = 11
    tie_word_embeddings: bool = False
    img_context_token: str = "<image>"
    img_context_token_id: int = 18
    video_context_token: str = "<video>"
    video_context_token_id: int | None = 131081
    img_start_token: str = "<img>"
    img_end_token: str = "</img>"
    img_start_token_id: int = 19
    img_end_token_id: int = 20
    sound_context_token: str = "<so_embedding>"
    sound_context_token_id: int = 27

    def __post_init__(self, **kwargs):
        kwargs.pop("model_type", None)  # the native class's string must not hide ours
        # names of the native class; `setattr` through attribute_map comes too late for the sub-configs
        for name, released in self.attribute_map.items():
            if name in kwargs:
                setattr(self, released, kwargs.pop(name))
        if isinstance(self.vision_config, dict):
            self.vision_config = {"video_temporal_patch_size": self.video_temporal_patch_size} | self.vision_config
        super().__post_init__(**kwargs)
        if self.tie_word_embeddings or self.llm_config.tie_word_embeddings:
            raise ValueError("tie_word_embeddings is true; this family has a head of its own")
        if self.ps_version != "v2":
            raise ValueError(f"ps_version {self.ps_version!r} is not supported, only 'v2' (pixel shuffle in row order)")
        if self.audio_in_video not in ("after", "interleave"):
            raise ValueError(f"audio_in_video must be 'after' or 'interleave', got {self.audio_in_video!r}")
        if not 0 <= self.video_pruning_rate < 1:
            raise ValueError(f"video_pruning_rate must be in [0, 1), got {self.video_pruning_rate}")
        if self.vision_config.video_temporal_patch_size != self.video_temporal_patch_size:
            raise ValueError(
                f"video_temporal_patch_size is {self.video_temporal_patch_size} but vision_config says "
                f"{self.vision_config.video_temporal_patch_size}"
            )
        self.vit_hidden_size = self.vision_config.hidden_size

    def get_text_config(self, decoder=None, encoder=None) -> OmniTextConfig:
        """The language model's config, whichever end of the model is asked for."""
        return self.llm_config

    @property
    def merge_size(self) -> int:
        """Patches per side that pixel shuffle folds into one token (2 as released)."""
        return round(1 / self.downsample_ratio)

    def to_dict(self):
        output = super().to_dict()
        # The released string, so that vLLM and NVIDIA's tools take a fine-tune as they take the original.
        output["architectures"] = [MODEL_TYPE]
        # likewise those of the parts, by which llama.cpp's converter finds them
        for part, name in (("llm_config", "NemotronHForCausalLM"), ("vision_config", "RADIOModel")):
            if isinstance(output.get(part), dict):
                output[part]["architectures"] = [name]
        return output


__all__ = ["OmniConfig", "OmniTextConfig", "OmniVisionConfig", "OmniAudioConfig"]
