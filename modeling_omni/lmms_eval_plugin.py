"""Model plug-in of lmms-eval: `lmms-eval --model omni --model_args pretrained=nano --tasks ...`.

lmms-eval finds it by this package's entry point in the group `lmms_eval.models`; nothing of it has to be changed. It is
a chat model: a task's messages go through our processor as they are, with pictures, sounds and videos in their places,
and rows of like length run as one batch (`generation_rows.py`). What the model thinks is left out of the answer.

Tasks' "until" strings are not applied: the default, an empty line, would cut answers of several paragraphs, and the
model ends by itself. Tasks that ask for log-likelihoods or several rounds are refused. One process; `device=auto`
spreads a model over the GPUs there are.
"""

import logging

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from .batch_inference import BATCH_TOKENS, Prepared, batches_of
from .generation_rows import Row, generate_or_split, row_settings, row_text
from .inference import default_max_new_tokens, encode, load
from .media import OmniInputError

logger = logging.getLogger(__name__)


def manifest() -> ModelManifest:
    """What the entry point gives lmms-eval."""
    return ModelManifest(model_id="omni", chat_class_path=f"{__name__}.Omni", aliases=("nemotron_omni",))


def audio_source(source):
    """Sound as tasks hand it over (a path, {"array", "sampling_rate"}, or a decoder of `datasets`) -> ours."""
    if isinstance(source, dict) and source.get("array") is not None:
        return source["array"], source["sampling_rate"]
    if hasattr(source, "get_all_samples"):
        samples = source.get_all_samples()
        return samples.data.float().mean(0).numpy(), samples.sample_rate
    return source


def our_messages(messages: list[dict], system: str | None = None) -> list[dict]:
    """lmms-eval's messages, parts {"type", "text" or "url"} -> ours."""
    found = [{"role": "system", "content": system}] if system and messages[0]["role"] != "system" else []
    for message in messages:
        parts = []
        for part in message["content"]:
            kind = part["type"]
            if kind == "text":
                parts.append(part)
                continue
            item = {"type": kind, kind: audio_source(part["url"]) if kind == "audio" else part["url"]}
            for ours, theirs in (("start", "start_time"), ("end", "end_time")):
                if part.get(theirs) is not None:
                    item[ours] = part[theirs]
            parts.append(item)
        if message["role"] != "user":
            parts = "".join(part.get("text", "") for part in parts)
        found.append({"role": message["role"], "content": parts})
    return found


class Omni(lmms):
    """A checkpoint as lmms-eval asks it.

    Args (strings of `--model_args`, comma-separated):
        pretrained: "nano", a folder or a Hugging Face id. dtype, device, attn: of `inference.load`.
        batch_size, batch_tokens: rows, and prompt and new tokens, of a batch at most.
        enable_thinking: None takes the checkpoint's default. system_prompt: for messages without one.
        max_new_tokens: wins over the task's, as thoughts need more room than tasks allow for.
        reasoning_budget, reasoning_grace, seed: of `row_settings`.
        num_frames, fps, video_pruning_rate, max_media_tokens, use_audio_in_video: of `encode`.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "nano",
        dtype: str = "auto",
        device: str | None = "auto",
        attn: str | None = None,
        batch_size: int | str = 8,
        batch_tokens: int = BATCH_TOKENS,
        enable_thinking: bool | None = None,
        system_prompt: str | None = None,
        max_new_tokens: int | None = None,
        reasoning_budget: int | None = None,
        reasoning_grace: int | None = None,
        seed: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        video_pruning_rate: float | None = None,
        max_media_tokens: int | None = None,
        use_audio_in_video: bool | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self.model, self.processor = load(str(pretrained), str(dtype), device or "auto", attn)
        self.batch_size, self.batch_tokens = int(batch_size), int(batch_tokens)
        self.thinking, self.system, self.max_new_tokens = enable_thinking, system_prompt, max_new_tokens
        self.limits = {"reasoning_budget": reasoning_budget, "reasoning_grace": reasoning_grace, "seed": seed}
        self.media = {"num_frames": num_frames, "fps": fps, "video_pruning_rate": video_pruning_rate}
        self.media |= {"max_media_tokens": max_media_tokens, "use_audio_in_video": use_audio_in_video}

    def prepared(self, number: int, request: Instance) -> Prepared:
        """A request, encoded; what is wrong with it under "error"."""
        _, doc_to_messages, wanted, doc_id, task, split = request.args
        item = Prepared(str(number), {"id": number})
        try:
            messages = our_messages(doc_to_messages(self.task_dict[task][split][doc_id]), self.system)
            inputs = encode(self.model, self.processor, messages, self.thinking, device="cpu", **self.media)
            length = self.max_new_tokens or wanted.get("max_new_tokens") or default_max_new_tokens(self.model)
            sampling = {}
            if wanted.get("do_sample") is False:
                sampling["temperature"] = 0.0
            elif wanted.get("temperature") is not None:
                sampling = {"temperature": float(wanted["temperature"]), "top_p": wanted.get("top_p")}
            item.row = Row(inputs, **row_settings(self.model, int(length), **sampling, **self.limits)[0])
        except (OmniInputError, OSError, ValueError, KeyError, TypeError) as error:  # whatever is wrong with a document
            item.error = error
        return item

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests; "" and a line in the log where there is an error."""
        answers = [GenerationResult(text="") for _ in requests]
        window = 2 * self.batch_size
        for start in range(0, len(requests), window):
            own = range(start, min(start + window, len(requests)))
            items = [self.prepared(number, requests[number]) for number in own]
            for batch in batches_of([item for item in items if item.row], self.batch_tokens, self.batch_size):
                generate_or_split(self.model, self.processor, [item.row for item in batch])
            for number, item in zip(own, items):
                error = item.error or item.row.error
                if error is not None:
                    logger.error("document %s of %s: %s", requests[number].args[3], requests[number].args[4], error)
                    continue
                counts = TokenCounts(input_tokens=item.row.prompt_tokens, output_tokens=len(item.row.tokens))
                answers[number] = GenerationResult(row_text(self.processor, item.row)["answer"], counts)
                self.cache_hook.add_partial(
                    "generate_until", (requests[number].args[0], requests[number].args[2]), answers[number].text
                )
                item.row = None  # its tensors are not needed any more
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("this plug-in answers generate_until tasks; log-likelihoods are not implemented")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("this plug-in answers tasks of one round")


__all__ = ["Omni", "manifest"]
