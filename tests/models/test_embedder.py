"""The exported embedder: what it embeds, how it is written and read back, and what it refuses."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import metricface
from metricface import Embedder
from metricface.data.images import Pixels, Preprocessing, UnreadableImageError
from metricface.models import build

SIZE = (24, 20)


def embedder(channels: str = "rgb", name: str = "small", seed: int = 0, **description: Any) -> Embedder:
    torch.manual_seed(seed)
    planes = 3 if channels == "rgb" else 1
    model = build(name, embedding_dim=8, channels=planes, height=SIZE[0], width=SIZE[1])
    for module in model.modules():  # fresh batch norm statistics would hide a forgotten buffer
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean = torch.randn(module.num_features) * 0.1
            module.running_var = torch.rand(module.num_features) + 0.5
    return Embedder(model, Preprocessing(*SIZE, channels=channels, crop=0.8), description)  # type: ignore[arg-type]


def pictures(count: int, shape: tuple[int, ...] = (40, 32, 3), seed: int = 0) -> list[Pixels]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, shape, dtype=np.uint8) for _ in range(count)]


def write(path: Path, image: Pixels) -> Path:
    """Write without loss, under any name."""
    encoded = cv2.imencode(".png", image[..., ::-1] if image.ndim == 3 else image)[1]
    path.write_bytes(encoded.tobytes())
    return path


def test_embeddings_are_the_networks_output_in_eval_mode_divided_by_its_length() -> None:
    made = embedder()
    images = pictures(5)
    made.model.train()
    found = made.embed(images, batch_size=2)
    made.model.eval()
    for row, image in zip(found, images, strict=True):
        pixels = made.preprocessing.apply(image).astype(np.float32)
        inputs = torch.from_numpy((pixels - 127.5) / 127.5).permute(2, 0, 1)[None]
        with torch.no_grad():
            raw = made.model(inputs)[0].double().numpy()
        np.testing.assert_allclose(row, raw / np.sqrt((raw**2).sum()), atol=2e-6)
    assert found.dtype == np.float32
    assert found.shape == (5, 8)


def test_paths_and_arrays_of_any_size_mix_in_one_list(tmp_path: Path) -> None:
    made = embedder()
    first, second, third = pictures(1)[0], pictures(1, (60, 61, 3), 1)[0], pictures(1, (50, 30), 2)[0]
    path = write(tmp_path / "Zoë Łukasz 李.png", first)
    grey = write(tmp_path / "grey.png", third)
    mixed = made.embed([str(path), second, grey, path, third])
    np.testing.assert_allclose(mixed[0], made.embed(first)[0], atol=1e-6)
    np.testing.assert_allclose(mixed[1], made.embed(second)[0], atol=1e-6)
    np.testing.assert_allclose(mixed[2], mixed[4], atol=1e-6)
    np.testing.assert_array_equal(mixed[0], mixed[3])


def test_colour_of_a_file_is_read_as_red_green_blue(tmp_path: Path) -> None:
    made = embedder()
    red = np.zeros((30, 30, 3), dtype=np.uint8)
    red[..., 0] = 255
    right, wrong = made.embed([red, red[..., ::-1].copy()])
    found = made.embed(write(tmp_path / "red.png", red))[0]
    np.testing.assert_allclose(found, right, atol=1e-6)
    assert np.abs(found - wrong).max() > 1e-3


def test_one_image_a_batch_array_and_a_list_agree() -> None:
    made = embedder()
    images = pictures(3)
    batch = made.embed(np.stack(images))
    np.testing.assert_array_equal(batch, made.embed(images))
    np.testing.assert_allclose(made.embed(images[1]), batch[1:2], atol=1e-6)


def test_a_grey_embedder_takes_grey_and_colour() -> None:
    made = embedder("grey")
    grey = pictures(1, (33, 35))[0]
    found = made.embed([grey, grey[..., None], np.repeat(grey[..., None], 3, axis=2)])
    assert found.shape == (3, 8)
    np.testing.assert_array_equal(found[0], found[1])


def test_nothing_to_embed_gives_no_rows_of_the_right_width() -> None:
    assert embedder().embed([]).shape == (0, 8)


def test_flip_gives_an_image_and_its_mirror_the_same_embedding_and_is_off_by_default() -> None:
    made = embedder()
    image = pictures(1)[0]
    both = [image, image[:, ::-1].copy()]
    flipped, plain = made.embed(both, flip=True), made.embed(both)
    np.testing.assert_allclose(flipped[0], flipped[1], atol=1e-5)
    assert np.abs(plain[0] - plain[1]).max() > 1e-3
    np.testing.assert_allclose(np.linalg.norm(flipped, axis=1), 1.0, atol=1e-6)


def test_embedding_leaves_the_mode_of_every_part_as_it_was() -> None:
    made = embedder()
    made.model.train()
    frozen = next(module for module in made.model.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    before = {name: module.training for name, module in made.model.named_modules()}
    made.embed(pictures(2))
    assert {name: module.training for name, module in made.model.named_modules()} == before
    assert not frozen.training


@pytest.mark.parametrize("name", ["small", "sphereface20"])
def test_what_was_saved_comes_back_to_the_bit(tmp_path: Path, name: str) -> None:
    made = embedder(name=name, threshold=0.25, recipe={"digest": "ab"}, people=("é", "z"), far=np.float64(0.5))
    folder = tmp_path / "läufe" / "模型"
    made.save(folder)
    back = metricface.load(folder)
    ours, theirs = made.model.state_dict(), back.model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert back.preprocessing == made.preprocessing
    assert back.description == {"threshold": 0.25, "recipe": {"digest": "ab"}, "people": ["é", "z"], "far": 0.5}
    assert not back.model.training
    np.testing.assert_array_equal(back.embed(pictures(3)), made.embed(pictures(3)))


def test_options_of_the_network_come_back(tmp_path: Path) -> None:
    model = build("small", embedding_dim=4, channels=1, height=20, width=20, widths=[8, 12], units=[0, 2], stem=6)
    Embedder(model, Preprocessing(20, 20, channels="grey"), {}).save(tmp_path)
    assert metricface.load(tmp_path).model.state_dict().keys() == model.state_dict().keys()


def test_a_network_in_channels_last_layout_is_saved_in_the_plain_one(tmp_path: Path) -> None:
    made = embedder()
    made.save(tmp_path / "a")
    made.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    made.save(tmp_path / "b")
    (a,), (b,) = (tmp_path / "a").glob("weights-*"), (tmp_path / "b").glob("weights-*")
    assert a.read_bytes() == b.read_bytes()


def test_saving_again_leaves_only_the_new_embedder(tmp_path: Path) -> None:
    embedder(seed=1).save(tmp_path)
    newer = embedder(seed=2)
    newer.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    np.testing.assert_array_equal(metricface.load(tmp_path).embed(pictures(2)), newer.embed(pictures(2)))


@pytest.mark.parametrize("at", [0, 1])
def test_a_crash_while_saving_leaves_the_old_embedder_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    older = embedder(seed=1)
    older.save(tmp_path)
    done: list[str] = []
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if len(done) == at:
            raise OSError(28, "No space left on device")
        done.append(str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="No space left"):
        embedder(seed=2).save(tmp_path)
    monkeypatch.undo()
    np.testing.assert_array_equal(metricface.load(tmp_path).embed(pictures(2)), older.embed(pictures(2)))
    assert not list(tmp_path.glob(".*.part"))


def test_figures_that_are_not_finite_become_null_and_never_stop_the_saving(tmp_path: Path) -> None:
    embedder(threshold=float("nan"), figures=[np.float32(np.inf), 1]).save(tmp_path)
    assert metricface.load(tmp_path).description == {"threshold": None, "figures": [None, 1]}
    assert "NaN" not in (tmp_path / "embedder.json").read_text(encoding="utf-8")


def test_a_description_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"card\.description\.head\[1\] is a object"):
        embedder(head=[1, object()]).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_network_nobody_can_build_again_is_not_saved(tmp_path: Path) -> None:
    class Mean(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean(dim=(2, 3))

    made = Embedder(Mean(), Preprocessing(*SIZE), {})
    assert made.embed(pictures(2)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"Mean cannot be saved.*metricface\.models\.build"):
        made.save(tmp_path)


def test_a_preprocessing_that_does_not_fit_the_network_is_refused() -> None:
    model = build("small", embedding_dim=8, channels=3, height=24, width=20)
    with pytest.raises(ValueError, match=r"\(3, 24, 20\), the preprocessing gives \(3, 20, 24\)"):
        Embedder(model, Preprocessing(20, 24), {})


@pytest.mark.parametrize(("value", "what"), [(0.0, "zero"), (float("nan"), "not finite"), (float("inf"), "not finite")])
def test_an_embedding_without_direction_is_counted_and_located(value: float, what: str) -> None:
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            rows = torch.ones(len(images), 4)
            rows[images.amin(dim=(1, 2, 3)) > 0] = value  # bright images have no embedding
            return rows

    dark, bright = np.zeros((9, 9, 3), np.uint8), np.full((9, 9, 3), 255, np.uint8)
    with pytest.raises(ValueError, match=rf"2 of 4 embeddings .* first is image 1 \({what}\)"):
        Embedder(Constant(), Preprocessing(*SIZE), {}).embed([dark, bright, dark, bright], batch_size=3)


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 24, 20), [torch.zeros(3, 24, 20)], [1, 2], None, {"a": 1}])
def test_what_is_no_image_is_refused(images: Any) -> None:
    with pytest.raises(ValueError, match="images must be a path, a uint8 array"):
        embedder().embed(images)


def test_float_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        embedder().embed(np.zeros((4, 30, 30, 3), dtype=np.float32))


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(UnreadableImageError, match=r"notes\.png"):
        embedder().embed([pictures(1)[0], tmp_path / "notes.png"])


def damage(folder: Path, **changes: Any) -> None:
    card = json.loads((folder / "embedder.json").read_text(encoding="utf-8"))
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = card
        for parent in parents:
            inner = inner[parent]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    (folder / "embedder.json").write_text(json.dumps(card), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": "onnx"}, "not the card of a metricface embedder"),
        ({"format_version": 2}, "format version 2"),
        ({"network__name": "vit"}, "no network 'vit'; the networks are small, sphereface20"),
        ({"network__options": {"depth": 3}}, "no option depth"),
        ({"network": None}, "lacks 'network'"),
        ({"weights__sha256": None}, "lacks 'sha256'"),
        ({"network__colour": 3}, "colour"),
        ({"preprocessing__crop": 7}, "crop"),
        ({"preprocessing__height": 30}, "Make them agree"),
        ({"pixels__colour": "BGR"}, "BGR"),
        ({"weights__file": "../other.safetensors"}, "outside its folder"),
        ({"network__embedding_dim": 9}, r"project\.linear\.weight is torch\.float32 \(8, .*wanted .* \(9, "),
        ({"network__options": {"stem": 25}}, "does not fit its network"),
    ],
)
def test_a_wrong_card_says_what_is_wrong(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    embedder().save(tmp_path)
    damage(tmp_path, **changes)
    with pytest.raises(ValueError, match=says):
        metricface.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\xff"])
def test_a_card_that_is_no_card_is_refused(tmp_path: Path, text: str) -> None:
    embedder().save(tmp_path)
    (tmp_path / "embedder.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"embedder\.json is"):
        metricface.load(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no embedder in .*embedder\.json is missing"):
        metricface.load(tmp_path / "nowhere")
    embedder().save(tmp_path)
    next(tmp_path.glob("weights-*")).unlink()
    with pytest.raises(FileNotFoundError, match="weights are missing"):
        metricface.load(tmp_path)


def test_damaged_weights_are_noticed_and_a_pickle_is_never_opened(tmp_path: Path) -> None:
    embedder().save(tmp_path)
    weights = next(tmp_path.glob("weights-*"))
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="not the file that was saved"):
        metricface.load(tmp_path)
    torch.save({"a": 1}, weights)
    damage(tmp_path, weights__sha256=hashlib.sha256(weights.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="is damaged"):
        metricface.load(tmp_path)


def test_tensors_too_many_or_too_few_are_named(tmp_path: Path) -> None:
    made = embedder()
    made.save(tmp_path)
    state = {name: value.contiguous() for name, value in made.model.state_dict().items()}
    del state["project.linear.weight"]
    state["extra"] = torch.zeros(1)
    weights = next(tmp_path.glob("weights-*"))
    weights.write_bytes(safetensors.torch.save(state))
    damage(tmp_path, weights__sha256=hashlib.sha256(weights.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match=r"\(2 of \d+ tensors\): extra is unknown; project\.linear\.weight is missing"):
        metricface.load(tmp_path)
