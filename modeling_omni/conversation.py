"""Conversations that go on: no medium is encoded twice, and the language model continues where the prefix allows.

Two stores, both bounded in bytes, the least recently used go first:

- features of media (tower, projector and EVS done), found by the content of what the tower would read;
- states of the language model, found by an exact prefix: the same token ids and, where media stand, the same content.

Keys and values of attention can be cropped to any prefix, the state of a Mamba layer cannot: it has no history. So
Mamba states are copied at two points of every turn: at the end of the user's turn, before the header of the answer, and
behind the last token of the answer. The second is where a conversation without reasoning goes on. The chat template
drops the reasoning of earlier turns, so after a thought the prompt of the next turn differs from its first word on, and
the first point is where it goes on: the answer, without its thought, is read again. An edited turn goes on from the
last point before it.

Shape legend: S tokens, L tokens of a prefix, B rows, D hidden size.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicCache

from .configuration_omni import TYPE_AUDIO, TYPE_IMAGE, TYPE_VIDEO
from .evs import evs_keep_indices, order_of_kept_tokens
from .feature_extraction_omni import clip_token_count
from .media import OmniInputError

MAX_BYTES = 2 * 1024**3  # of each store


@dataclass
class Medium:
    """One medium of a prompt: what its tower reads, and where its tokens stand."""

    kind: int  # TYPE_IMAGE, TYPE_VIDEO or TYPE_AUDIO
    start: int  # place of its first token
    tokens: int  # how many of them are its own (with EVS: those that stay)
    digest: bytes  # of all that its features depend on
    values: dict[str, torch.Tensor]  # inputs of the tower, this item's alone
    keep: int | None = None  # tokens of a video that stay with EVS


def digest_of(kind: int, *values) -> bytes:
    """Content hash of tensors and numbers, their shapes and dtypes included."""
    state = hashlib.blake2b(str(kind).encode(), digest_size=32)
    for value in values:
        if isinstance(value, torch.Tensor):
            state.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            state.update(f"{value!r} ".encode())
    return state.digest()


def media_of(inputs: dict[str, torch.Tensor], merge_size: int) -> list[Medium]:
    """The media of one encoded conversation, in order of their places.

    Args:
        inputs: of `OmniProcessor`, one row without padding.
    """
    types = inputs.get("mm_token_type_ids")
    if types is None:
        return []
    places = {kind: (types[0].cpu() == kind).nonzero().flatten().tolist() for kind in (1, 2, 3)}
    used = dict.fromkeys(places, 0)
    media = []

    def add(kind: int, tokens: int, digest: bytes, keep: int | None = None, **values) -> None:
        if len(places[kind]) < used[kind] + tokens:
            raise OmniInputError(
                f"the prompt has {len(places[kind])} places of media type {kind}, but {used[kind] + tokens} or more "
                "features come; pass everything that OmniProcessor returned"
            )
        media.append(Medium(kind, places[kind][used[kind]], tokens, digest, values, keep))
        used[kind] += tokens

    if "pixel_values" in inputs:
        grids = inputs["image_grid_thw"]
        counts = grids.prod(-1).tolist()
        for pixels, grid, count in zip(inputs["pixel_values"].split(counts), grids, counts):
            digest = digest_of(TYPE_IMAGE, pixels, grid.tolist())
            add(TYPE_IMAGE, count // merge_size**2, digest, pixel_values=pixels, image_grid_thw=grid[None])
    if "pixel_values_videos" in inputs:
        grids = inputs["video_grid_thw"]
        counts = grids.prod(-1).tolist()
        keep = inputs["video_keep_tokens"].tolist() if "video_keep_tokens" in inputs else [None] * len(grids)
        for pixels, grid, count, kept in zip(inputs["pixel_values_videos"].split(counts), grids, counts, keep):
            digest = digest_of(TYPE_VIDEO, pixels, grid.tolist(), kept)
            tokens = count // merge_size**2 if kept is None else kept
            add(TYPE_VIDEO, tokens, digest, kept, pixel_values_videos=pixels, video_grid_thw=grid[None])
    if "input_features" in inputs:
        features, mask = inputs["input_features"], inputs["input_features_mask"]
        clips = inputs["audio_clip_counts"].tolist() if "audio_clip_counts" in inputs else [1] * len(features)
        frames = mask.sum(-1)
        for sound, valid, own in zip(features.split(clips), mask.split(clips), frames.split(clips)):
            sound, valid = sound[:, : int(own.max())], valid[:, : int(own.max())]  # padding is not content
            digest = digest_of(TYPE_AUDIO, sound * valid[..., None], own.tolist())
            tokens = int(clip_token_count(own).sum())
            add(TYPE_AUDIO, tokens, digest, input_features=sound, input_features_mask=valid)
    return sorted(media, key=lambda medium: medium.start)


@dataclass
class Prefix:
    """What is kept of one conversation.

    Attributes:
        ids: [L] token ids, on the CPU. media: (start, digest) of every medium among them.
        keys_values: layer -> keys and values [1, heads, L, d].
        points: length of a prefix -> layer -> copies of (convolution state, Mamba state) behind it.
        turns: those of the points that end a user's turn.
    """

    scope: str
    ids: torch.Tensor
    media: list[tuple[int, bytes]]
    keys_values: dict[int, tuple[torch.Tensor, torch.Tensor]]
    points: dict[int, dict[int, tuple[torch.Tensor, torch.Tensor]]]
    turns: set[int] = field(default_factory=set)

    def common(self, ids: torch.Tensor, media: list[tuple[int, bytes]]) -> int:
        """Length of the prefix that this and another prompt have in common."""
        length = min(len(self.ids), len(ids))
        differs = (self.ids[:length] != ids[:length]).nonzero()
        length = int(differs[0]) if len(differs) else length
        for own, other in zip([*self.media, (length, b"")], [*media, (length, b"")]):
            if own != other:
                return min(length, own[0], other[0])
        return length

    @property
    def bytes(self) -> int:
        held = [*self.keys_values.values(), *(pair for point in self.points.values() for pair in point.values())]
        return sum(tensor.numel() * tensor.element_size() for pair in held for tensor in pair)


@dataclass
class Ready:
    """A prompt of which all but the last token has been read.

    Attributes:
        input_ids: [1, S], on the CPU. media: as in `Prefix`.
        cache: holds S - 1 tokens.
        cached: how many of them came out of the store.
        kept: what the store holds of this prompt; None where there is nothing to hold.
    """

    input_ids: torch.Tensor
    media: list[tuple[int, bytes]]
    cache: Cache
    cached: int
    scope: str
    kept: Prefix | None = None


class Interrupted(Exception):
    """`stopped` said so while the prompt was read."""


class ConversationCache:
    """What earlier requests left behind. One model, one thread at a time.

    Prefixes and media are found by nothing but their exact content, and only within their `scope` (a client, say), so
    that no one can learn from the time of an answer what others have asked or shown.

    Args:
        max_bytes: of prefixes: 30B-A3B in bfloat16 needs about 6 KiB a token and 50 MiB a point.
        max_media_bytes: of features of media: 5 KiB a token there.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, max_media_bytes: int = MAX_BYTES):
        self.max_bytes, self.max_media_bytes = max_bytes, max_media_bytes
        self.features: OrderedDict[tuple[str, bytes], tuple[torch.Tensor, torch.Tensor | None]] = OrderedDict()
        self.prefixes: list[Prefix] = []  # the most recently used last

    def clear(self) -> None:
        self.features.clear()
        self.prefixes.clear()

    def forget(self, scope: str) -> None:
        """Drops all that was kept for a scope."""
        for key in [key for key in self.features if key[0] == scope]:
            del self.features[key]
        self.prefixes = [prefix for prefix in self.prefixes if prefix.scope != scope]

    # -------------------------------------------------------------------------------------------- media

    def features_of(
        self, model, media: list[Medium], scopes: list[str]
    ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Features [tokens, D] of every medium, and which of a video's tokens stay with EVS (None without); towers run
        over those that are not known in their scope."""
        new = {}
        for kind, encode in (
            (TYPE_IMAGE, model.model.get_image_features),
            (TYPE_VIDEO, model.model.get_video_features),
            (TYPE_AUDIO, model.model.get_audio_features),
        ):
            pairs = ((scope, m) for scope, m in zip(scopes, media) if m.kind == kind)
            unknown = {(scope, m.digest): m for scope, m in pairs if (scope, m.digest) not in self.features}
            if unknown:
                new |= zip(unknown, encode_media(model, kind, list(unknown.values()), encode))
        keys = [(scope, medium.digest) for scope, medium in zip(scopes, media)]
        found = [new[key] if key in new else self.features[key] for key in keys]
        for key, features in zip(keys, found):
            self.features[key] = features
            self.features.move_to_end(key)
        held = sum(feature_bytes(features) for features in self.features.values())
        while held > self.max_media_bytes and self.features:
            held -= feature_bytes(self.features.popitem(last=False)[1])
        return found

    # -------------------------------------------------------------------------------------------- prefixes

    def find(self, scope: str, ids: torch.Tensor, media: list[tuple[int, bytes]]) -> tuple[Prefix | None, int]:
        """The longest kept point that the prompt begins with, and its length; at least one token is left to read."""
        best, length = None, 0
        for prefix in self.prefixes:
            if prefix.scope == scope:
                common = min(prefix.common(ids, media), len(ids) - 1)
                point = max((point for point in prefix.points if point <= common), default=0)
                if point > length:
                    best, length = prefix, point
        return best, length

    @torch.no_grad()
    def prefill(
        self,
        model,
        inputs: dict[str, torch.Tensor],
        prefill_chunk_size: int | None = None,
        scope: str = "",
        stopped: Callable[[], bool] = lambda: False,
    ) -> Ready:
        """Reads a prompt but for its last token, as far as it is not known, and keeps the point before its answer.

        Args:
            inputs: of `OmniProcessor`, one conversation, on any device (the CPU is best: only what is read is moved).
            stopped: asked between pieces of the prompt.

        Raises:
            Interrupted: `stopped` said so. OmniInputError: media and places do not fit.
        """
        config = model.config
        ids, media, keys, turn = read_prompt(model, inputs)
        known, cached = self.find(scope, ids, keys)
        cache = DynamicCache(config=config.llm_config)
        if known is not None:
            restore(cache, known, cached, config.llm_config.conv_kernel)
        left = [medium for medium in media if medium.start >= cached]
        embeds = embed_prompt(model, inputs, left, self.features_of(model, left, [scope] * len(left)), cached)
        points = {}
        for begin, end in ((cached, turn), (max(cached, turn), len(ids) - 1)):
            step = prefill_chunk_size or max(1, end - begin)
            for first in range(begin, end, step):
                if stopped():
                    raise Interrupted
                piece = embeds[:, first - cached : min(first + step, end) - cached]
                model.model(inputs_embeds=piece, past_key_values=cache, use_cache=True)
            if end == turn > cached:
                points[turn] = mamba_states(cache)
        ready = Ready(inputs["input_ids"].cpu(), keys, cache, cached, scope)
        if points or known is not None:
            self._keep(ready, known, ids[:-1], points, set(points))
        return ready

    @torch.no_grad()
    def prefill_all(
        self,
        model,
        prompts: list[tuple[dict[str, torch.Tensor], str]],
        prefill_chunk_size: int | None = None,
        stopped: list[Callable[[], bool]] | None = None,
    ) -> list[Ready | None]:
        """`prefill` of several prompts (inputs, scope): those of which nothing is known are read as one left-padded
        batch, their media too; the others one by one. None for a prompt whose `stopped` said so meanwhile; a batch
        stops when that of every prompt does."""
        stopped = stopped or [lambda: False] * len(prompts)
        groups: dict[int, list[int]] = {}  # tokens behind the user's turn -> prompts: their points lie side by side
        seen, read, ready = set(), [], {}
        for place, (inputs, scope) in enumerate(prompts):
            ids, media, keys, turn = read_prompt(model, inputs)
            read.append((ids, media, keys))
            content = (scope, ids.numpy().tobytes(), tuple(keys))  # the same again goes on from the first
            if turn and content not in seen and self.find(scope, ids, keys)[0] is None:
                groups.setdefault(len(ids) - 1 - turn, []).append(place)
            seen.add(content)
        for behind, places in groups.items():
            if len(places) > 1:
                chosen = [(*prompts[place], *read[place]) for place in places]
                asked = [stopped[place] for place in places]
                try:
                    ready |= zip(places, self._read_together(model, chosen, behind, prefill_chunk_size, asked))
                except Interrupted:
                    ready |= dict.fromkeys(places)
        for place, (inputs, scope) in enumerate(prompts):
            if place not in ready:
                try:
                    ready[place] = self.prefill(model, inputs, prefill_chunk_size, scope, stopped[place])
                except Interrupted:
                    ready[place] = None
        return [ready[place] for place in range(len(prompts))]

    def _read_together(self, model, prompts: list[tuple], behind: int, chunk: int | None, stopped: list) -> list[Ready]:
        """Unknown prompts (inputs, scope, ids, media, keys) with `behind` tokens between their last point and their
        last token."""
        config = model.config.llm_config
        every = [(medium, scope) for _, scope, _, media, _ in prompts for medium in media]
        features = iter(self.features_of(model, [m for m, _ in every], [s for _, s in every]))
        lengths = [len(ids) - 1 for _, _, ids, _, _ in prompts]
        longest = max(lengths)
        embeds, mask = [], torch.zeros(len(prompts), longest, dtype=torch.long, device=model.device)
        for row, (inputs, _, _, media, _) in enumerate(prompts):
            own = embed_prompt(model, inputs, media, [next(features) for _ in media], 0)[:, :-1]
            embeds.append(F.pad(own, (0, 0, longest - lengths[row], 0)))
            mask[row, longest - lengths[row] :] = 1
        embeds, cache, points = torch.cat(embeds), DynamicCache(config=config), {}
        for begin, end in ((0, longest - behind), (longest - behind, longest)):
            step = chunk or max(1, end - begin)
            for first in range(begin, end, step):
                if all(asked() for asked in stopped):
                    raise Interrupted
                last = min(first + step, end)
                piece, seen = embeds[:, first:last], mask[:, :last]
                model.model(inputs_embeds=piece, attention_mask=seen, past_key_values=cache, use_cache=True)
            if begin == 0:
                points = [mamba_states(cache, row) for row in range(len(prompts))]
        found = []
        for row, (inputs, scope, ids, _, keys) in enumerate(prompts):
            one = cache_row(cache, row, longest - lengths[row], config)
            found.append(Ready(inputs["input_ids"].cpu(), keys, one, 0, scope))
            turn = lengths[row] - behind
            self._keep(found[-1], None, ids[:-1], {turn: points[row]}, {turn})
        return found

    def finish(self, ready: Ready, sequence: torch.Tensor) -> None:
        """Keeps the state behind an answer.

        Args:
            sequence: [S + new] prompt and answer, as `generate` returned them for this one row.
        """
        read = int(ready.cache.get_seq_length())
        ids = sequence.flatten()[:read].cpu()
        if len(ids) == read and ready.kept is not None:
            self._keep(ready, ready.kept, ids, {read: mamba_states(ready.cache)}, set())

    def _keep(self, ready: Ready, known: Prefix | None, ids: torch.Tensor, points: dict, turns: set[int]) -> None:
        keys_values = {
            i: (layer.keys[:, :, : len(ids)], layer.values[:, :, : len(ids)])
            for i, layer in enumerate(ready.cache.layers)
            if getattr(layer, "keys", None) is not None
        }
        kept = Prefix(ready.scope, ids, ready.media, keys_values, points, turns)
        if known is not None:
            common = min(known.common(ids, ready.media), len(ids))
            kept.points = {n: states for n, states in known.points.items() if n <= common} | points
            kept.turns = {n for n in known.turns if n <= common} | turns
            if all(n <= common for n in known.turns):  # else it is a branch: the other one may still go on
                self.prefixes = [prefix for prefix in self.prefixes if prefix is not known]
        ready.kept = kept
        self.prefixes.append(kept)
        self._evict()

    def _evict(self) -> None:
        """Other conversations go first, then the oldest points of this one, then all of it."""
        while len(self.prefixes) > 1 and self.bytes > self.max_bytes:
            del self.prefixes[0]
        last = self.prefixes[-1]
        while len(last.points) > 2 and self.bytes > self.max_bytes:
            oldest = min(last.points)
            del last.points[oldest]
            last.turns.discard(oldest)
        if self.bytes > self.max_bytes:
            self.prefixes.clear()

    @property
    def bytes(self) -> int:
        return sum(prefix.bytes for prefix in self.prefixes)

    # -------------------------------------------------------------------------------------------- generation

    def generate(self, model, inputs: dict[str, torch.Tensor], prefill_chunk_size: int | None = None, **options):
        """`model.generate(**inputs, **options)` for one conversation, continued from what is known: [1, S + new].

        With `mtp_drafts` the draft head reads the prompt's last token and the answer alone, not the prompt.

        Raises:
            OmniInputError: several beams or answers are asked for.
        """
        config = options.get("generation_config") or model.generation_config
        for name in ("num_beams", "num_return_sequences"):
            if (options.get(name) or getattr(config, name, None) or 1) > 1:
                raise OmniInputError(f"a conversation goes on from one answer: {name} cannot be more than 1")
        ready = self.prefill(model, inputs, prefill_chunk_size)
        sequence = model.generate(**generate_inputs([ready], model.device), **options)
        self.finish(ready, sequence[0])
        return sequence


# ------------------------------------------------------------------------------------------------------ parts


def end_tokens(model) -> set[int]:
    """Ids that end a turn, of generation_config.json."""
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [] if ends is None else [ends])


def read_prompt(model, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[Medium], list, int]:
    """One encoded conversation -> its ids [S] on the CPU, its media, their (start, digest), and the length of the
    prefix that ends with the user's turn (0 where no turn ends)."""
    ids = inputs["input_ids"][0].cpu()
    if inputs["input_ids"].shape[0] != 1 or not bool(inputs["attention_mask"].all()):
        raise ValueError("a conversation is one row without padding")
    media = media_of(inputs, model.config.merge_size)
    ends = torch.isin(ids[:-1], torch.tensor(sorted(end_tokens(model)) or [-1])).nonzero()
    turn = int(ends[-1]) + 1 if len(ends) else 0  # behind the <|im_end|> of the user
    return ids, media, [(medium.start, medium.digest) for medium in media], turn


def embed_prompt(model, inputs, media: list[Medium], features: list[tuple], cached: int) -> torch.Tensor:
    """Embeddings [1, S - cached, D] of what is left to read of a prompt, the features of its media in their places."""
    ids = inputs["input_ids"][:, cached:].to(model.device)
    if not media:
        return model.model.embed_multimodal(ids)
    types = inputs["mm_token_type_ids"][:, cached:].to(model.device)
    names = {TYPE_IMAGE: "image_features", TYPE_VIDEO: "video_features", TYPE_AUDIO: "audio_features"}
    encoded = {
        name: torch.cat([tokens for (tokens, _), medium in zip(features, media) if medium.kind == kind])
        for kind, name in names.items()
        if any(medium.kind == kind for medium in media)
    }
    embeds = model.model.embed_multimodal(ids, types, **encoded)
    videos = [(kept, medium) for (_, kept), medium in zip(features, media) if medium.kind == TYPE_VIDEO]
    if any(kept is not None for kept, _ in videos):  # EVS: kept tokens move to their tubelets
        grids = torch.cat([medium.values["video_grid_thw"] for _, medium in videos]).cpu()
        order = order_of_kept_tokens(ids, types.cpu(), grids, [kept for kept, _ in videos], model.config)
        embeds = embeds.gather(1, order.to(model.device)[..., None].expand_as(embeds))
    return embeds


def encode_media(model, kind: int, media: list[Medium], encode: Callable) -> list[tuple]:
    """One run of a tower over several media -> (features, EVS indices) of each."""
    device = model.device
    if kind == TYPE_AUDIO:
        frames = max(medium.values["input_features"].shape[1] for medium in media)
        features, masks = (
            torch.cat([F.pad(own, (*padding, 0, frames - own.shape[1])) for own in (m.values[name] for m in media)])
            for name, padding in (("input_features", (0, 0)), ("input_features_mask", ()))
        )
        tokens = encode(features.to(device), masks.to(device))[0].split([medium.tokens for medium in media])
        return [(own.clone(), None) for own in tokens]
    values, grid = media[0].values  # the two names
    grids = torch.cat([medium.values[grid] for medium in media]).to(device)
    tokens = encode(torch.cat([medium.values[values] for medium in media]).to(device), grids)
    counts = (grids.prod(-1) // model.config.merge_size**2).tolist()
    found = []
    for medium, own, tubelets in zip(media, tokens.split(counts), grids[:, 0].tolist()):
        kept = None
        if medium.keep is not None:
            kept = evs_keep_indices(own.unflatten(0, (tubelets, -1)), medium.keep)
        # a copy, for a view would hold the features of all of them
        found.append((own.clone(), None) if kept is None else (own[kept], kept.cpu()))
    return found


def feature_bytes(features: tuple[torch.Tensor, torch.Tensor | None]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in features if tensor is not None)


def mamba_states(cache: Cache, row: int = 0) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Copies of a row's convolution and Mamba states, by layer."""
    rows = slice(row, row + 1)
    return {
        i: (layer.conv_states[0][rows].clone(), layer.recurrent_states[0][rows].clone())
        for i, layer in enumerate(cache.layers)
        if hasattr(layer, "conv_states")
    }


def restore(cache: DynamicCache, prefix: Prefix, length: int, conv_kernel: int) -> None:
    """Fills an empty cache with the first `length` tokens of a kept prefix; nothing of the prefix is shared that a
    model writes to."""
    for i, (conv, state) in prefix.points[length].items():
        cache.update_conv_state(conv, i, conv_kernel_size=conv_kernel)
        cache.update_recurrent_state(state, i)
    for i, (keys, values) in prefix.keys_values.items():
        cache.update(keys[:, :, :length], values[:, :, :length], i)


def cache_row(cache: Cache, row: int, padding: int, config) -> DynamicCache:
    """A copy of one row of a cache, without the padding on its left."""
    one = DynamicCache(config=config)
    for i, (conv, state) in mamba_states(cache, row).items():
        one.update_conv_state(conv, i, conv_kernel_size=config.conv_kernel)
        one.update_recurrent_state(state, i)
    for i, layer in enumerate(cache.layers):
        if getattr(layer, "keys", None) is not None:
            keys, values = (tensor[row : row + 1, :, padding:].clone() for tensor in (layer.keys, layer.values))
            one.update(keys, values, i)
    return one


def stack_caches(caches: list[Cache], config) -> DynamicCache:
    """Caches of single rows -> one of all, keys and values padded on the left to the longest."""
    if len(caches) == 1:
        return caches[0]
    stacked = DynamicCache(config=config)
    longest = max(int(cache.get_seq_length()) for cache in caches)
    for i, layers in enumerate(zip(*(cache.layers for cache in caches))):
        if hasattr(layers[0], "conv_states"):
            conv = torch.cat([layer.conv_states[0] for layer in layers])
            stacked.update_conv_state(conv, i, conv_kernel_size=config.conv_kernel)
            stacked.update_recurrent_state(torch.cat([layer.recurrent_states[0] for layer in layers]), i)
        elif getattr(layers[0], "keys", None) is not None:
            keys, values = (
                torch.cat([F.pad(own, (0, 0, longest - own.shape[2], 0)) for own in tensors])
                for tensors in zip(*((layer.keys, layer.values) for layer in layers))
            )
            stacked.update(keys, values, i)
    return stacked


def generate_inputs(ready: list[Ready], device, config=None, pad_token_id: int = 0) -> dict:
    """Prompts that were read but for their last token -> arguments of `generate`, one left-padded batch."""
    longest = max(row.input_ids.shape[1] for row in ready)
    ids = [F.pad(row.input_ids, (longest - row.input_ids.shape[1], 0), value=pad_token_id) for row in ready]
    masks = [F.pad(torch.ones_like(row.input_ids), (longest - row.input_ids.shape[1], 0)) for row in ready]
    return {
        "input_ids": torch.cat(ids).to(device),
        "attention_mask": torch.cat(masks).to(device),
        "past_key_values": stack_caches([row.cache for row in ready], config),
    }


__all__ = ["ConversationCache", "Interrupted", "end_tokens", "generate_inputs"]
