"""The C-RADIO tower against transformers' native `radio` and calculations of our own; pixel shuffle."""

from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from einops import rearrange
from scipy.ndimage import map_coordinates
from torch import nn
from transformers import PreTrainedModel
from transformers.models.nemotron_h_omni.modeling_nemotron_h_omni import NemotronH_Omni_Reasoning_V3
from transformers.models.radio import RadioConfig, RadioModel

from modeling_omni import modeling_vision
from modeling_omni.configuration_omni import OmniVisionConfig
from modeling_omni.modeling_vision import OmniVisionModel, init_vision_weights, pixel_shuffle

PATCH, GRID, HIDDEN, LAYERS, PREFIX = 4, 8, 24, 3, 5
IMAGE_GRIDS = [(2, 6), (8, 8), (3, 7), (5, 1), (6, 2), (4, 3), (11, 9), (2, 6)]  # (8, 8) is the table, (11, 9) above it


def make_config(**changes):
    sizes = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "num_prefix_tokens": PREFIX,
        "patch_size": PATCH,
        "max_resolution": GRID * PATCH,
    }
    return OmniVisionConfig(**(sizes | changes))


def make_tower(seed=0, **changes):
    """A tower whose every parameter is random and large enough to matter (also norms and biases)."""
    torch.manual_seed(seed)
    tower = OmniVisionModel(make_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            nn.init.normal_(parameter, mean=1.0 if ".norm" in name and "weight" in name else 0.0, std=0.2)
    return tower


def native_from(tower):
    """transformers' RadioModel with the same weights; the conditioner is left out as in the released model."""
    c = tower.config
    native = RadioModel(
        RadioConfig(
            hidden_size=c.hidden_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            mlp_ratio=c.intermediate_size / c.hidden_size,
            patch_size=c.patch_size,
            max_img_size=c.max_resolution,
            num_cls_tokens=2,
            num_registers=c.num_prefix_tokens - 2,
            video_temporal_patch_size=c.video_temporal_patch_size,
            attn_implementation="eager",
        )
    ).eval()
    native.make_preprocessor_external()
    ours = tower.state_dict()
    state = {
        "embeddings.position_embedding": ours["patch_generator.pos_embed"],
        "embeddings.cls_register_token": ours["patch_generator.cls_token.token"],
        "embeddings.patch_projection.weight": ours["patch_generator.embedder.weight"],
        "embeddings.video_patch_projection.weight": ours["patch_generator.video_embedder.weight"],
    }
    for i in range(c.num_hidden_layers):
        for part in ("weight", "bias"):
            qkv = ours[f"blocks.{i}.attn.qkv.{part}"].chunk(3)
            for name, value in zip("qkv", qkv, strict=True):
                state[f"encoder.layer.{i}.attention.{name}_proj.{part}"] = value
            state[f"encoder.layer.{i}.attention.o_proj.{part}"] = ours[f"blocks.{i}.attn.proj.{part}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"encoder.layer.{i}.{name}.{part}"] = ours[f"blocks.{i}.{name}.{part}"]
    missing, unexpected = native.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("layer_scale" in name or name == "summary_idxs" for name in missing), missing
    return native


def image_batch(grids=IMAGE_GRIDS, seed=1):
    """Random images of the given patch grids -> images, packed patches, grid_thw."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(3, h * PATCH, w * PATCH, generator=generator) for h, w in grids]
    patches = [rearrange(x, "c (h p) (w q) -> (h w) (c p q)", p=PATCH, q=PATCH) for x in images]
    return images, torch.cat(patches), torch.tensor([(1, h, w) for h, w in grids])


def video_batch(grids=((3, 2, 6), (1, 5, 4), (2, 6, 2)), seed=2):
    """Random videos of t tubelets of two frames -> frames, packed patches, grid_thw."""
    generator = torch.Generator().manual_seed(seed)
    videos = [torch.randn(2 * t, 3, h * PATCH, w * PATCH, generator=generator) for t, h, w in grids]
    patches = [rearrange(x, "(t f) c (h p) (w q) -> (t h w) (f c p q)", f=2, p=PATCH, q=PATCH) for x in videos]
    return videos, torch.cat(patches), torch.tensor(grids)


def close(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# --- against transformers' native tower


@torch.no_grad()
def test_images_equal_native_dense_and_packed():
    tower = make_tower()
    native = native_from(tower)
    images, patches, grid = image_batch()
    features = tower(patches, grid)
    dense = torch.cat([native(image[None]).features[0] for image in images])
    assert features.std() > 0.3
    close(features, dense)
    close(features, native(patches, image_grid_hw=grid[:, 1:]).features)


@torch.no_grad()
def test_tubelets_equal_native():
    tower = make_tower()
    native = native_from(tower)
    videos, patches, grid = video_batch()
    features = tower(patches, grid, is_video=True)
    expected = []
    for video in videos:  # the native tower takes the two frames of a tubelet stacked along the channels
        stacked = video.reshape(-1, 6, *video.shape[-2:])
        expected.append(native(stacked).features.flatten(0, 1))
    close(features, torch.cat(expected))


@torch.no_grad()
@pytest.mark.parametrize("implementation", [None, "sdpa", "eager"])
def test_mixed_sizes_equal_one_by_one(implementation):
    tower = make_tower()
    tower.config._attn_implementation = implementation
    _, patches, grid = image_batch()
    one_by_one = [tower(part, row[None]) for part, row in zip(patches.split(grid.prod(-1).tolist()), grid, strict=True)]
    close(tower(patches, grid), torch.cat(one_by_one))


@torch.no_grad()
def test_items_do_not_see_each_other():
    tower = make_tower()
    _, patches, grid = image_batch()
    first = int(grid[0].prod())
    changed = patches.clone()
    changed[first:] = torch.randn_like(changed[first:]) * 3
    before, after = tower(patches, grid), tower(changed, grid)
    close(before[:first], after[:first])
    assert (before[first:] - after[first:]).abs().mean() > 0.1


@torch.no_grad()
def test_eager_equals_sdpa_and_flash_boundaries(monkeypatch):
    tower = make_tower()
    _, patches, grid = image_batch()
    sdpa = tower(patches, grid)
    tower.config._attn_implementation = "eager"
    close(tower(patches, grid), sdpa)

    def reference_varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal):  # flash's meaning, [N, H, K], in plain torch
        assert not causal and cu_q.dtype == cu_k.dtype == torch.int32
        assert max_q == max_k == int((cu_q[1:] - cu_q[:-1]).max())
        out = torch.empty_like(q)
        for a, b in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
            weights = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]).div(q.shape[-1] ** 0.5).softmax(-1)
            out[a:b] = torch.einsum("hqk,khd->qhd", weights, v[a:b])
        return out

    tower.config._attn_implementation = "flash_attention_2"
    monkeypatch.setattr(modeling_vision, "load_flash_varlen", lambda implementation: reference_varlen)
    close(tower(patches, grid), sdpa)


def test_attention_choice_errors():
    tower = make_tower()
    _, patches, grid = image_batch()
    tower.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="flex_attention"):
        tower(patches, grid)
    if not any(find_spec(name) for name in ("flash_attn", "kernels")):
        tower.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ImportError, match="flash-attn"):
            tower(patches, grid)


# --- positions


def bilinear_numpy(table, side):
    """[G, G, D] -> [side, side, D], half-pixel centres, edges held."""
    at = np.clip((np.arange(side) + 0.5) * table.shape[0] / side - 0.5, 0, table.shape[0] - 1)
    ys, xs = np.meshgrid(at, at, indexing="ij")
    return np.stack([map_coordinates(table[..., d], [ys, xs], order=1) for d in range(table.shape[-1])], axis=-1)


@torch.no_grad()
@pytest.mark.parametrize(("h", "w"), [(2, 6), (6, 2), (5, 5), (8, 8), (8, 3), (11, 9), (1, 13), (1, 1)])
def test_positions_equal_scipy(h, w):
    generator = make_tower().patch_generator
    table = generator.pos_embed[0].view(GRID, GRID, HIDDEN).double().numpy()
    expected = bilinear_numpy(table, max(h, w))[:h, :w].reshape(h * w, HIDDEN)
    actual = generator.grid_positions({(h, w), (4, 7)})[h, w]
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-6)
    if max(h, w) == GRID:
        assert torch.equal(actual.view(h, w, -1), generator.pos_embed.view(GRID, GRID, -1)[:h, :w])


@torch.no_grad()
def test_random_windows_follow_cpe():
    generator = make_tower().patch_generator
    n, h, w = 600, 3, 5
    y, x = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    generator.pos_embed.zero_()
    generator.pos_embed[0, :, 0] = x.flatten() / (GRID - 1.0)  # the table tells where it was sampled
    generator.pos_embed[0, :, 1] = y.flatten() / (GRID - 1.0)
    seen = generator.window_positions(n, h, w).view(n, h, w, HIDDEN)
    x, y = seen[..., 0], seen[..., 1]
    close(x, x[:, :1].expand_as(x), 1e-5)  # columns and rows of an axis-parallel, evenly sampled window
    close(y, y[:, :, :1].expand_as(y), 1e-5)
    close(x.diff(dim=2, n=2), torch.zeros(n, h, w - 2), 1e-5)
    assert x.min() >= -1e-5 and x.max() <= 1 + 1e-5 and y.min() >= -1e-5 and y.max() <= 1 + 1e-5
    width, height = x[:, 0, -1] - x[:, 0, 0], y[:, -1, 0] - y[:, 0, 0]
    unclamped = (width < 0.999) & (height < 0.999)
    aspect, area = (width / height).sqrt()[unclamped], (width * height)[unclamped]
    assert 0.75 - 1e-3 <= aspect.min() < 0.8 and 1.25 < aspect.max() <= 4 / 3 + 1e-3
    assert 0.1 - 1e-3 <= area.min() < 0.12 and area.max() > 0.8
    assert x[:, 0, 0].std() > 0.1  # windows start anywhere


def test_windows_only_in_training_and_when_asked():
    tower = make_tower()
    _, patches, grid = image_batch()
    expected = tower(patches, grid)
    tower.train()
    assert tower.force_cpe_eval_mode
    close(tower(patches, grid), expected)
    tower.force_cpe_eval_mode = False
    first, second = tower(patches, grid), tower(patches, grid)
    sizes = grid.prod(-1).tolist()
    for item, a, b in zip(grid.tolist(), first.split(sizes), second.split(sizes), strict=True):
        if item == [1, GRID, GRID]:
            close(a, b)  # a grid of the table's size takes the table
        else:
            assert (a - b).abs().max() > 1e-2
    first.square().mean().backward()
    assert tower.patch_generator.pos_embed.grad.abs().sum() > 0
    tower.eval()
    close(tower(patches, grid), expected)


# --- passes, gradients, dtypes, construction


@pytest.mark.parametrize("limit", [1, 40, 100])
def test_micro_batches_equal_single_pass(limit):
    tower = make_tower()
    passes = []
    tower.patch_generator.register_forward_hook(lambda module, args, out: passes.append(args[0].shape[0]))
    for is_video, (_, patches, grid) in ((False, image_batch()), (True, video_batch())):
        largest_item = int(grid[:, 1:].prod(-1).max())
        results = []
        for max_patches in (128 * 1024, limit):
            tower.max_patches_per_pass = max_patches
            passes.clear()
            tower.zero_grad()
            features = tower(patches, grid, is_video=is_video)
            features.square().sum().backward()
            results.append((features, tower.blocks[0].attn.qkv.weight.grad.clone()))
        assert sum(passes) == len(patches) and max(passes) <= max(limit, largest_item)
        assert len(passes) > 1 or limit >= len(patches)
        close(results[1][0], results[0][0])
        close(results[1][1] / results[0][1].abs().max(), results[0][1] / results[0][1].abs().max())


def test_gradients_equal_native():
    tower = make_tower()
    native = native_from(tower)
    _, patches, grid = image_batch()
    weight = torch.randn(len(patches), HIDDEN)
    (tower(patches, grid) * weight).sum().backward()
    (native(patches, image_grid_hw=grid[:, 1:]).features * weight).sum().backward()
    pairs = [
        (tower.patch_generator.pos_embed, native.embeddings.position_embedding),
        (tower.patch_generator.cls_token.token, native.embeddings.cls_register_token),
        (tower.patch_generator.embedder.weight, native.embeddings.patch_projection.weight),
        (tower.blocks[0].mlp.fc1.weight, native.encoder.layer[0].mlp.fc1.weight),
    ]
    for ours, theirs in pairs:
        close(ours.grad / theirs.grad.abs().max(), theirs.grad / theirs.grad.abs().max(), 1e-4)
    assert tower.patch_generator.video_embedder.weight.grad is None


class Parent(PreTrainedModel):
    config: OmniVisionConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = OmniVisionModel(config)
        self.post_init()

    def _init_weights(self, module):
        init_vision_weights(module, self.config)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_a_parent_model(use_reentrant):
    torch.manual_seed(0)
    parent = Parent(make_config()).train()
    tower = parent.vision_model
    calls = []
    tower.blocks[1].mlp.fc1.register_forward_hook(lambda *args: calls.append(1))
    _, patches, grid = image_batch()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            parent.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        tower.zero_grad()
        tower(patches, grid).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None})
    assert len(calls) == 3  # once, then forward and recomputation
    trained = dict(tower.named_parameters()).keys() - {"patch_generator.video_embedder.weight"}
    assert gradients[0].keys() == gradients[1].keys() == trained
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient)


def test_initialisation_by_a_parent_model_and_reload(tmp_path):
    torch.manual_seed(0)
    parent = Parent(make_config(hidden_size=48))
    tower = parent.vision_model
    for name, parameter in tower.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".norm" in name:
            assert (parameter == 1).all(), name
        else:  # 0.02 cut at two sigma has std 0.0176
            assert 0.015 < parameter.std() < 0.021 and parameter.abs().max() <= 0.04, name
    conditioner = tower.input_conditioner
    assert conditioner.norm_mean.shape == conditioner.norm_std.shape == (3, 1, 1)
    assert conditioner.norm_mean.flatten().tolist() == pytest.approx(tower.config.norm_mean)
    assert conditioner.norm_std.flatten().tolist() == pytest.approx(tower.config.norm_std)
    parent.save_pretrained(tmp_path)
    again = Parent.from_pretrained(tmp_path)  # built on the meta device, then loaded
    for name, value in parent.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    # what a checkpoint lacks is initialised, not left as memory happened to be
    del parent.vision_model.input_conditioner.norm_mean
    parent.save_pretrained(tmp_path)
    again = Parent.from_pretrained(tmp_path)
    assert again.vision_model.input_conditioner.norm_mean.flatten().tolist() == pytest.approx(tower.config.norm_mean)


@torch.no_grad()
def test_bfloat16_and_autocast_stay_near_float32():
    tower = make_tower()
    _, patches, grid = image_batch()
    expected = tower(patches, grid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = tower(patches, grid)
    assert autocast.dtype == torch.float32  # the residual stream keeps the dtype of the parameters
    assert (autocast - expected).norm() < 0.03 * expected.norm()
    bf16 = tower.bfloat16()(patches, grid)
    assert bf16.dtype == torch.bfloat16
    assert (bf16.float() - expected).norm() < 0.03 * expected.norm()


def test_released_names_and_size():
    with torch.device("meta"):
        tower = OmniVisionModel(OmniVisionConfig())
    state = {name: tuple(value.shape) for name, value in tower.state_dict().items()}
    expected = {
        "input_conditioner.norm_mean": (3, 1, 1),
        "input_conditioner.norm_std": (3, 1, 1),
        "patch_generator.pos_embed": (1, 16384, 1280),
        "patch_generator.cls_token.token": (10, 1280),
        "patch_generator.embedder.weight": (1280, 768),
        "patch_generator.video_embedder.weight": (1280, 1536),
    }
    block = {"norm1": 1280, "norm2": 1280, "attn.qkv": (3840, 1280), "attn.proj": (1280, 1280)}
    block |= {"mlp.fc1": (5120, 1280), "mlp.fc2": (1280, 5120)}
    for i in range(32):
        for name, shape in block.items():
            shape = shape if isinstance(shape, tuple) else (shape,)
            expected[f"blocks.{i}.{name}.weight"] = shape
            expected[f"blocks.{i}.{name}.bias"] = shape[:1]
    assert state == expected
    assert len(state) == 390
    assert sum(value.numel() for value in tower.state_dict().values()) == 653_611_526
    assert tower.input_conditioner.norm_mean.dtype == torch.float32


def test_wrong_and_empty_inputs():
    tower = make_tower()
    _, patches, grid = image_batch()
    with pytest.raises(ValueError, match="needs"):
        tower(patches[1:], grid)
    with pytest.raises(ValueError, match="video patches"):
        tower(patches, grid, is_video=True)
    with pytest.raises(ValueError, match="without patches"):
        tower(patches[:0], torch.tensor([[1, 0, 4]]))
    assert tower(patches[:0], grid[:0]).shape == (0, HIDDEN)
    with pytest.raises(ValueError, match="separate_video_embedder"):
        OmniVisionModel(make_config(separate_video_embedder=False))


# --- pixel shuffle


def test_pixel_shuffle_equals_einops_and_native():
    grids = [(1, 4, 6), (1, 2, 2), (3, 6, 4), (1, 4, 6), (1, 4, 6)]
    features = torch.randn(sum(t * h * w for t, h, w in grids), 5)
    native = partial(NemotronH_Omni_Reasoning_V3.pixel_shuffle, None)
    squares = "(t h dy w dx) c -> (t h w) (dy dx c)"
    by_einops, by_native = [], []
    for (t, h, w), part in zip(grids, features.split([t * h * w for t, h, w in grids]), strict=True):
        by_einops.append(rearrange(part.numpy(), squares, h=h // 2, w=w // 2, dy=2, dx=2))
        by_native.append(native(part.view(t, h, w, 5)).flatten(0, 2))
    merged = pixel_shuffle(features, torch.tensor(grids))
    np.testing.assert_array_equal(merged.numpy(), np.concatenate(by_einops))
    assert torch.equal(merged, torch.cat(by_native))


def test_pixel_shuffle_order_and_errors():
    merged = pixel_shuffle(torch.arange(8.0)[:, None], torch.tensor([[1, 2, 4]]))
    assert merged.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]  # top-left, top-right, bottom-left, bottom-right
    assert pixel_shuffle(torch.zeros(9, 2), torch.tensor([[1, 3, 3]]), merge_size=3).shape == (1, 18)
    assert pixel_shuffle(torch.zeros(0, 2), torch.zeros(0, 3, dtype=torch.long)).shape == (0, 8)
    with pytest.raises(ValueError, match="3x4"):
        pixel_shuffle(torch.zeros(12, 2), torch.tensor([[1, 3, 4]]))
    with pytest.raises(ValueError, match="features"):
        pixel_shuffle(torch.zeros(12, 2), torch.tensor([[1, 2, 4]]))
