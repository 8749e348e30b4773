"""What the benchmark compares with: transformers' native classes on the same weights, and llama.cpp on the same file.

MID is a hybrid of 228 million parameters that has every kind of layer of the 30B in its proportions; weights are random
(an even router: the worst case for reuse of experts, the same for all). Text models share one set of tensors: the
native class makes them, ours takes them over without a copy. llama.cpp reads them from a GGUF file, where the packages
`xllamacpp` and `gguf` are installed.
"""

import re
import time
from pathlib import Path

import numpy as np
import torch
from transformers import CompileConfig, DynamicCache, NemotronHConfig, NemotronHForCausalLM, StaticCache
from transformers.cache_utils import CacheLayerMixin

from .configuration_omni import OmniConfig, OmniTextConfig, resolve_checkpoint
from .modeling_omni import OmniForConditionalGeneration

MID = {
    "vocab_size": 32768,
    "hidden_size": 768,
    "hybrid_override_pattern": "MEMEM*E",
    "mamba_num_heads": 24,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "chunk_size": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 528,
    "moe_shared_expert_intermediate_size": 1056,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "eos_token_id": None,
}
MID_TOWERS = {
    "vision": {"hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 3072},
    "sound": {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048},
}
NATIVE_TEXT = (
    "vocab_size hidden_size mamba_num_heads mamba_head_dim ssm_state_size n_groups chunk_size conv_kernel "
    "n_routed_experts num_experts_per_tok moe_intermediate_size moe_shared_expert_intermediate_size intermediate_size "
    "num_attention_heads num_key_value_heads head_dim routed_scaling_factor norm_topk_prob layer_norm_epsilon "
    "hybrid_override_pattern max_position_embeddings"
).split()


def omni_config(size: str) -> OmniConfig:
    """ "mid", "mid32" (with the 30B's 32 query heads) or "nano"; without end tokens, so that nothing stops early."""
    if size == "nano":
        config = OmniConfig.from_pretrained(resolve_checkpoint("nano"))
        config.eos_token_id = config.llm_config.eos_token_id = None
        return config
    vision = MID_TOWERS["vision"] | {"num_prefix_tokens": 10}
    return OmniConfig(
        llm_config=MID | {"num_attention_heads": 32} if size == "mid32" else MID,
        vision_config=vision,
        sound_config=MID_TOWERS["sound"] | {"projection_hidden_size": 1024},
        projector_hidden_size=2048,
        eos_token_id=None,
    )


def native_text_config(text: OmniTextConfig) -> NemotronHConfig:
    return NemotronHConfig(**{name: getattr(text, name) for name in NATIVE_TEXT}, eos_token_id=None)


def language_pair(size: str, dtype: torch.dtype, device: str):
    """(ours, native) text models with the same random tensors; our towers stay on the meta device, unused."""
    config = omni_config(size)
    torch.manual_seed(0)
    native = NemotronHForCausalLM(native_text_config(config.llm_config)).to(dtype).to(device).eval()
    with torch.device("meta"):
        ours = OmniForConditionalGeneration._from_config(config, dtype=dtype).eval()
    ours.model.language_model.load_state_dict(native.model.state_dict(), assign=True)
    ours.lm_head.load_state_dict(native.lm_head.state_dict(), assign=True)
    for model in (ours, native):
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return ours, native


def native_omni_config(config: OmniConfig):
    """The native class's configuration for the same sizes."""
    from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3_Config

    vision, sound, text = config.vision_config, config.sound_config, config.llm_config
    names = "hidden_size num_hidden_layers num_attention_heads intermediate_size conv_kernel_size num_mel_bins"
    names += (
        " subsampling_conv_channels projection_hidden_size projection_bias convolution_bias attention_bias scale_input"
    )
    return NemotronH_Omni_Reasoning_V3_Config(
        text_config={name: getattr(text, name) for name in NATIVE_TEXT} | {"model_type": "nemotron_h"},
        vision_config={
            "model_type": "radio",
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "max_img_size": vision.max_resolution,
            "num_cls_tokens": min(3, vision.num_prefix_tokens),
            "num_registers": vision.num_prefix_tokens - min(3, vision.num_prefix_tokens),
            "video_temporal_patch_size": vision.video_temporal_patch_size,
        },
        audio_config={name: getattr(sound, name) for name in names.split()} | {"model_type": "parakeet_encoder"},
        vision_hidden_size=vision.hidden_size,
        projector_hidden_size=config.projector_hidden_size,
        image_token_id=config.img_context_token_id,
        audio_token_id=config.sound_context_token_id,
        video_token_id=131081,
    )


def tower_pair(size: str, dtype: torch.dtype, device: str):
    """(ours, native) whole models with a tiny language model; random, each its own: speed does not ask for values."""
    from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3

    config = omni_config(size)
    text = MID | {"hybrid_override_pattern": "M*", "vocab_size": 64, "mamba_num_heads": 8, "hidden_size": 512}
    config.llm_config = OmniTextConfig(**text)
    ours = OmniForConditionalGeneration._from_config(config, dtype=dtype).to(device).eval()
    native = NemotronH_Omni_Reasoning_V3._from_config(native_omni_config(config), dtype=dtype).to(device).eval()
    return ours, native


# ---- decoding ----


def seconds_per_token(model, ids: torch.Tensor, new: int, experts: str | None = None, **options) -> float:
    """Median time of a decoding step inside a real `generate`; the prefill and the first step are not counted.

    experts: the native class's implementation of the experts while it decodes. "batched_mm" is its fastest compiled
        one, but gathers the weights of every token, which in a prefill takes gigabytes.
    """
    times = []
    before = model.get_experts_implementation() if experts else None

    def note(input_ids, scores, **kwargs):
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        if experts and not times:
            model.set_experts_implementation(experts)
        times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    fixed = {"do_sample": False, "use_cache": True, "pad_token_id": 0}
    try:
        model.generate(ids, max_new_tokens=new + 1, stopping_criteria=[note], **fixed, **options)
    finally:
        if experts:
            model.set_experts_implementation(before)
    return float(np.median(np.diff(times)[1:]))


def native_compiled_options() -> dict:
    """The fastest native decoding: static cache and `torch.compile` (and experts "batched_mm", `seconds_per_token`)."""
    compile_config = CompileConfig(mode="default")
    compile_config._compile_all_devices = True  # `generate` compiles on GPUs only unless told
    return {"cache_implementation": "static", "compile_config": compile_config}


@torch.no_grad()
def filled_cache(model, text, batch: int, context: int, static: bool = False):
    """A cache as behind a prompt of `context` tokens: states of a short real one, then random keys and values."""
    cache = StaticCache(text, max_cache_len=context + 512) if static else DynamicCache(config=text)
    short = min(64, context)
    ids = torch.randint(32, text.vocab_size, (batch, short), device=model.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        if isinstance(layer, CacheLayerMixin):  # keys and values
            shape = (2, batch, text.num_key_value_heads, context - short, text.head_dim)
            layer.update(*torch.randn(shape, device=model.device, dtype=layer.keys.dtype))
    return cache


# ---- llama.cpp ----


def write_gguf(native: NemotronHForCausalLM, path: Path) -> None:
    """The native model's tensors as a GGUF file of llama.cpp's `nemotron_h_moe`; norms and routers in float32."""
    import gguf

    config = native.config
    kinds = config.layers_block_type
    dtype = native.dtype
    writer = gguf.GGUFWriter(str(path), "nemotron_h_moe")
    inner = config.mamba_num_heads * config.mamba_head_dim
    shared = config.moe_shared_expert_intermediate_size
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(kinds))
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length([config.moe_intermediate_size if kind == "moe" else 0 for kind in kinds])
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv([config.num_key_value_heads if kind.endswith("attention") and "linear" not in kind else 0
                              for kind in kinds])  # fmt: skip
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(config.ssm_state_size)
    writer.add_ssm_time_step_rank(config.mamba_num_heads)
    writer.add_ssm_group_count(config.n_groups)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(shared)
    writer.add_expert_shared_count(1)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_group_count(1)
    writer.add_expert_group_used_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def put(name, tensor, exact=False):
        tensor = tensor.detach().cpu()
        if exact or tensor.dim() == 1 or dtype == torch.float32:
            writer.add_tensor(name, tensor.float().contiguous().numpy())
        else:
            raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)

    put("token_embd.weight", native.get_input_embeddings().weight)
    put("output_norm.weight", native.model.norm_f.weight)
    put("output.weight", native.lm_head.weight)
    for i, layer in enumerate(native.model.layers):
        mixer, blk = layer.mixer, f"blk.{i}"
        put(f"{blk}.attn_norm.weight", layer.norm.weight)
        if hasattr(mixer, "in_proj"):
            put(f"{blk}.ssm_in.weight", mixer.in_proj.weight)
            put(f"{blk}.ssm_conv1d.weight", mixer.conv1d.weight.squeeze(1), exact=True)
            put(f"{blk}.ssm_conv1d.bias", mixer.conv1d.bias)
            put(f"{blk}.ssm_dt.bias", mixer.dt_bias)
            put(f"{blk}.ssm_a", -mixer.A_log.float().exp()[:, None], exact=True)
            put(f"{blk}.ssm_d", mixer.D[:, None], exact=True)
            put(f"{blk}.ssm_norm.weight", mixer.norm.weight.view(config.n_groups, -1), exact=True)
            put(f"{blk}.ssm_out.weight", mixer.out_proj.weight)
        elif hasattr(mixer, "q_proj"):
            for name, ours in (
                ("attn_q", "q_proj"),
                ("attn_k", "k_proj"),
                ("attn_v", "v_proj"),
                ("attn_output", "o_proj"),
            ):
                put(f"{blk}.{name}.weight", getattr(mixer, ours).weight)
        else:
            put(f"{blk}.ffn_gate_inp.weight", mixer.gate.weight, exact=True)
            put(f"{blk}.exp_probs_b.bias", mixer.gate.e_score_correction_bias)
            put(f"{blk}.ffn_up_exps.weight", mixer.experts.up_proj)
            put(f"{blk}.ffn_down_exps.weight", mixer.experts.down_proj)
            put(f"{blk}.ffn_up_shexp.weight", mixer.shared_experts.up_proj.weight)
            put(f"{blk}.ffn_down_shexp.weight", mixer.shared_experts.down_proj.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_server(path: Path, threads: int, context: int, slots: int = 1):
    """llama.cpp's server engine inside this process (no port is opened)."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel = context * slots, slots
    params.n_batch = params.n_ubatch = 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(params)


def llama_seconds(server, ids: list[int], new: int = 1) -> tuple[float, float, list[int]]:
    """(seconds of the prefill, seconds per further token, tokens) of one greedy request, by llama.cpp's own clock."""
    answer = server.handle_completions(
        {
            "prompt": ids,
            "max_tokens": new,
            "n_predict": new,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
    )
    timings = answer["timings"]
    steps = max(1, timings["predicted_n"] - 1)  # the first token comes with the prefill
    text = answer["content"] if "content" in answer else answer["choices"][0]["text"]
    tokens = [int(number) for number in re.findall(r"t(\d+)", text)]  # the vocabulary of `write_gguf`
    return timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000 / steps, tokens
