"""Nemotron 3 Nano Omni: the towers, their projectors and the language model joined (paper section 2 and figure 1).

How media reach the language model: each tower runs once over all its packed items, a projector maps the result to the
width of the language model, EVS may drop video tokens (paper 4.6), and the features are put in the places that the
processor reserved. `mm_token_type_ids` says what each place is for (images and videos share one placeholder id), and
the places are checked against the features item by item: a count that does not fit raises.

Shape legend: B batch, S tokens, D hidden size, N media tokens, T tubelets, h, w patches per side.
"""

import copy
import os
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CompileConfig, GenerationMixin, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .checkpoint import IGNORED_ON_LOAD, check_code, check_weights, register_released_layout
from .configuration_omni import MODEL_TYPE, OmniConfig, resolve_checkpoint
from .configuration_omni import TYPE_AUDIO as AUDIO
from .configuration_omni import TYPE_IMAGE as IMAGE
from .configuration_omni import TYPE_VIDEO as VIDEO
from .evs import check_places, evs_keep_indices, order_of_kept_tokens, reserve_kept_tokens
from .kernels import linear
from .media import OmniInputError
from .modeling_audio import OmniAudioModel, init_audio_weights
from .modeling_language import (
    OmniLanguageModel,
    OmniRMSNorm,
    chunked_cross_entropy,
    decode_masks,
    init_language_weights,
    relu2,
)
from .modeling_mtp import OmniMTP, mtp_loss
from .modeling_vision import OmniVisionModel, init_vision_weights, pixel_shuffle
from .shared_prompts import read_prompts
from .speculative import draft_and_verify
from .token_reduction import ReducedCache, reduced_forward, reduction_cache

MODALITY_NAMES = {IMAGE: "image", VIDEO: "video", AUDIO: "audio"}

MEDIA_TENSORS = (  # what the towers need
    *("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"),
    *("input_features", "input_features_mask"),
)
MEDIA_FEATURES = tuple(f"{name}_features" for name in MODALITY_NAMES.values())
MEDIA_INPUTS = ("mm_token_type_ids", *MEDIA_TENSORS, "video_keep_tokens", "audio_clip_counts", *MEDIA_FEATURES)


class OmniProjector(GradientCheckpointingLayer):
    """RMSNorm -> linear -> relu^2 -> linear: `mlp1` for vision, `sound_projection` for audio."""

    def __init__(self, in_size: int, hidden_size: int, out_size: int, bias: bool = False):
        super().__init__()
        self.norm = OmniRMSNorm(in_size, 1e-5)
        self.linear1 = nn.Linear(in_size, hidden_size, bias=bias)
        self.linear2 = nn.Linear(hidden_size, out_size, bias=bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear2(relu2(self.linear1(self.norm(features))))


class OmniPreTrainedModel(PreTrainedModel):
    config_class = OmniConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    released = False  # whether what is saved has the names of `RENAMES`, all of them
    input_modalities = ("image", "video", "audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["OmniBlock", "MTPLayer", "PatchGenerator", "VisionBlock", "ConformerBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_attention_backend = True
    # Mamba's state cannot be cropped: transformers refuses its assisted decoding (see speculative.py)
    _is_stateful = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias", "norm_mean", "norm_std"]
    _keys_to_ignore_on_load_unexpected = IGNORED_ON_LOAD
    # the native class does not save these; `_init_weights` gives them their one right value
    _keys_to_ignore_on_load_missing = [r"input_conditioner\.norm_(mean|std)$", r"featurizer\.(fb|window)$"]

    def __init__(self, config: OmniConfig):
        super().__init__(config)
        # the parts are plain modules that read their own config; transformers only fills in the outer one
        for part in (config.llm_config, config.vision_config, config.sound_config):
            if part is not None and part._attn_implementation is None:
                part._attn_implementation = config._attn_implementation

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """transformers' `from_pretrained`; the name "nano" means the checkpoint shipped in this package.

        Raises:
            OmniInputError: a folder whose weights are no whole safetensors files, or do not fit its configuration.
        """
        path = resolve_checkpoint(pretrained_model_name_or_path)
        if cls.released and os.path.isdir(path) and not {"subfolder", "variant", "gguf_file"} & kwargs.keys():
            check_code(path)
            config = kwargs.get("config")
            if not isinstance(config, cls.config_class):
                config = cls.config_class.from_pretrained(config or path)
            with torch.device("meta"), no_init_weights(), torch.random.fork_rng(devices=[]):
                model = cls(copy.deepcopy(config))
            check_weights(path, model)
        return super().from_pretrained(path, *args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers skips modules without parameters of their own in custom code, in case their `_init_weights`
        # overwrites what was loaded; ours never does (`transformers.initialization`), and towers are such modules
        return False

    def _init_weights(self, module):
        # parents come after their children: each tower overrides the language model's values for the parts they share
        init_language_weights(module, self.config.llm_config)
        if isinstance(module, OmniVisionModel):
            for part in module.modules():
                init_vision_weights(part, self.config.vision_config)
        if self.config.sound_config is not None:
            init_audio_weights(module, self.config.sound_config)


class OmniModel(OmniPreTrainedModel):
    """Towers, projectors and language model without the head; returns `last_hidden_state`."""

    def __init__(self, config: OmniConfig):
        super().__init__(config)
        vision, audio, hidden_size = config.vision_config, config.sound_config, config.llm_config.hidden_size
        self.language_model = OmniLanguageModel(config.llm_config)
        self.vision_tower = OmniVisionModel(vision)
        shuffled = vision.hidden_size * config.merge_size**2
        self.vision_projector = OmniProjector(shuffled, config.projector_hidden_size, hidden_size)
        self.audio_tower = OmniAudioModel(audio)
        self.audio_projector = OmniProjector(
            audio.hidden_size, audio.projection_hidden_size, hidden_size, audio.projection_bias
        )
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embeddings

    def set_input_embeddings(self, value):
        self.language_model.embeddings = value

    def get_image_features(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """pixel_values [sum h*w, patch_dim], image_grid_thw [n, 3] -> projected tokens of all images [N, D]."""
        return self._vision_features(pixel_values, image_grid_thw, is_video=False)

    def get_video_features(self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor) -> torch.Tensor:
        """pixel_values_videos [sum t*h*w, 2*patch_dim], video_grid_thw [n, 3] -> all tokens before EVS [N, D]."""
        return self._vision_features(pixel_values_videos, video_grid_thw, is_video=True)

    def _vision_features(self, pixels, grid_thw, is_video):
        pixels = pixels.to(self.vision_tower.patch_generator.embedder.weight.dtype)
        patches = self.vision_tower(pixels, grid_thw, is_video=is_video)
        return self.vision_projector(pixel_shuffle(patches, grid_thw, self.config.merge_size))

    def get_audio_features(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """input_features [clips, frames, mels], mask [clips, frames] -> tokens of all clips [N, D], tokens per clip."""
        hidden, counts = self.audio_tower(input_features, input_features_mask)
        valid = torch.arange(hidden.shape[1], device=hidden.device) < counts.to(hidden.device)[:, None]
        return self.audio_projector(hidden[valid]), counts

    def encode_media(
        self,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Media -> {"image_features" | "video_features" | "audio_features": [N, D]}, which `forward` takes instead.

        So that rows which share media (rollouts of one prompt, the two answers of a pair) run the towers once.
        """
        features = {}
        if pixel_values is not None:
            features["image_features"] = self.get_image_features(pixel_values, image_grid_thw)
        if pixel_values_videos is not None:
            features["video_features"] = self.get_video_features(pixel_values_videos, video_grid_thw)
        if input_features is not None:
            features["audio_features"] = self.get_audio_features(input_features, input_features_mask)[0]
        return features

    def embed_multimodal(
        self,
        input_ids: torch.Tensor,
        mm_token_type_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        video_keep_tokens: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        audio_clip_counts: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
        return_types: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Token embeddings with every media feature in its place: [B, S] ids -> [B, S, D].

        With `video_keep_tokens` (EVS) the prompt holds all K placeholders of a video in its first tubelet; after the
        tokens to keep are known they move to the tubelets they belong to. The length never changes, so masks, labels
        and generation are not touched. `return_types` adds what each place of the result is, [B, S] (None: no media).
        `image_features` and the like are media that `encode_media` has run already, row after row; with them
        `mm_token_type_ids` must be given.

        Raises:
            OmniInputError: features and placeholders do not fit, naming the item, or media without placeholders.
        """
        embeds = self.language_model.embeddings(input_ids)
        types = self._token_types(input_ids, mm_token_type_ids, pixel_values, pixel_values_videos, input_features)
        encoded = {IMAGE: image_features, VIDEO: video_features, AUDIO: audio_features}
        features = {kind: tokens for kind, tokens in encoded.items() if tokens is not None}
        if types is None:
            if features:
                raise OmniInputError("media features need the processor's mm_token_type_ids, which say where they go")
            return (embeds, None) if return_types else embeds
        types_cpu = types.cpu()
        for kind, tokens in features.items():
            if (places := int((types_cpu == kind).sum())) != len(tokens):
                name = MODALITY_NAMES[kind]
                raise OmniInputError(f"{len(tokens)} {name} features were given for {places} {name} placeholder tokens")
        merge = self.config.merge_size**2
        for values, grid, name in (
            (pixel_values, image_grid_thw, "image_grid_thw"),
            (pixel_values_videos, video_grid_thw, "video_grid_thw"),
            (input_features, input_features_mask, "input_features_mask"),
        ):
            if values is not None and grid is None:
                raise OmniInputError(f"{name} is missing; pass everything that OmniProcessor returned")
        if pixel_values is not None:
            counts = (image_grid_thw.prod(-1) // merge).tolist()
            check_places(types_cpu == IMAGE, counts, "image")
            features[IMAGE] = self.get_image_features(pixel_values, image_grid_thw)
        kept = None
        if pixel_values_videos is not None:
            counts = (video_grid_thw.prod(-1) // merge).tolist()
            keep = counts if video_keep_tokens is None else video_keep_tokens.tolist()
            check_places(types_cpu == VIDEO, keep, "video")
            tokens = self.get_video_features(pixel_values_videos, video_grid_thw)
            if video_keep_tokens is not None:
                kept = [
                    evs_keep_indices(video.unflatten(0, (int(grid[0]), -1)), number)
                    for video, grid, number in zip(tokens.split(counts), video_grid_thw, keep)
                ]
                tokens = torch.cat([video[index] for video, index in zip(tokens.split(counts), kept)])
            features[VIDEO] = tokens
        if input_features is not None:
            audio, per_clip = self.get_audio_features(input_features, input_features_mask)
            clips = [1] * len(per_clip) if audio_clip_counts is None else audio_clip_counts.tolist()
            if sum(clips) != len(per_clip):
                raise OmniInputError(
                    f"audio_clip_counts {clips} add up to {sum(clips)} clips, {len(per_clip)} were given"
                )
            counts = [int(part.sum()) for part in per_clip.cpu().split(clips)]
            check_places(types_cpu == AUDIO, counts, "audio")
            features[AUDIO] = audio
        for modality, name in MODALITY_NAMES.items():
            if modality in features:
                place = (types == modality)[..., None].expand_as(embeds)
                embeds = embeds.masked_scatter(place, features[modality].to(embeds.dtype))
            elif bool((types_cpu == modality).any()):
                raise OmniInputError(f"the prompt has {name} placeholder tokens but no {name} was given")
        if kept is not None:
            order = order_of_kept_tokens(input_ids, types_cpu, video_grid_thw, kept, self.config).to(embeds.device)
            embeds, types = embeds.gather(1, order[..., None].expand_as(embeds)), types.gather(1, order)
        return (embeds, types) if return_types else embeds

    def _token_types(self, input_ids, types, pixel_values, pixel_values_videos, input_features):
        if types is None:
            if pixel_values is None and pixel_values_videos is None and input_features is None:
                return None
            if pixel_values is not None and pixel_values_videos is not None:
                raise OmniInputError(
                    "images and videos share one placeholder id: pass the processor's mm_token_type_ids to tell which "
                    "is which"
                )
            types = torch.zeros_like(input_ids)
            types[input_ids == self.config.img_context_token_id] = IMAGE if pixel_values is not None else VIDEO
            types[input_ids == self.config.sound_context_token_id] = AUDIO
        elif types.shape[1] < input_ids.shape[1]:  # text was appended (a completion): it never holds media
            types = F.pad(types, (0, input_ids.shape[1] - types.shape[1]))
        return types

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        prefill_chunk_size: int | None = None,
        hidden_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast | tuple:
        """Runs the model.

        Args:
            input_ids: [B, S] from `OmniProcessor`; or inputs_embeds: [B, S, D] with media already in place.
            attention_mask: [B, past + S], 1 on tokens, 0 on padding (left or right).
            seq_idx: [B, S] document numbers of packed rows (see `OmniLanguageModel`).
            prefill_chunk_size: run the language model over the prompt in pieces of this many tokens, with a cache;
                equal to one pass, with less memory.
            hidden_to_keep: in pieces, return at least the last n hidden states and forget the others (0: all).
            mm_token_type_ids and MEDIA_INPUTS: as `OmniProcessor` returns them, or `encode_media`; see
                `embed_multimodal`.

        Returns:
            last_hidden_state [B, S, D] after the final norm; past_key_values when use_cache.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        media = {name: kwargs.pop(name) for name in MEDIA_INPUTS if name in kwargs}
        if inputs_embeds is None:
            inputs_embeds, mm_token_type_ids = self.embed_multimodal(
                input_ids, mm_token_type_ids, **media, return_types=True
            )
        if use_cache is None:
            use_cache = past_key_values is not None or (config.llm_config.use_cache and not self.training)
        recomputed = self.training and torch.is_grad_enabled() and self.is_activation_checkpointing
        if seq_idx is not None or (recomputed and past_key_values is None):  # running a layer again would add twice
            use_cache = False
        options = {"use_cache": use_cache, "position_ids": position_ids, "seq_idx": seq_idx}
        options |= {"output_hidden_states": bool(output_hidden_states)} | kwargs
        length = inputs_embeds.shape[1]
        if isinstance(past_key_values, ReducedCache):  # visual tokens are dropped between layers
            del options["use_cache"], options["position_ids"]
            output = reduced_forward(
                self.language_model, inputs_embeds, mm_token_type_ids, attention_mask, past_key_values, **options
            )
        elif prefill_chunk_size is None or length <= prefill_chunk_size:
            output = self.language_model(inputs_embeds, attention_mask, past_key_values, **options)
        else:
            chunk = prefill_chunk_size
            output = self._prefill_in_chunks(
                inputs_embeds, attention_mask, past_key_values, chunk, hidden_to_keep, options
            )
        return output if return_dict in (None, True) else output.to_tuple()

    def _prefill_in_chunks(self, inputs_embeds, attention_mask, past_key_values, chunk, keep, options):
        if not options["use_cache"] or options["output_hidden_states"]:
            raise ValueError("prefill_chunk_size needs use_cache=True and cannot return hidden states of every layer")
        if attention_mask is not None and (isinstance(attention_mask, dict) or attention_mask.dim() != 2):
            raise ValueError("prefill_chunk_size needs an attention_mask [B, past + S] of 1 and 0")
        # a static cache returns a live counter, hence `int`
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        hidden, position_ids = [], options.pop("position_ids")
        for start in range(0, inputs_embeds.shape[1], chunk):
            stop = min(start + chunk, inputs_embeds.shape[1])
            output = self.language_model(
                inputs_embeds[:, start:stop],
                None if attention_mask is None else attention_mask[:, : past + stop],
                past_key_values,
                position_ids=None if position_ids is None else position_ids[..., start:stop],
                **options,
            )
            past_key_values = output.past_key_values
            hidden.append(output.last_hidden_state)
            while keep and sum(part.shape[1] for part in hidden[1:]) >= keep:
                hidden.pop(0)
        output.last_hidden_state = torch.cat(hidden, 1)
        return output


class OmniForConditionalGeneration(OmniPreTrainedModel, GenerationMixin):
    """The whole model with its head; loads and saves the released checkpoint layout.

    Where the config has `num_nextn_predict_layers`, with heads of multi-token prediction: `mtp`, else None.
    """

    model_class = OmniModel
    label_loss = staticmethod(chunked_cross_entropy)  # with labels; qad.py puts a teacher's divergence in its place
    released = True
    min_loss_chunks = 0  # see `chunked_cross_entropy`
    mtp_loss_weight = 0.1  # of the draft heads' loss beside the trunk's
    mtp_depth = 1  # drafts in a row that are learnt, if there are not more heads
    _decode_is_compiled = False  # in the `generate` that runs

    def __init__(self, config: OmniConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.llm_config.hidden_size, config.llm_config.vocab_size, bias=False)
        self.mtp = OmniMTP(config.llm_config) if config.llm_config.num_nextn_predict_layers else None
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_image_features(self, *args, **kwargs):
        """See `OmniModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def get_video_features(self, *args, **kwargs):
        """See `OmniModel.get_video_features`."""
        return self.model.get_video_features(*args, **kwargs)

    def get_audio_features(self, *args, **kwargs):
        """See `OmniModel.get_audio_features`."""
        return self.model.get_audio_features(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        seq_idx: torch.Tensor | None = None,
        prefill_chunk_size: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        video_keep_tokens: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        audio_clip_counts: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """Runs the model and its head.

        Args:
            labels: [B, S], -100 where nothing is learnt. The loss is computed in chunks, see `chunked_cross_entropy`.
                While draft heads are trained, `mtp_loss_weight` times their loss is added (see `mtp_loss`); where the
                trunk is frozen, theirs is the loss.
            logits_to_keep: logits of the last n positions only (0: all; a tensor: those positions).
            skip_logits: with labels, return the loss alone and never form the logits of all positions.
            Everything else as in `OmniModel.forward`.

        Returns:
            loss (with labels), logits [B, kept, vocab] float32, past_key_values.
        """
        media = {
            "pixel_values": pixel_values, "image_grid_thw": image_grid_thw, "image_features": image_features,
            "pixel_values_videos": pixel_values_videos, "video_grid_thw": video_grid_thw,
            "video_keep_tokens": video_keep_tokens, "video_features": video_features,
            "input_features": input_features, "input_features_mask": input_features_mask,
            "audio_clip_counts": audio_clip_counts, "audio_features": audio_features,
        }  # fmt: skip
        drafting = labels is not None and self.mtp is not None and torch.is_grad_enabled()
        drafting = drafting and self.mtp.layers[0].eh_proj.weight.requires_grad
        if drafting and inputs_embeds is None:  # the heads read the trunk's inputs, media in place
            inputs_embeds, mm_token_type_ids = self.model.embed_multimodal(
                input_ids, mm_token_type_ids, **media, return_types=True
            )
            input_ids = None
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            seq_idx,
            prefill_chunk_size,
            logits_to_keep if labels is None and isinstance(logits_to_keep, int) else 0,
            output_hidden_states,
            mm_token_type_ids=mm_token_type_ids,
            **media,
            **kwargs,
        )
        hidden = output.last_hidden_state
        loss = None
        if labels is not None and (hidden.requires_grad or not drafting):
            loss = self.label_loss(hidden, self.lm_head, labels, num_items_in_batch, min_chunks=self.min_loss_chunks)
        if drafting:
            parts = (self.mtp, self.lm_head, hidden, inputs_embeds, labels, attention_mask, seq_idx, num_items_in_batch)
            drafts_loss = mtp_loss(*parts, max(self.mtp_depth, self.mtp.depths), self.min_loss_chunks)
            loss = drafts_loss if loss is None else loss + self.mtp_loss_weight * drafts_loss
        logits = None
        if not (skip_logits and labels is not None):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = linear(self.lm_head, hidden[:, kept]).float()
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states
        )
        return result if return_dict in (None, True) else result.to_tuple()

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, **kwargs):
        """transformers' `generate` on the output of `OmniProcessor`, media of any mix included.

        The media are encoded once here, whatever `num_return_sequences` or `num_beams` ask for. With
        `prefill_chunk_size=n` the prompt is run n tokens at a time, with `video_pruning_rate=q` EVS drops that share
        of every video's tokens (and the prompt that is returned is the shortened one). With `visual_keep=k` visual
        tokens are dropped while the prompt goes through the layers, those first that matter least to the question, so
        that a layer sees the share k of them in the mean (token_reduction.py; `visual_scoring` "query", "random" or
        "uniform"). Returns prompt and answer, [B', S + new].

        `cache_implementation="static"` allocates the attention cache once, which pays for long contexts.
        `compile_decode=True` does so and runs every token but the first through `torch.compile`: several times as fast,
        after the minutes that compiling takes at the first call (and once more for a second length of the cache;
        `max_cache_len` keeps it the same). Give a `compile_config` instead to choose the compiler's options.

        `mtp_drafts=k` lets a model with a draft head write up to k + 1 tokens in a pass of the trunk, without changing
        what is written (speculative.py); `mtp_counts`, a Counter, is told how many drafts were accepted.

        `prompt_rows`, [B], says which prompt (any number) a row holds: each is read once, whatever its rows.
        """
        prompt_rows = kwargs.pop("prompt_rows", None)
        keep, scoring = kwargs.pop("visual_keep", None), kwargs.pop("visual_scoring", "query")
        if kwargs.pop("compile_decode", False):
            compile_config = CompileConfig(mode="reduce-overhead" if self.device.type == "cuda" else "default")
            compile_config._compile_all_devices = True  # transformers leaves CPUs out otherwise
            kwargs |= {"cache_implementation": "static", "compile_config": compile_config}
        rate = kwargs.pop("video_pruning_rate", None)
        if rate and kwargs.get("pixel_values_videos") is not None and kwargs.get("video_keep_tokens") is None:
            inputs = kwargs.pop("input_ids") if inputs is None else inputs
            shortened = reserve_kept_tokens(kwargs | {"input_ids": inputs}, rate, self.config.merge_size)
            inputs, kwargs = shortened.pop("input_ids"), shortened
        media = {name: kwargs.pop(name) for name in MEDIA_INPUTS if kwargs.get(name) is not None}
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        if media and inputs is not None and kwargs.get("inputs_embeds") is None:
            embeds, types = self.model.embed_multimodal(inputs, **media, return_types=True)
            kwargs["inputs_embeds"], media["mm_token_type_ids"] = embeds, types
        if keep not in (None, 1) and media.get("mm_token_type_ids") is not None:
            kwargs["past_key_values"] = reduction_cache(self, keep, scoring, kwargs)
            kwargs["mm_token_type_ids"] = media["mm_token_type_ids"]
        if prompt_rows is not None and kwargs.get("past_key_values") is None:
            embeds = kwargs.get("inputs_embeds")
            embeds = self.get_input_embeddings()(inputs) if embeds is None else embeds
            options = (prompt_rows.tolist(), embeds, kwargs.get("attention_mask"))
            kwargs["past_key_values"] = read_prompts(self.model, *options)
        drafts = {"mtp_drafts": kwargs.pop("mtp_drafts", None), "mtp_counts": kwargs.pop("mtp_counts", None)}
        if drafts["mtp_drafts"]:
            if kwargs.get("stop_strings"):  # transformers gives a decoding loop of one's own no tokenizer
                raise OmniInputError(
                    "mtp_drafts takes no stop_strings; give stopping_criteria=[StopStringCriteria(...)]"
                )
            kwargs["custom_generate"] = partial(draft_and_verify, streamer=kwargs.get("streamer"), **drafts)
        return super().generate(inputs, **kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config):
        self._decode_is_compiled = super()._valid_auto_compile_criteria(model_kwargs, generation_config)
        return self._decode_is_compiled

    def create_masks_for_generate(self, inputs_embeds, attention_mask, past_key_values, **kwargs):
        """What `generate` passes as `attention_mask` with a static cache: masks of fixed shape for compiled steps."""
        fixed = self.config.llm_config._attn_implementation in ("sdpa", "eager")
        if not (fixed and self._decode_is_compiled and inputs_embeds.shape[1] == 1):
            return attention_mask
        return decode_masks(attention_mask, len(inputs_embeds), past_key_values, inputs_embeds.device)

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        # transformers would split the ids, but media live in the embeddings: the split is done in OmniModel.forward
        chunk = generation_config.prefill_chunk_size
        if chunk is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        generation_config.prefill_chunk_size = None
        try:
            model_kwargs = model_kwargs | {"prefill_chunk_size": chunk}
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        finally:
            generation_config.prefill_chunk_size = chunk


register_released_layout(MODEL_TYPE)
