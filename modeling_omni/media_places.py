"""Places of media in a batch: checked against the features that go there, and laid out for EVS (paper 4.6).

Shape legend: B batch, S tokens, T tubelets, R places per tubelet, D hidden size.
"""

import torch
import torch.nn.functional as F

from .configuration_omni import TYPE_VIDEO as VIDEO
from .media import OmniInputError
from .video_processing_omni import kept_tokens


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


__all__ = ["check_places", "evs_keep_indices", "reserve_kept_tokens"]
