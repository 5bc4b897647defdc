"""Files of video tokenizers: the published layout and ours load, every other file is refused with a reason."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conftest import golden_weights
from par_model.checkpoint import Checkpoint, CheckpointError, is_video, open_checkpoint, par_config, video_config
from par_model.config import PARConfig, VideoTokenizerConfig, VQConfig
from par_model.manifest import ManifestError, tokenizer_from_manifest, video_tokenizer_from_manifest
from par_model.transformer import PAR
from par_model.video import VideoTokenizer
from par_model.vq import VQModel

#: Six numbers in a code and widths that 32 groups divide, as the published one has: all of it shows in shapes.
LIKE_PUBLISHED = VideoTokenizerConfig(widths=(32, 64), strides=((1, 2, 2),), res_blocks=1, last_blocks=2)
OURS = VideoTokenizerConfig((8, 5, 5), (4, 8, 12), ((2, 2, 2), (1, 2, 2)), 2, 1, norm_groups=2)
State = dict[str, torch.Tensor]


def state_of(config: VideoTokenizerConfig) -> State:
    return dict(golden_weights(VideoTokenizer(config)).state_dict())


@pytest.fixture(scope="module")
def published() -> State:
    return state_of(LIKE_PUBLISHED)


def opened(tmp_path: Path, content: Any) -> Checkpoint:
    torch.save(content, tmp_path / "v.pt")
    return open_checkpoint(tmp_path / "v.pt")


@pytest.mark.parametrize("prefix", ["module.", "", "tokenizer."])
def test_the_published_layout(tmp_path: Path, published: State, prefix: str) -> None:
    content = {
        "model_state_dict": {prefix + key: value for key, value in published.items()},
        "version": "0.1.0",
        "config": b"\x80\x04cos\nsystem\n",  # a pickle, of which nothing is run
        "optimizer_state_dict": {"state": {0: {"step": torch.zeros(1)}}, "param_groups": [{"lr": 1e-4}]},
    }
    checkpoint = opened(tmp_path, content)
    assert video_config(checkpoint) == LIKE_PUBLISHED
    assert is_video(checkpoint)
    VideoTokenizer(LIKE_PUBLISHED).load_state_dict(dict(checkpoint.tensors))
    assert torch.equal(checkpoint.tensor("decoder_layers.0.conv.weight"), published["decoder_layers.0.conv.weight"])


def test_the_published_sizes_follow_from_its_shapes() -> None:
    with torch.device("meta"):
        state = VideoTokenizer(VideoTokenizerConfig()).state_dict()
    assert video_config(Checkpoint(Path("magvit2_ucf.pt"), state)) == VideoTokenizerConfig()


def test_a_bare_state_dict_and_safetensors(tmp_path: Path, published: State) -> None:
    assert video_config(opened(tmp_path, published)) == LIKE_PUBLISHED
    save_file({k: v.contiguous().to(torch.bfloat16) for k, v in published.items()}, str(tmp_path / "v.safetensors"))
    assert video_config(open_checkpoint(tmp_path / "v.safetensors")) == LIKE_PUBLISHED


def test_a_file_of_our_training(tmp_path: Path) -> None:
    said = asdict(OURS) | {"kind": "video-tokenizer"}
    assert video_config(opened(tmp_path, {"model": state_of(OURS), "config": said})) == OURS
    for change, message in (
        ({"levels": (8, 5)}, r"its config says levels=\(8, 5\); expected 3 whole numbers of at least 2"),
        ({"levels": (8, 5, 2**40)}, "whose product is at most 16777216"),
        ({"levels": "855"}, "its config says levels='855'"),
        ({"norm_groups": 0}, "its config says norm_groups=0; expected a whole number"),
        ({"norm_groups": 3}, "width 4 is not a multiple of norm_groups=3"),
        ({"widths": (4, 8, 16)}, r"its config says widths=\(4, 8, 16\), the weights have \(4, 8, 12\)"),
        ({"strides": ((1, 2, 2), (2, 2, 2))}, "its config says strides="),
        ({"last_blocks": 2}, "its config says last_blocks=2, the weights have 1"),
    ):
        with pytest.raises(CheckpointError, match=message):
            video_config(opened(tmp_path, {"model": state_of(OURS), "config": said | change}))


def test_what_shapes_do_not_show_is_asked_for(tmp_path: Path) -> None:
    config = {"norm_groups": 2}
    with pytest.raises(CheckpointError, match=r"a code has 3 numbers.*save the file with it: torch.save\(.*'levels'"):
        video_config(opened(tmp_path, {"model": state_of(OURS), "config": config}))
    with pytest.raises(CheckpointError, match=r"widths \(4, 8, 12\) are not multiples of 32.*'norm_groups'"):
        video_config(opened(tmp_path, {"model": state_of(OURS), "config": {"levels": [8, 5, 5]}}))
    assert video_config(opened(tmp_path, {"model": state_of(OURS), "config": config | {"levels": [8, 5, 5]}})) == OURS


def test_other_keys_and_shapes_are_refused(tmp_path: Path, published: State) -> None:
    less = {k: v for k, v in published.items() if k != "encoder_layers.1.fn.1.beta"}
    for content, message in (
        (less, r"1 missing \(encoder_layers.1.fn.1.beta\)"),
        (published | {"discr.blocks.0.weight": torch.zeros(1)}, r"1 unknown \(discr.blocks.0.weight\)"),
        (published | {"encoder_layers.0.conv.bias": torch.zeros(31)}, r"has shape \(31,\); expected \(32,\)"),
        (published | {"decoder_layers.3.conv.weight": torch.zeros(96, 64, 3, 3, 3)}, "makes 96 channels of 64"),
        (published | {"decoder_layers.3.conv.weight": torch.zeros(0, 64, 3, 3, 3)}, "none of them empty"),
        (published | {"encoder_layers.9999.fn.2.conv.weight": torch.zeros(2, 2, 3, 3, 3)}, "expected one less"),
        ({k: v for k, v in published.items() if "decoder" not in k}, "0 convolutions in front"),
        (published | {"quantizers.mask": torch.zeros(18)}, r"lookup-free quantisation \(LFQ\) \(quantizers.mask\)"),
        ({"encoder_layers.0.conv.weight": torch.zeros(1)}, "expected one less"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            video_config(opened(tmp_path, content))
        assert len(str(error.value)) < 600


def test_other_kinds_of_file_are_named(tmp_path: Path, published: State) -> None:
    par = PAR(PARConfig(dim=32, n_layers=1, n_heads=2, vocab_size=20, n_classes=3, grid=(1, 4, 4), group_size=4))
    vq = VQModel(VQConfig(16, channels=8, channel_multipliers=(1,), res_blocks=1, z_channels=8, norm_groups=4))
    for state, message in (
        (par.state_dict(), "this is a PAR model: give it as --checkpoint"),
        (vq.state_dict(), "this is an image tokenizer: give it as --tokenizer"),
        ({"conv_in.conv.weight": torch.zeros(1)}, "is a video tokenizer of another layout"),
        ({"quantizers.project_in.weight": torch.zeros(1)}, "lookup-free"),
    ):
        with pytest.raises(CheckpointError, match=message):
            video_config(opened(tmp_path, state))
    with pytest.raises(CheckpointError, match="this is a video tokenizer: give it as --tokenizer"):
        par_config(opened(tmp_path, published))


def entry_of(config: VideoTokenizerConfig) -> dict[str, Any]:
    time, side = config.downsampling
    numbers = {"downsampling": side, "time_downsampling": time, "frames": config.frames(3)}
    entry = {"kind": "video", **numbers, "codebook_size": config.codebook_size, "config": asdict(config)}
    written: dict[str, Any] = json.loads(json.dumps({"grid": [3, 4, 4], "tokenizer": entry}))
    return written


def test_the_manifest_gives_the_configuration_back() -> None:
    for config in (OURS, VideoTokenizerConfig()):
        assert video_tokenizer_from_manifest(entry_of(config)) == config
        assert tokenizer_from_manifest(entry_of(config)) == config
    assert video_tokenizer_from_manifest({"tokenizer": None}) is None
    assert video_tokenizer_from_manifest({"tokenizer": {"config": {}}}) is None


@pytest.mark.parametrize("value", [10**18, -1, 0, True, "x" * 10**6, None, [], [10**18], [1.5], [None] * 10**5])
def test_any_value_of_a_manifest_is_one_short_line(value: Any) -> None:
    good = entry_of(OURS)
    for name in ("kind", "frames", "downsampling", "time_downsampling", "codebook_size", "config", *asdict(OURS)):
        if name == "kind" and value is None:
            continue  # an image tokenizer
        manifest = copy.deepcopy(good)
        holder = manifest["tokenizer"] if name in manifest["tokenizer"] else manifest["tokenizer"]["config"]
        holder[name] = value
        with pytest.raises(ManifestError) as raised:
            video_tokenizer_from_manifest(manifest)
        assert len(str(raised.value)) < 600
