"""Audio front end and tower against transformers' Parakeet, torchaudio and scipy."""

import copy
import functools

import numpy as np
import pytest
import scipy.signal
import torch
import torchaudio
from torch.utils.checkpoint import checkpoint
from transformers.models.parakeet import ParakeetEncoder, ParakeetEncoderConfig, ParakeetFeatureExtractor

from modeling_omni.configuration_omni import OmniAudioConfig
from modeling_omni.feature_extraction_omni import (
    OmniFeatureExtractor,
    clip_sample_counts,
    clip_token_count,
    mel_filterbank,
    num_audio_tokens,
)
from modeling_omni.media import OmniInputError
from modeling_omni.modeling_audio import OmniAudioModel, init_audio_weights, plan_passes

RATE = 16000
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_kernel_size": 9,
    "subsampling_conv_channels": 8,
    "num_mel_bins": 128,
    "convolution_bias": False,
    "attention_bias": False,
    "scale_input": False,
}


def build_tower(**changes) -> OmniAudioModel:
    torch.manual_seed(0)
    config = OmniAudioConfig(**SIZES | changes)
    tower = OmniAudioModel(config).eval()
    init_audio_weights(tower, config)
    for block in tower.layers:  # statistics that are not the identity
        block.conv.norm.running_mean.normal_(std=0.3)
        block.conv.norm.running_var.uniform_(0.5, 2)
        for bias in (block.self_attn.bias_u, block.self_attn.bias_v):
            bias.data.normal_(std=0.5)
    return tower


def build_native(tower: OmniAudioModel, **changes) -> ParakeetEncoder:
    native = ParakeetEncoder(ParakeetEncoderConfig(**SIZES | changes)).eval()
    missing, unexpected = native.load_state_dict(tower.state_dict(), strict=False)
    assert not missing
    assert set(unexpected) == {"feature_extractor.featurizer.fb", "feature_extractor.featurizer.window"}
    return native


@pytest.fixture(scope="module")
def tower():
    return build_tower()


@pytest.fixture(scope="module")
def native(tower):
    return build_native(tower)


def make_clips(frames: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(max(frames)) < torch.tensor(frames)[:, None]
    features = torch.randn(len(frames), max(frames), 128, generator=torch.Generator().manual_seed(seed))
    return features * mask[..., None], mask


def speechlike(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    tone = np.sin(2 * np.pi * (200 + 80 * np.sin(3 * t)) * t) * (0.5 + 0.5 * np.sin(5 * t))
    return (0.3 * tone + 0.01 * rng.standard_normal(len(t))).astype(np.float32)


# ---------------------------------------------------------------------------------------------------- token counts


@pytest.mark.parametrize("seconds, tokens", [(1, 13), (5, 63), (10, 125), (30, 375), (60, 750), (600, 7500), (35, 438)])
def test_golden_token_counts(seconds, tokens):
    assert num_audio_tokens(seconds * RATE) == tokens


def test_clip_cutting():
    assert clip_sample_counts(35 * RATE) == [30 * RATE, 5 * RATE]
    assert clip_sample_counts(30 * RATE) == [30 * RATE]
    assert clip_sample_counts(30 * RATE + 1) == [30 * RATE, 1600]  # a remainder is padded to 0.1 s
    assert clip_sample_counts(1) == [1600]
    assert clip_token_count(torch.tensor([100, 10, 3000])).tolist() == [13, 2, 375]


# ------------------------------------------------------------------------------------------------------- front end


def test_mel_filterbank_against_torchaudio():
    theirs = torchaudio.functional.melscale_fbanks(257, 0.0, 8000.0, 128, RATE, norm="slaney", mel_scale="slaney")
    torch.testing.assert_close(mel_filterbank(128, 512, RATE), theirs.T, rtol=1e-3, atol=1e-6)


def test_features_match_parakeet_extractor():
    audios = [speechlike(seconds, i) for i, seconds in enumerate((3.337, 0.1, 30.0, 0.77))]
    ours = OmniFeatureExtractor()(audios, sampling_rate=RATE)
    theirs = ParakeetFeatureExtractor(feature_size=128)(audios, sampling_rate=RATE, return_tensors="pt")
    # Theirs keeps the physical frame 1 + L // 160 as an always masked column; the valid frames are the same.
    assert theirs["input_features"].shape[1] == ours["input_features"].shape[1] + 1 == 3001
    assert torch.equal(theirs["attention_mask"][:, :-1].bool(), ours["input_features_mask"])
    assert not theirs["attention_mask"][:, -1].any()
    torch.testing.assert_close(ours["input_features"], theirs["input_features"][:, :-1], rtol=0, atol=1e-4)
    assert ours["input_features_mask"].sum(-1).tolist() == [333, 10, 3000, 77]
    assert not ours["input_features"][~ours["input_features_mask"]].any()
    assert ours["input_features"].dtype == torch.float32 and ours["input_features_mask"].dtype == torch.bool


def test_features_against_scipy():
    audio = speechlike(1.5).astype(np.float64)
    emphasised = np.append(audio[0], audio[1:] - 0.97 * audio[:-1])
    window = np.zeros(512)
    window[56:456] = scipy.signal.get_window("hann", 400, fftbins=False)
    transform = scipy.signal.ShortTimeFFT(window, hop=160, fs=RATE, mfft=512)
    power = np.abs(transform.stft(emphasised, p0=0, p1=150)) ** 2  # slice p is centred on sample 160 p, zeros outside
    log_mel = np.log(mel_filterbank(128, 512, RATE).double().numpy() @ power + 2.0**-24).T
    expected = (log_mel - log_mel.mean(0)) / (log_mel.std(0, ddof=1) + 1e-5)
    ours = OmniFeatureExtractor()(audio, sampling_rate=RATE)["input_features"][0]
    np.testing.assert_allclose(ours.numpy(), expected, atol=2e-3)


def test_long_audio_is_cut_into_independent_clips(monkeypatch):
    long, short = speechlike(65), torch.from_numpy(speechlike(0.02))
    extractor = OmniFeatureExtractor()
    batch = extractor([long, short, long[: 30 * RATE]], sampling_rate=RATE)
    assert batch["audio_clip_counts"].tolist() == [3, 1, 1]
    assert batch["input_features_mask"].sum(-1).tolist() == [3000, 3000, 500, 10, 3000]
    assert torch.equal(batch["input_features"][0], batch["input_features"][4])
    alone = extractor(long[60 * RATE :])["input_features"][0]
    torch.testing.assert_close(batch["input_features"][2, :500], alone, rtol=0, atol=1e-5)
    tokens = clip_token_count(batch["input_features_mask"].sum(-1))
    assert tokens[:3].sum() == num_audio_tokens(len(long)) == 375 + 375 + 63
    monkeypatch.setattr("modeling_omni.feature_extraction_omni.SAMPLES_PER_PASS", 1)
    one_by_one = extractor([long, short, long[: 30 * RATE]])
    torch.testing.assert_close(one_by_one["input_features"], batch["input_features"], rtol=0, atol=1e-5)


def test_silence_is_finite():
    features = OmniFeatureExtractor()(np.zeros(RATE, np.float32))["input_features"]
    assert features.isfinite().all() and features.abs().max() < 1


@pytest.mark.parametrize(
    "audio, rate, message",
    [
        (np.zeros(100, np.float32), 44100, "44100 Hz"),
        (np.array([0, np.nan, 0], np.float32), RATE, "NaN"),
        (torch.tensor([0.0, float("-inf")]), RATE, "infinite"),
        (np.zeros(0, np.float32), RATE, "empty"),
        (np.zeros((2, 100), np.float32), RATE, "mono"),
        (np.zeros(100, np.int16), RATE, "int16"),
        ([], RATE, "no audio"),
    ],
)
def test_bad_audio_is_refused(audio, rate, message):
    with pytest.raises(OmniInputError, match=message):
        OmniFeatureExtractor()(audio, sampling_rate=rate)


def test_other_forms_that_transformers_extractors_take():
    wave = speechlike(1)
    expected = OmniFeatureExtractor()(wave)["input_features"]
    assert torch.equal(OmniFeatureExtractor()(raw_speech=[float(x) for x in wave])["input_features"], expected)
    assert torch.equal(OmniFeatureExtractor()(wave, padding=True)["input_features"], expected)


def test_extractor_saves_and_loads(tmp_path):
    OmniFeatureExtractor(feature_size=80, clip_seconds=10.0).save_pretrained(tmp_path)
    loaded = OmniFeatureExtractor.from_pretrained(tmp_path)
    batch = loaded(speechlike(12), return_tensors="np")
    assert batch["input_features"].shape == (2, 1000, 80)
    assert loaded.to_dict() == OmniFeatureExtractor(feature_size=80, clip_seconds=10.0).to_dict()


# ----------------------------------------------------------------------------------------------------------- tower


@pytest.mark.parametrize("frames", [10, 11, 64, 100, 3000])
def test_single_clip_matches_parakeet(tower, native, frames):
    features, mask = make_clips([frames])
    with torch.no_grad():
        hidden, counts = tower(features, mask)
        expected = native(features, mask).last_hidden_state
    assert counts.tolist() == [hidden.shape[1]] == [clip_token_count(frames)]
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_batch_equals_single_clips_and_parakeet(tower, native, attention):
    tower = copy.deepcopy(tower)
    tower.config._attn_implementation = attention
    frames = [700, 10, 333, 699, 51, 17]
    features, mask = make_clips(frames)
    garbage = torch.where(mask[..., None], features, 1e4)  # what stands in the padding must not matter
    with torch.no_grad():
        expected = native(features, mask).last_hidden_state
        for max_frames in (10**6, 1400, 1):
            tower.max_frames_per_pass = max_frames
            hidden, counts = tower(garbage, mask)
            assert hidden.shape == expected.shape and hidden.isfinite().all()
            for i, n in enumerate(frames):
                single, _ = tower(features[i : i + 1, :n], mask[i : i + 1, :n])
                torch.testing.assert_close(hidden[i, : counts[i]], single[0], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(hidden[i, : counts[i]], expected[i, : counts[i]], rtol=1e-4, atol=1e-5)
                assert not hidden[i, counts[i] :].any()


def test_passes_are_bounded_and_waste_little():
    frames = [3000] * 20 + [50, 100, 20, 90, 1600, 3000]
    groups = plan_passes(frames, 48000)
    assert sorted(i for group in groups for i in group) == list(range(len(frames)))
    assert max(len(group) * max(frames[i] for i in group) for group in groups) <= 48000
    assert all(2 * min(frames[i] for i in group) >= max(frames[i] for i in group) for group in groups)
    assert plan_passes([5000], 3000) == [[0]]


def test_extra_passes_change_nothing(tower):
    features, mask = make_clips([40, 200])
    calls = []
    hook = tower.subsampling.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        hidden, _ = tower(features, mask)
        again, _ = tower(features, mask, min_passes=5)
    hook.remove()
    assert len(calls) == 2 + 5
    assert torch.equal(hidden, again)


def test_no_clips(tower):
    hidden, counts = tower(torch.zeros(0, 0, 128), torch.zeros(0, 0, dtype=torch.bool))
    assert hidden.shape == (0, 0, 32) and counts.shape == (0,)


@pytest.mark.parametrize(
    "changes",
    [{"attention_bias": True, "convolution_bias": True}, {"subsampling_factor": 4, "num_mel_bins": 80}],
    ids=["biases", "factor 4"],
)
def test_other_configs_match_parakeet(changes):
    tower = build_tower(**changes)
    for name, parameter in tower.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.2)
    native = build_native(tower, **changes)
    features, mask = make_clips([120, 35])
    features = features[..., : tower.config.num_mel_bins]
    with torch.no_grad():
        hidden, counts = tower(features, mask)
        expected = native(features, mask).last_hidden_state
    for i in range(2):
        torch.testing.assert_close(hidden[i, : counts[i]], expected[i, : counts[i]], rtol=1e-4, atol=1e-5)


def test_released_names_and_shapes():
    with torch.device("meta"):
        state = OmniAudioModel(OmniAudioConfig()).state_dict()
    assert len(state) == 710
    assert sum(tensor.numel() for tensor in state.values()) == 608_962_088
    assert state["feature_extractor.featurizer.fb"].shape == (1, 128, 257)
    assert state["feature_extractor.featurizer.window"].shape == (400,)
    assert state["subsampling.layers.6.weight"].shape == (256, 256, 1, 1)
    assert state["subsampling.linear.weight"].shape == (1024, 4096)
    assert state["layers.23.conv.pointwise_conv1.weight"].shape == (2048, 1024, 1)
    assert state["layers.0.self_attn.bias_u"].shape == (8, 128)


def test_meta_model_is_initialised_after_to_empty():
    config = OmniAudioConfig(**SIZES)
    with torch.device("meta"):
        tower = OmniAudioModel(config)
    tower.to_empty(device="cpu")
    for tensor in tower.state_dict().values():
        tensor.fill_(7)
    init_audio_weights(tower, config)
    featurizer = tower.feature_extractor.featurizer
    assert torch.equal(featurizer.fb[0], mel_filterbank(128, 512, RATE))
    assert torch.equal(featurizer.window, torch.hann_window(400, periodic=False))
    assert not any((tensor == 7).all() for tensor in tower.state_dict().values())


def test_initialisation_spares_loaded_weights_and_other_modules():
    tower, other = build_tower(), torch.nn.Linear(4, 4)
    loaded, fresh = tower.subsampling.linear.weight, tower.layers[0].feed_forward1.linear1.weight
    loaded._is_hf_initialized = True  # how transformers marks what came from a checkpoint
    before = [loaded.clone(), other.weight.clone(), fresh.clone()]
    for module in (other, torch.nn.Sequential(tower, other), tower):
        init_audio_weights(module, tower.config)
    assert torch.equal(loaded, before[0]) and torch.equal(other.weight, before[1])
    assert not torch.equal(fresh, before[2])


def test_initialisation_keeps_the_signal():
    config = OmniAudioConfig(**SIZES | {"hidden_size": 144, "subsampling_conv_channels": 32})
    torch.manual_seed(0)
    tower = OmniAudioModel(config)
    init_audio_weights(tower, config)
    features, mask = make_clips([200] * 4)
    stem = tower.subsampling(features, None)
    assert 0.3 < stem.std() < 5  # about 1e-7 with std 0.02 everywhere
    hidden, _ = tower(features, mask)
    hidden.square().mul(torch.randn_like(hidden)).mean().backward()
    first = tower.subsampling.layers[0].weight.grad.norm()
    last = tower.layers[-1].feed_forward2.linear2.weight.grad.norm()
    assert first > 0.01 * last > 0


# -------------------------------------------------------------------------------------------------------- training


def gradients(tower: OmniAudioModel, features, mask) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tower.zero_grad()
    hidden, _ = tower(features, mask)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden * weight).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in tower.named_parameters()}


def test_gradients_match_parakeet(tower, native):
    features, mask = make_clips([150, 80, 149])
    hidden, ours = gradients(copy.deepcopy(tower).train(), features, mask)
    native = copy.deepcopy(native)
    output = native(features, mask).last_hidden_state
    valid = torch.arange(output.shape[1]) < clip_token_count(mask.sum(-1))[:, None]
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (output * weight * valid[..., None]).sum().backward()
    theirs = dict(native.named_parameters())
    assert set(ours) == set(theirs)
    for name, gradient in ours.items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, theirs[name].grad, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(tower, reentrant):
    features, mask = make_clips([150, 30])
    tower = copy.deepcopy(tower).train()
    hidden, plain = gradients(tower, features, mask)
    for module in (tower.subsampling, *tower.layers):
        module.gradient_checkpointing = True
        module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=reentrant)
    again, checkpointed = gradients(tower, features, mask)
    torch.testing.assert_close(again, hidden, rtol=1e-5, atol=1e-5)  # without grad SDPA takes another kernel
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-4)
    assert not features.requires_grad


def test_train_mode_is_eval_mode_and_leaves_buffers(tower):
    features, mask = make_clips([150, 60])
    trained = copy.deepcopy(tower).train()
    with torch.no_grad():
        expected, _ = tower(features, mask)
        hidden, _ = trained(features, mask)
    assert torch.equal(hidden, expected)
    for (name, before), (_, after) in zip(tower.named_buffers(), trained.named_buffers(), strict=True):
        assert torch.equal(before, after), name


def test_batch_norm_training_uses_valid_tokens_only(tower):
    features, mask = make_clips([150, 100])
    tower = copy.deepcopy(tower).train()
    tower.batch_norm_training = True
    norm = tower.layers[0].conv.norm
    seen = []
    norm.register_forward_hook(lambda module, args, output: seen.append((args[0].detach(), output.detach())))
    old_mean = norm.running_mean.clone()
    tower(features, mask)
    x, y = seen[0]
    rows = torch.cat([x[0], x[1, :13]])  # 19 and 13 tokens
    torch.testing.assert_close(norm.running_mean, 0.9 * old_mean + 0.1 * rows.mean(0))
    torch.testing.assert_close(torch.cat([y[0], y[1, :13]]).mean(0), torch.zeros(32), rtol=0, atol=1e-5)
    assert norm.num_batches_tracked == 1
    before = norm.running_mean.clone()
    tower.eval()(features, mask)
    assert torch.equal(norm.running_mean, before)


def test_bf16(tower):
    features, mask = make_clips([300, 90])
    with torch.no_grad():
        expected, counts = tower(features, mask)
        hidden, _ = copy.deepcopy(tower).to(torch.bfloat16)(features, mask)
        with torch.autocast("cpu", torch.bfloat16):
            autocast, _ = tower(features, mask)
    assert hidden.dtype == torch.bfloat16 and hidden.isfinite().all()
    for other in (hidden, autocast):
        for i in range(2):
            cosine = torch.cosine_similarity(other[i, : counts[i]].float(), expected[i, : counts[i]], dim=-1)
            assert cosine.min() > 0.999
