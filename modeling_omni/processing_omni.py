"""Messages and media to model inputs: chat template, placeholders, labels (paper sections 2 and 4.6).

A sample's media are loaded, their grids and token counts planned from sizes alone, the text expanded with one run of
placeholders per item, and only then are pixels and mel frames computed. Supplied text never becomes a special token
(`prompt_omni.py`).

Shapes: B samples, S tokens; the media tensors are flat over the batch (see the image, video and audio front ends).
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    BatchFeature,
    PreTrainedConfig,
    ProcessorMixin,
)

from .call_inputs import AS_LIST, CallOptions, check_pruning_rate, share_out, split_options, with_metadata
from .configuration_omni import TYPE_AUDIO, TYPE_IMAGE, TYPE_TEXT, TYPE_VIDEO, OmniConfig, resolve_checkpoint
from .evs import kept_tokens
from .feature_extraction_omni import OmniFeatureExtractor
from .image_processing_omni import NemotronH_Nano_Omni_Reasoning_V3ImageProcessor, OmniImageProcessor
from .media import OmniInputError, default_limits
from .media_source import words_of
from .prompt_omni import (
    AUDIO,
    IMAGE,
    LABELS_ON,
    VIDEO,
    TextCodec,
    check_encodable,
    default_chat_template,
    escape_tree,
    prepare_messages,
    tool_schemas,
)
from .sample_media import SampleMedia, audio_tokens, load_media, pruning_rate
from .video_processing_omni import OmniVideoProcessor, frame_labels, tubelet_audio_counts

logger = logging.getLogger(__name__)


@dataclass
class Sample:
    """Expanded sample: ids with what each place is for, and the waveforms in order of their placeholders."""

    input_ids: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    is_label: list[bool] = field(default_factory=list)
    waveforms: list = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("image", "video", "audio"), 0))

    def extend(self, ids, kind: int, labels: bool) -> None:
        self.input_ids += ids
        self.types += [kind] * len(ids)
        self.is_label += [labels] * len(ids)


class OmniProcessor(ProcessorMixin):
    """Image, video and audio front ends, tokenizer and chat template in one.

    Args:
        image_processor (`OmniImageProcessor`), video_processor (`OmniVideoProcessor`), feature_extractor
            (`OmniFeatureExtractor`), tokenizer: the parts.
        chat_template (`str`, *optional*): this package's template when not given.
        audio_in_video (`str`): place of a video's sound: "after" all its frames, as the public serving code has it, or
            "interleave", in order of time with its tubelets, as the paper has it.
        video_pruning_rate (`float`): share of video tokens that EVS drops; 0 turns it off. A run-time choice: calls may
            override it.
    """

    def __init__(
        self,
        image_processor=None,
        video_processor=None,
        feature_extractor=None,
        tokenizer=None,
        chat_template=None,
        audio_in_video: str = "after",
        video_pruning_rate: float = 0.0,
    ):
        if audio_in_video not in ("after", "interleave"):
            raise OmniInputError(f"audio_in_video is {audio_in_video!r}; use 'after' or 'interleave'")
        check_pruning_rate(video_pruning_rate)
        super().__init__(
            image_processor or OmniImageProcessor(),
            video_processor or OmniVideoProcessor(),
            feature_extractor or OmniFeatureExtractor(),
            tokenizer,
            chat_template=chat_template or default_chat_template(),
        )
        self.audio_in_video = audio_in_video
        self.video_pruning_rate = video_pruning_rate
        self.image_token, self.video_token, self.audio_token = IMAGE, VIDEO, AUDIO
        # images and videos share this placeholder; mm_token_type_ids tells them apart
        self.image_token_id = self._id(IMAGE)
        self.audio_token_id = self._id(AUDIO)

    # ---------------------------------------------------------------------------------------------- text

    @property
    def codec(self) -> TextCodec:
        codec = self.__dict__.get("_codec")
        if codec is None or codec.num_tokens != len(self.tokenizer):
            codec = self.__dict__["_codec"] = TextCodec(self.tokenizer)
        return codec

    def _id(self, token: str) -> int:
        token_id = self.codec.special_ids.get(token)
        if token_id is None:
            raise OmniInputError(f"the tokenizer has no special token {token!r}; it is not a tokenizer of this model")
        return token_id

    def encode(self, text: str) -> list[int]:
        """Plain text -> ids. Spellings of special tokens are text here; `decode` gives the same text back."""
        check_encodable(text)
        return list(self.codec.encode(text)) if text else []

    def decode(self, *args, **kwargs):
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args, **kwargs):
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        return self.tokenizer.batch_decode(*args, **kwargs)

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens: bool = True, **kwargs):
        """Generated ids [B, S] -> list of texts. Unlike plain decoding, thinking and tool-call marks stay readable."""
        rows = generated_outputs.tolist() if hasattr(generated_outputs, "tolist") else list(generated_outputs)
        rows = [rows] if rows and isinstance(rows[0], int) else rows
        if skip_special_tokens:
            shown = ("<think>", "</think>", "<tool_call>", "</tool_call>")
            ids = self.codec.special_ids
            hidden = set(ids.values()) - {ids[token] for token in shown if token in ids}
            rows = [[i for i in row if i not in hidden] for row in rows]
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        return [self.tokenizer.decode(row, skip_special_tokens=False, **kwargs) for row in rows]

    @staticmethod
    def split_reasoning(text: str, thinking: bool = False) -> tuple[str, str]:
        """Decoded output -> (reasoning, answer), both stripped.

        Args:
            text: what the model wrote, with `<think>` or without (the generation prompt opens it).
            thinking: the prompt opened `<think>`; an output that never closes it is then all reasoning.
        """
        text = text.removesuffix("<|im_end|>").removesuffix("</s>")
        head, closed, tail = text.partition("</think>")
        opened = head.lstrip().startswith("<think>")
        head = head.lstrip().removeprefix("<think>") if opened else head
        if closed:
            return head.strip(), tail.strip()
        return (head.strip(), "") if opened or thinking else ("", head.strip())

    # ---------------------------------------------------------------------------------------------- calls

    def __call__(
        self,
        images=None,
        text: str | list[str] | None = None,
        videos=None,
        audio=None,
        *,
        video_metadata=None,
        **kwargs,
    ) -> BatchFeature:
        """Prompt strings and their media to model inputs.

        In a prompt the special tokens are structure and `<image>`, `<video>`, `<so_embedding>` stand for one item each.
        Strings from `apply_chat_template(tokenize=False)` keep supplied text apart from structure; text of unknown
        origin belongs into messages, not into a prompt.

        Args:
            images, videos, audio: items in order of their places, as one list over the batch or one list per prompt.
            text: one prompt or a list of them.
            video_metadata (*optional*): one per video, with `fps` and `frames_indices`, for videos given as frames.
            kwargs: `sampling_rate` (Hz of audio given as bare arrays) and the options of `apply_chat_template`.

        Returns:
            The model's inputs, as `apply_chat_template` returns them.

        Raises:
            OmniInputError: media that do not match the places, unreadable media, a budget too small.
        """
        options, _ = split_options(kwargs)
        prompts = [text] if isinstance(text, str) else list(text or ())
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise OmniInputError("text must be a prompt string or a non-empty list of them")
        for i, prompt in enumerate(prompts):
            check_text(prompt, f"prompt {i}", options)
        pieces = [self.codec.split_prompt(prompt) for prompt in prompts]
        if video_metadata is not None:
            videos = with_metadata(AS_LIST["video"](videos), video_metadata)
        parts = [[] for _ in prompts]
        for kind, sentinel, items in (("image", IMAGE, images), ("video", VIDEO, videos), ("audio", AUDIO, audio)):
            places = [piece.count(("special", sentinel)) for piece in pieces]
            for sample_parts, sample_items in zip(parts, share_out(kind, items, places), strict=True):
                sample_parts += [(kind, {kind: item}) for item in sample_items]
        return self._encode_batch(pieces, [load_media(self, sample_parts, options) for sample_parts in parts], options)

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        tools: list | None = None,
        documents: list[dict] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        images=None,
        videos=None,
        audio=None,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """One conversation or a batch of them -> model inputs (`tokenize=True`) or prompt strings.

        Args:
            conversation: messages {"role", "content"}; content is a string or parts {"type": "text" | "image" |
                "video" | "audio"} with "text" or a source under "path", "url", "bytes", "array" or the type's own name.
                Parts follow each other without a separator. Video parts may carry "audio" ("auto" | "on" | "off"),
                "start", "end", "fps", "num_frames", "max_frames" (never more than the call's), image and video parts
                "max_patches" (of the image, or of a frame: resolution gives way, not the aspect ratio). Assistant
                messages may carry `reasoning_content` and `tool_calls`, or begin with a `<think>...</think>` block.
            chat_template (`str`, *optional*): another template, or the name of one of several.
            tools: JSON schemas or documented functions.
            continue_final_message: the last, assistant message is a prefix to be continued, kept to its last blank;
                with reasoning and no content its thinking stays open.
            return_dict: `False` gives `input_ids` only.
            images, videos, audio: sources for parts that name none, in order (one list per conversation for a batch).
            processor_kwargs, kwargs: template variables `enable_thinking`, `reasoning_budget`,
                `truncate_history_thinking` and any other that the template names; `return_labels` (adds `labels`, -100
                outside assistant text), `return_assistant_tokens_mask` (adds `assistant_masks`); `padding` (when not
                given: where tensors need it), `padding_side` ("left"), `pad_to_multiple_of`, `max_length`,
                `truncation`, `return_tensors` ("pt"; lists of ids when not given, as everywhere in transformers);
                `num_frames`, `fps`, `max_frames` (sampling of videos), `use_audio_in_video` (False ignores their
                sound), `video_pruning_rate` (EVS), `video_target_num_patches` (of a frame, for this call),
                `max_media_tokens` (per conversation; see `fit_media_budget`: image and video resolution gives way,
                sound does not), `media_limits`, `sampling_rate`.

        Returns:
            A prompt string (a list for a batch) in which supplied text is kept apart from structure, fit for
            `__call__`; or a `BatchFeature` with a batch dimension even for one conversation: `input_ids` and
            `attention_mask` [B, S]; with media `mm_token_type_ids` [B, S] (0 text, 1 image, 2 video, 3 audio) and
            `pixel_values`, `image_grid_thw`, `pixel_values_videos`, `video_grid_thw`, `input_features`,
            `input_features_mask`, `audio_clip_counts`; with EVS `video_keep_tokens` [videos].

        Labels cover reasoning, answer, tool calls and `<|im_end|>` of every assistant turn, not what the generation
        prompt gives: the header, `<think>` and newline, or the empty `<think></think>` of a turn without reasoning.
        Text is split where labels begin, so training sees exactly the ids that generation starts from.

        Raises:
            OmniInputError: malformed messages, media that cannot be read or do not fit.
        """
        is_batch = len(conversation) > 0 and isinstance(conversation[0], (list, tuple))
        conversations = conversation if is_batch else [conversation]
        if continue_final_message and add_generation_prompt:
            raise OmniInputError("continue_final_message and add_generation_prompt exclude each other")
        source = self._template_source(chat_template)
        try:
            template, variables = self.codec.compile(source)
        except Exception as error:
            raise OmniInputError(f"the chat template cannot be compiled: {words_of(error)}") from error
        if continue_final_message and "continue_final_message" not in variables:
            raise OmniInputError("this chat template cannot continue a message; use the default one")
        options, values = split_options({**(processor_kwargs or {}), **kwargs}, variables)
        values |= {
            "tools": tool_schemas(tools),
            "documents": escape_tree(documents),
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        loose = {"image": images, "video": videos, "audio": audio}
        if not is_batch:
            loose = {kind: None if items is None else [items] for kind, items in loose.items()}
        rendered, parts = [], []
        for i, messages in enumerate(conversations):
            own = {kind: AS_LIST[kind](items[i]) for kind, items in loose.items() if items is not None}
            messages, sample_parts = prepare_messages(messages, own, continue_final_message)
            if any(own.values()):
                left = {kind: len(items) for kind, items in own.items() if items}
                raise OmniInputError(f"conversation {i} has no part for {left} of the media given beside it")
            try:
                rendered.append(template.render(messages=messages, **values))
                check_encodable(rendered[-1])
            except OmniInputError:
                raise
            except Exception as error:  # a template can raise whatever Python can
                raise OmniInputError(f"the chat template failed on conversation {i}: {words_of(error)}") from error
            check_text(rendered[-1], f"conversation {i}", options)
            parts.append(sample_parts)
        if not tokenize:
            prompts = [self.codec.to_prompt(string) for string in rendered]
            return prompts if is_batch else prompts[0]
        media = [load_media(self, sample_parts, options) for sample_parts in parts]
        output = self._encode_batch([self.codec.split_rendered(string) for string in rendered], media, options)
        return output if return_dict or options.count_only else output["input_ids"]

    def count_tokens(self, conversation, **kwargs) -> dict[str, int] | list[dict[str, int]]:
        """Tokens of a conversation by modality: {"text", "image", "video", "audio", "total"}; a list for a batch.

        Media are opened for their sizes; no pixels or mel frames are computed and no tower runs. Takes the options of
        `apply_chat_template`. Marks around media and frame times count as text.
        """
        is_batch = len(conversation) > 0 and isinstance(conversation[0], (list, tuple))
        counts = self.apply_chat_template(conversation, tokenize=True, count_only=True, **kwargs)
        return counts if is_batch else counts[0]

    def _template_source(self, chat_template: str | None) -> str:
        templates = self.chat_template
        if isinstance(templates, dict):
            chat_template = chat_template or "default"
            if chat_template not in templates and "{" not in chat_template:
                raise OmniInputError(f"no chat template is named {chat_template!r}; known: {', '.join(templates)}")
            return templates.get(chat_template, chat_template)
        return chat_template or templates

    # ---------------------------------------------------------------------------------------------- expansion

    def _expand(self, pieces: list[tuple[str, str]], media: SampleMedia, rate: float, index: int) -> Sample:
        """Text pieces with one sentinel per item -> ids with one placeholder per token of the item."""
        sample, codec = Sample(), self.codec
        text: list[str] = []
        labels = False
        used = {IMAGE: 0, VIDEO: 0, AUDIO: 0}

        def flush():
            if text:
                sample.extend(codec.encode("".join(text)), TYPE_TEXT, labels)
                text.clear()

        def run(start: str, kind: int, placeholder: int, count: int, end: str):
            flush()
            sample.extend([self._id(start)], TYPE_TEXT, labels)
            sample.extend([placeholder] * count, kind, labels)
            sample.extend([self._id(end)], TYPE_TEXT, labels)
            sample.counts[KINDS[kind]] += count

        for piece, value in pieces:
            if piece == "text":
                text.append(value)
            elif piece == "labels":
                flush()
                labels = value == LABELS_ON
            elif value not in used:
                flush()
                sample.extend([self._id(value)], TYPE_TEXT, labels)
            else:
                i = used[value]
                used[value] += 1
                if value == IMAGE and i < len(media.image_grids):
                    h, w = media.image_grids[i]
                    tokens = h * w // self.image_processor.merge_size**2
                    run("<img>", TYPE_IMAGE, self.image_token_id, tokens, "</img>")
                elif value == AUDIO and i < len(media.audios):
                    sample.waveforms.append(media.audios[i])
                    tokens = audio_tokens(self, media.audios[i])
                    run("<so_start>", TYPE_AUDIO, self.audio_token_id, tokens, "<so_end>")
                elif value == VIDEO and i < len(media.videos):
                    self._expand_video(media, i, rate, text, run, sample)
        flush()
        for sentinel, items in ((IMAGE, media.images), (VIDEO, media.videos), (AUDIO, media.audios)):
            if used[sentinel] != len(items):
                raise OmniInputError(
                    f"sample {index}: the prompt has {used[sentinel]} places {sentinel} but {len(items)} items were "
                    "given; give one per place"
                )
        return sample

    def _expand_video(self, media: SampleMedia, i: int, rate: float, text: list[str], run, sample: Sample) -> None:
        clip, sound = media.videos[i], media.sounds[i]
        t, h, w = media.video_grids[i]
        size = self.video_processor.video_temporal_patch_size
        per_tubelet = h * w // self.video_processor.merge_size**2
        tokens = [per_tubelet] * t
        if rate > 0:  # EVS: the model moves the kept tokens to their tubelets
            tokens = [kept_tokens(t, per_tubelet, rate)] + [0] * (t - 1)
        sound_tokens = [0] * t
        if sound is not None:
            sample.waveforms.append(sound)
            total = audio_tokens(self, sound)
            sound_tokens[-1] = total
            if self.audio_in_video == "interleave":
                sound_tokens = tubelet_audio_counts(clip, total, clip.start, size)
        for k, label in enumerate(frame_labels(clip, size)):
            text.append(label if k == 0 else "\n" + label)
            run("<img>", TYPE_VIDEO, self.image_token_id, tokens[k], "</img>")
            if sound_tokens[k]:
                run("<so_start>", TYPE_AUDIO, self.audio_token_id, sound_tokens[k], "<so_end>")

    def _encode_batch(self, pieces: list, media: list[SampleMedia], options: CallOptions):
        rate = pruning_rate(self, options)
        samples = [self._expand(*pair, rate, i) for i, pair in enumerate(zip(pieces, media, strict=True))]
        if options.count_only:
            return [
                {"text": len(s.input_ids) - sum(s.counts.values()), **s.counts, "total": len(s.input_ids)}
                for s in samples
            ]
        if options.truncation and options.max_length is not None:
            for i, sample in enumerate(samples):
                truncate(sample, options.max_length, i)
        return BatchFeature(self._text_inputs(samples, options) | self._media_inputs(samples, media, rate))

    def _text_inputs(self, samples: list[Sample], options: CallOptions) -> dict:
        rows = {"input_ids": [s.input_ids for s in samples], "attention_mask": [[1] * len(s.types) for s in samples]}
        if any(any(s.counts.values()) for s in samples):
            rows["mm_token_type_ids"] = [s.types for s in samples]
        if options.return_assistant_tokens_mask:
            rows["assistant_masks"] = [[int(label) for label in s.is_label] for s in samples]
        if options.return_labels:
            rows["labels"] = [
                [i if label else -100 for i, label in zip(s.input_ids, s.is_label, strict=True)] for s in samples
            ]
        fill = {"input_ids": self._pad_id(), "labels": -100}
        longest = max(len(s.input_ids) for s in samples)
        uneven = any(len(s.input_ids) != longest for s in samples)
        needed = uneven and options.return_tensors and options.padding is None
        if options.padding or options.pad_to_multiple_of or needed:
            if options.padding == "max_length" and options.max_length:
                longest = max(longest, options.max_length)
            multiple = options.pad_to_multiple_of or 1
            length = -(-longest // multiple) * multiple
            left = options.padding_side == "left"
            for name, values in rows.items():
                pad = fill.get(name, 0)
                rows[name] = [
                    [pad] * (length - len(row)) + row if left else row + [pad] * (length - len(row)) for row in values
                ]
        elif uneven and options.return_tensors:
            raise OmniInputError("samples of different length make no tensor without padding; drop padding=False")
        if options.return_tensors:
            rows = {name: torch.tensor(values, dtype=torch.long) for name, values in rows.items()}
        return rows

    def _pad_id(self) -> int:
        return 0 if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def _media_inputs(self, samples: list[Sample], media: list[SampleMedia], rate: float) -> dict:
        inputs = {}
        images = [(image, *grid) for m in media for image, grid in zip(m.images, m.image_grids, strict=True)]
        videos = [(clip.frames, *grid) for m in media for clip, grid in zip(m.videos, m.video_grids, strict=True)]
        waveforms = [waveform for sample in samples for waveform in sample.waveforms]
        if images:
            inputs["pixel_values"] = self.image_processor.patches(images)
            inputs["image_grid_thw"] = torch.tensor([(1, h, w) for _, h, w in images])
        if videos:
            inputs["pixel_values_videos"] = self.video_processor.patches([(f, h, w) for f, _, h, w in videos])
            inputs["video_grid_thw"] = torch.tensor([grid for _, *grid in videos])
            if rate > 0:
                merge = self.video_processor.merge_size**2
                kept = [kept_tokens(t, h * w // merge, rate) for _, t, h, w in videos]
                inputs["video_keep_tokens"] = torch.tensor(kept)
        if waveforms:
            inputs |= self.feature_extractor(waveforms, sampling_rate=self.feature_extractor.sampling_rate)
        return inputs

    @property
    def model_input_names(self) -> list[str]:
        names = ["input_ids", "attention_mask", "mm_token_type_ids", *self.image_processor.model_input_names]
        names += [*self.video_processor.model_input_names, "video_keep_tokens"]
        return names + ["input_features", "input_features_mask", "audio_clip_counts"]

    # ---------------------------------------------------------------------------------------------- files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Loads a folder that this class saved, or a released one, without remote code.

        A released folder has a tokenizer and preprocessor_config.json, which gives the image and the video front end;
        the audio front end takes its sizes from config.json where there is one. Its own chat_template.jinja is kept as
        `released_chat_template`, to be passed as `chat_template=`; the default stays this package's, which also takes
        content parts and marks what labels need. A folder's template that has such marks is used as it is.
        """
        path = resolve_checkpoint(pretrained_model_name_or_path)
        processor = super().from_pretrained(path, **kwargs)
        hub = {key: value for key, value in kwargs.items() if key in HUB_OPTIONS}
        if "audio_in_video" not in {**cls.get_processor_dict(path, **hub)[0], **kwargs}:
            config, _ = PreTrainedConfig.get_config_dict(path, **hub, _raise_exceptions_for_missing_entries=False)
            processor.audio_in_video = config.get("audio_in_video", "after")
            if config.get("video_pruning_rate"):
                logger.warning(
                    "%s: its config.json has video_pruning_rate %s; EVS stays off unless video_pruning_rate is passed",
                    path,
                    config["video_pruning_rate"],
                )
        return processor

    def save_pretrained(self, save_directory, **kwargs):
        """Saves every part, and preprocessor_config.json under the released class name for tools that expect it."""
        files = super().save_pretrained(save_directory, **kwargs)
        released = self.image_processor.to_dict()
        released["image_processor_type"] = NemotronH_Nano_Omni_Reasoning_V3ImageProcessor.__name__
        (Path(save_directory) / "preprocessor_config.json").write_text(json.dumps(released, indent=2) + "\n")
        return files

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        kwargs.pop("trust_remote_code", None)
        hub = {key: value for key, value in kwargs.items() if key in HUB_OPTIONS}
        path = pretrained_model_name_or_path
        extractor_dict, _ = OmniFeatureExtractor.get_feature_extractor_dict(path, **hub)
        if "feature_extractor_type" in extractor_dict:
            extractor = OmniFeatureExtractor.from_dict(extractor_dict)
        else:
            config, _ = PreTrainedConfig.get_config_dict(path, **hub, _raise_exceptions_for_missing_entries=False)
            sound = config.get("sound_config") or {}
            extractor = OmniFeatureExtractor(
                feature_size=sound.get("num_mel_bins", 128), sampling_rate=sound.get("sampling_rate", 16000)
            )
        return [
            OmniImageProcessor.from_pretrained(path, **hub),
            OmniVideoProcessor.from_pretrained(path, **hub),
            extractor,
            AutoTokenizer.from_pretrained(path, trust_remote_code=False, **hub),  # None: a person is asked
        ]

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict, **kwargs):
        processor_dict = dict(processor_dict)
        template, released = processor_dict.get("chat_template"), None
        if isinstance(template, str) and "generation" not in template.replace("add_generation_prompt", ""):
            released = processor_dict.pop("chat_template")
        processor = super().from_args_and_dict(args, processor_dict, **kwargs)
        made = processor[0] if isinstance(processor, tuple) else processor
        made.released_chat_template = released
        return processor


HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
KINDS = {TYPE_IMAGE: "image", TYPE_VIDEO: "video", TYPE_AUDIO: "audio"}


def check_text(text: str, name: str, options: CallOptions) -> None:
    limit = (options.media_limits or default_limits()).max_text_chars
    if len(text) > limit:
        raise OmniInputError(
            f"{name}: has {len(text)} characters of text; limit {limit} (MediaLimits.max_text_chars); shorten it or "
            "raise it"
        )


def truncate(sample: Sample, max_length: int, index: int) -> None:
    """Cuts a sample's end off, never a media item."""
    if len(sample.input_ids) <= max_length:
        return
    if any(sample.types[max_length:]):
        raise OmniInputError(
            f"sample {index} has {len(sample.input_ids)} tokens; cutting it to max_length {max_length} would cut a "
            "media item: raise max_length, or lower max_media_tokens or num_frames"
        )
    for values in (sample.input_ids, sample.types, sample.is_label):
        del values[max_length:]


def register_auto_processors() -> None:
    """Makes transformers' Auto classes load released and saved folders with this package's code."""
    released = NemotronH_Nano_Omni_Reasoning_V3ImageProcessor
    AutoProcessor.register(OmniConfig, OmniProcessor, exist_ok=True)
    # the backend "released" is never chosen: it only makes the released class name known
    classes = {"torchvision": OmniImageProcessor, "pil": OmniImageProcessor, "released": released}
    AutoImageProcessor.register(OmniConfig, image_processor_classes=classes, exist_ok=True)
    AutoVideoProcessor.register(OmniConfig, OmniVideoProcessor, exist_ok=True)
    AutoFeatureExtractor.register(OmniConfig, OmniFeatureExtractor, exist_ok=True)


__all__ = ["OmniProcessor", "register_auto_processors"]
