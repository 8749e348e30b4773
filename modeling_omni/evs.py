"""Efficient Video Sampling (paper 4.6) and the places of media in a prompt.

EVS drops the tokens of a video that say what the tubelet before has said. How many stay is known from sizes alone, so
the prompt is laid out before the model runs: the first tubelet holds the placeholders of all tokens that stay, the
others hold none. Once the tokens are known the model moves them to their tubelets; the length never changes.

Shape legend: B batch, S tokens, T tubelets, R places per tubelet, D hidden size.
"""

import torch
import torch.nn.functional as F

from .configuration_omni import TYPE_VIDEO as VIDEO
from .configuration_omni import OmniConfig
from .media import OmniInputError


def kept_tokens(tubelets: int, tokens_per_tubelet: int, pruning_rate: float) -> int:
    """Tokens of a video after EVS: the share 1 - `pruning_rate`, but never less than its first tubelet."""
    return max(tokens_per_tubelet, int(tubelets * tokens_per_tubelet * (1 - pruning_rate)))


def evs_keep_indices(tokens_TRD: torch.Tensor, keep: int) -> torch.Tensor:
    """Efficient Video Sampling (paper 4.6): which tokens of one video stay.

    Every token is judged by its cosine dissimilarity to the token at the same place one tubelet earlier; the first
    tubelet always stays. Works at any aspect ratio: places are counted, never arranged.

    Args:
        tokens_TRD: projected tokens [tubelets, places per tubelet, D].
        keep: how many tokens stay, at least one tubelet's worth.

    Returns:
        [keep] indices into the flattened tokens, ascending (order of time).
    """
    tubelets, places, _ = tokens_TRD.shape
    if not places <= keep <= tubelets * places:
        raise OmniInputError(f"EVS can keep {places} to {tubelets * places} tokens of this video, not {keep}")
    tokens = tokens_TRD.float()
    dissimilarity = torch.full((tubelets, places), 255.0, device=tokens.device)
    dissimilarity[1:] = 1 - F.cosine_similarity(tokens[1:], tokens[:-1], dim=-1)
    return dissimilarity.flatten().argsort(descending=True, stable=True)[:keep].sort().values


def reserve_kept_tokens(inputs: dict[str, torch.Tensor], rate: float, merge_size: int) -> dict[str, torch.Tensor]:
    """A full-length batch -> the same batch laid out for EVS, as the processor does with `video_pruning_rate`.

    Of every video the placeholders of all tubelets but the first are cut, and those of the first become the K that
    stay. Ids, masks, token types and labels are shortened alike and padded on the left again.

    Args:
        inputs: `input_ids`, `attention_mask`, `mm_token_type_ids` [B, S] and, if there, `labels`; `video_grid_thw`.
        rate: share of video tokens to drop, in [0, 1).
    """
    grids = inputs["video_grid_thw"].cpu()
    video_tokens = (grids[:, 1] * grids[:, 2] // merge_size**2).tolist()
    keep = [kept_tokens(int(t), places, rate) for t, places in zip(grids[:, 0], video_tokens)]
    types = inputs["mm_token_type_ids"].cpu()
    check_places(types == VIDEO, (grids[:, 0] * torch.tensor(video_tokens)).tolist(), "video")
    orders, video = [], 0
    for row, mask in zip(types, inputs["attention_mask"].cpu().bool()):
        order, rest = [], mask.nonzero().flatten()
        places = rest[row[rest] == VIDEO]
        while len(places):
            full = int(grids[video, 0]) * video_tokens[video]
            own, places = places[:full], places[full:]
            order += [rest[rest < own[0]], own[: keep[video]]]
            rest = rest[(rest > own[-1]) | ((rest > own[0]) & (row[rest] != VIDEO))]
            video += 1
        orders.append(torch.cat([*order, rest]))
    length = max(map(len, orders))
    output = dict(inputs) | {"video_keep_tokens": torch.tensor(keep, device=inputs["input_ids"].device)}
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("mm_token_type_ids", 0), ("labels", -100)):
        if name in inputs:
            rows = [row[order.to(row.device)] for row, order in zip(inputs[name], orders)]
            output[name] = torch.stack([F.pad(row, (length - len(row), 0), value=fill) for row in rows])
    return output


def order_of_kept_tokens(
    input_ids: torch.Tensor,
    types: torch.Tensor,
    video_grid_thw: torch.Tensor,
    kept: list[torch.Tensor],
    config: OmniConfig,
) -> torch.Tensor:
    """The permutation that moves each kept token behind the `<img>` of its tubelet, [B, S].

    Args:
        input_ids, types: [B, S], where every video's placeholders stand in its first tubelet. types on the CPU.
        kept: for each video, what `evs_keep_indices` returned.

    Raises:
        OmniInputError: the prompt was not laid out for EVS.
    """
    ids = input_ids.cpu()
    starts = ((types == VIDEO) & (F.pad(types[:, :-1], (1, 0)) != VIDEO)).nonzero().tolist()
    if len(starts) != len(kept):
        raise OmniInputError(
            f"with EVS (video_keep_tokens) each video has one run of placeholders, in its first tubelet, but the "
            f"prompt has {len(starts)} runs for {len(kept)} video(s); give the processor video_pruning_rate as well"
        )
    order = torch.arange(ids.shape[1]).repeat(ids.shape[0], 1)
    merge = config.merge_size**2
    for (row, start), grid, index in zip(starts, video_grid_thw.tolist(), kept):
        per_tubelet = torch.bincount(index.cpu() // (grid[1] * grid[2] // merge), minlength=grid[0]).tolist()
        opens = (ids[row] == config.img_start_token_id).nonzero().flatten()
        opens = opens[opens >= start + len(index)][: grid[0] - 1].tolist()
        if len(opens) != grid[0] - 1:
            raise OmniInputError(
                f"a video of {grid[0]} tubelets with EVS needs {grid[0] - 1} empty <img></img> after its first "
                f"tubelet, the prompt has {len(opens)}; build prompts with OmniProcessor"
            )
        tokens = torch.arange(start, start + len(index)).split(per_tubelet)
        text = torch.arange(start + len(index), (opens[-1] if opens else start + len(index) - 1) + 1)
        text = text.tensor_split([p + 1 - start - len(index) for p in opens]) if opens else ()
        pieces = [tokens[0]]
        for label, part in zip(text, tokens[1:]):
            pieces += [label, part]
        moved = torch.cat(pieces)
        order[row, start : start + len(moved)] = moved
    return order


def check_places(is_place_BS: torch.Tensor, expected: list[int], modality: str) -> None:
    """Raises unless the runs of placeholders, in order, add up to every item's count at a run's end.

    Args:
        is_place_BS: [B, S] bool, on the CPU, True on the placeholders of one modality.
        expected: features of each item, in order of appearance.
    """
    following = F.pad(is_place_BS[:, 1:], (0, 1))
    run_ends = is_place_BS.flatten().cumsum(0)[(is_place_BS & ~following).flatten()].tolist()
    start, used = 0, 0
    for number, count in enumerate(expected):
        while used < len(run_ends) and run_ends[used] < start + count:
            used += 1
        if used == len(run_ends) or run_ends[used] != start + count:
            ends = [end for end in run_ends[max(used - 1, 0) : used + 1] if end > start]
            found = min(ends, key=lambda end: abs(end - start - count), default=start) - start
            raise OmniInputError(
                f"{modality} {number + 1} of {len(expected)}: its features need {count} placeholder tokens, the prompt "
                f"has {found}. Build prompts with OmniProcessor, and do not cut them inside a media item."
            )
        start += count
    if run_ends and run_ends[-1] != start:
        raise OmniInputError(
            f"the prompt has {run_ends[-1]} {modality} placeholder tokens but the {len(expected)} {modality} item(s) "
            f"given need {start}. Was an item left out?"
        )
