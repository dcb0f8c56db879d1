"""Classifiers: architectures, loading from every kind of source, folders, fingerprints and names of classes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import rewrite
from torch import fx, nn

from nndefense.errors import InputError, ModelError
from nndefense.models import (
    ARCHITECTURES,
    Classifier,
    build_classifier,
    load_classifier,
    read_classes,
    resolve_device,
    save_classifier,
)
from nndefense.models.class_names import imagenet_classes, readable_names
from nndefense.models.files import write_bytes

TEN = tuple(str(digit) for digit in range(10))
REPOSITORY = Path(__file__).resolve().parent.parent


def small(seed: int = 0, **options: object) -> Classifier:
    return build_classifier("small-cnn", input_shape=(1, 8, 8), classes=TEN, seed=seed, **options)  # type: ignore[arg-type]


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert not text.endswith(".")
    assert len(text) < 500
    return text


@pytest.mark.parametrize(
    ("text", "number"), [("t-shirt", 0), ("T-SHIRT/Top", 0), ("ankle_boot", 2), ("7", 1), ("1", 1), ("n2", 2)]
)
def test_a_class_is_found_by_name_id_or_number(text: str, number: int) -> None:
    net = Classifier(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), arch="x", input_shape=(1, 8, 8), source="test",
        classes=["T-shirt/top", "7", "Ankle boot"], class_ids=["n0", "n1", "n2"],
    )  # fmt: skip
    assert net.class_number(text) == number
    for wrong, words in (
        ("3", "number from 0 to 2"),
        ("-1", "is not one"),
        ("", "is not one"),
        ("Ankle bot", "did you"),
    ):
        with pytest.raises(InputError, match=words):
            net.class_number(wrong)


# --- architectures


@pytest.mark.parametrize(
    ("arch", "parameters"),
    [
        ("small-cnn", 98602),
        ("madry-mnist", 4259274),
        ("cifar-resnet18", 11173962),
        ("wrn-40-2", 2243546),
        # Stem, five units of 16, of 32 and of 64 filters with two shortcuts, normalisation, linear layer.
        ("wrn-34-1", 432 + 23360 + 88672 + 353472 + 128 + 650),
        ("softmax", 3072 * 10 + 10),
        ("maxout", (3072 + 1) * 1200 + (240 + 1) * 1200 + (240 + 1) * 10),
        ("maxout-cnn", 192 * (64 * 3 + 1) + 384 * (64 * 96 + 1) + 384 * (25 * 192 + 1) + 2500 * (192 * 16 + 1) + 5010),
        ("wrn-28-10", 36479194),
        ("wrn-34-10", 46160474),
    ],
)
def test_parameter_counts(arch: str, parameters: int) -> None:
    # On the meta device no memory is filled: only the shapes matter here.
    with torch.device("meta"):
        net = ARCHITECTURES[arch].build((3, 32, 32), 10)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters


def test_madry_mnist_is_the_published_size() -> None:
    classifier = build_classifier("madry-mnist", input_shape=(1, 28, 28), classes=TEN)
    assert sum(parameter.numel() for parameter in classifier.parameters()) == 3274634


@pytest.mark.parametrize(
    "arch", ["small-cnn", "madry-mnist", "cifar-resnet18", "wrn-40-2", "softmax", "maxout", "maxout-cnn-narrow"]
)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 7, 9)])
def test_every_input_shape(arch: str, shape: tuple[int, int, int]) -> None:
    classifier = build_classifier(arch, input_shape=shape, classes=["a", "b", "c"])
    assert not classifier.training
    assert classifier(torch.rand(2, *shape)).shape == (2, 3)


@pytest.mark.parametrize(
    "arch", ["small-cnn", "madry-mnist", "cifar-resnet18", "wrn-40-2", "softmax", "maxout-cnn-narrow"]
)
def test_fx_tracing(arch: str) -> None:
    classifier = build_classifier(arch, input_shape=(3, 16, 16), classes=TEN, mean=[0.5] * 3, std=[0.2] * 3)
    images = torch.rand(2, 3, 16, 16)
    traced = fx.symbolic_trace(classifier)
    assert torch.equal(traced(images), classifier(images))
    assert torch.equal(fx.symbolic_trace(classifier.net)(images), classifier.net(images))


def test_pixels_are_dropped_to_grey() -> None:
    net = build_classifier("maxout-cnn-narrow", input_shape=(3, 16, 16), classes=TEN).net
    grey, white = torch.full((1, 3, 16, 16), 0.5), torch.ones(1, 3, 16, 16)
    whole = net(grey), net(white)
    net.drop0.train()  # type: ignore[union-attr]
    assert torch.equal(net(grey), whole[0])
    assert not torch.equal(net(white), whole[1])


def test_a_maxout_unit_is_the_largest_of_its_pieces() -> None:
    net = build_classifier("maxout", input_shape=(1, 4, 4), classes=TEN).net
    images = torch.rand(3, 1, 4, 4)
    pieces = images.flatten(1) @ net.fc1.weight.T + net.fc1.bias  # type: ignore[union-attr, operator]
    by_hand = torch.stack([pieces[:, 5 * unit : 5 * unit + 5].max(1).values for unit in range(240)], 1)
    torch.testing.assert_close(net.maxout1(net.fc1(images.flatten(1))), by_hand)  # type: ignore[operator]


def test_compiling() -> None:
    classifier = small()
    images = torch.rand(2, 1, 8, 8)
    # The eager backend needs no C++ compiler; what matters is that the check of shapes does not break the graph.
    compiled = torch.compile(classifier, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images), classifier(images))


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_no_activation_works_in_place(arch: str) -> None:
    with torch.device("meta"):
        net = ARCHITECTURES[arch].build((3, 32, 32), 10)
    assert not any(getattr(module, "inplace", False) for module in net.modules())


def test_small_cnn_blocks_end_after_relu_at_full_half_and_quarter_size() -> None:
    classifier = small()
    sizes = {}
    for name in ("block1", "block2", "block3"):

        def note(_module: nn.Module, _images: object, maps: torch.Tensor, name: str = name) -> None:
            sizes[name] = tuple(maps.shape)
            assert maps.min() == 0

        classifier.net.get_submodule(name).register_forward_hook(note)
    classifier(torch.rand(4, 1, 8, 8))
    assert sizes == {"block1": (4, 32, 8, 8), "block2": (4, 64, 4, 4), "block3": (4, 128, 2, 2)}
    assert {"block1", "block2", "block3", "fc"} <= set(classifier.layers())


def test_wide_resnet_averages_activated_maps() -> None:
    classifier = build_classifier("wrn-40-2", input_shape=(3, 32, 32), classes=TEN)
    assert len(classifier.net.get_submodule("block1")) == 6  # type: ignore[arg-type]
    shapes = []
    for name in ("block1", "block2", "block3", "relu"):
        classifier.net.get_submodule(name).register_forward_hook(
            lambda _module, _images, maps: shapes.append(tuple(maps.shape))
        )
    classifier(torch.rand(1, 3, 32, 32))
    assert shapes == [(1, 32, 32, 32), (1, 64, 16, 16), (1, 128, 8, 8), (1, 128, 8, 8)]


def test_seed_decides_the_weights_and_the_global_state_stays() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, same, other = small(3), small(3), small(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arch": "smal-cnn"}, "did you mean small-cnn"),
        ({"arch": "zzz"}, "choose one of"),
        ({"input_shape": (1, 2, 2)}, "from 4 x 4 up"),
        ({"input_shape": (8, 8)}, "channels, height and width"),
        ({"input_shape": (1, 8.0, 8)}, "channels, height and width"),
        ({"classes": ["one"]}, "at least 2 classes"),
        ({"mean": [0.1, 0.2]}, "mean must be 1 finite"),
        ({"std": [0.0]}, "std must be above 0"),
        ({"std": [float("nan")]}, "std must be 1 finite"),
    ],
)
def test_build_errors(change: dict[str, object], words: str) -> None:
    options = {"arch": "small-cnn", "input_shape": (1, 8, 8), "classes": TEN} | change
    with pytest.raises(InputError) as error:
        build_classifier(options.pop("arch"), **options)  # type: ignore[arg-type]
    assert words in one_line(error)


# --- classifier


def test_normalization_is_inside() -> None:
    plain = build_classifier("small-cnn", input_shape=(3, 8, 8), classes=TEN)
    shifted = Classifier(
        plain.net, arch="small-cnn", input_shape=(3, 8, 8), classes=TEN, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7]
    )
    images = torch.rand(2, 3, 8, 8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    assert torch.equal(shifted.eval()(images), plain((images - mean) / std))
    assert {"mean", "std"} <= set(dict(shifted.named_buffers()))


def test_forward_checks_shapes() -> None:
    grey = small()
    with pytest.raises(InputError) as error:
        grey(torch.rand(2, 3, 8, 8))
    assert "load them as grey" in one_line(error)
    with pytest.raises(InputError) as error:
        grey(torch.rand(1, 8, 8))
    assert "N x 1 x 8 x 8" in one_line(error)
    assert grey(torch.rand(2, 1, 12, 12)).shape == (2, 10)  # averaged: any size
    fixed = build_classifier("madry-mnist", input_shape=(1, 28, 28), classes=TEN)
    with pytest.raises(InputError) as error:
        fixed(torch.rand(2, 1, 32, 32))
    assert "takes only 28 x 28" in one_line(error)
    assert grey(torch.rand(0, 1, 8, 8)).shape == (0, 10)


def test_gradients_reach_the_images() -> None:
    images = torch.rand(2, 1, 8, 8, requires_grad=True)
    small()(images).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_class_ids_must_be_as_many() -> None:
    with pytest.raises(InputError, match="class ids"):
        Classifier(nn.Identity(), arch="x", input_shape=(1, 8, 8), classes=TEN, class_ids=["n1"])


# --- fingerprint


def test_fingerprint_changes_with_what_counts() -> None:
    classifier = small()
    before = classifier.fingerprint
    assert len(before) == 64
    assert classifier.fingerprint == before
    with torch.no_grad():
        classifier.net.get_submodule("fc").bias[3] += 1e-6  # type: ignore[operator,index]
    changed = classifier.fingerprint
    assert changed != before
    assert small(mean=[0.5]).fingerprint != before
    assert small(std=[0.5]).fingerprint != before

    class Other(type(classifier.net)):  # type: ignore[misc]
        pass

    again = small()
    again.net.__class__ = Other
    assert again.fingerprint != before


def test_fingerprint_is_the_same_in_another_process_and_layout() -> None:
    classifier = small(seed=7)
    code = (
        "from nndefense.models import build_classifier as b;"
        "print(b('small-cnn', input_shape=(1, 8, 8), classes=[str(i) for i in range(10)], seed=7).fingerprint)"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "1"}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert printed.stdout.strip() == classifier.fingerprint
    assert classifier.to(memory_format=torch.channels_last).fingerprint == small(seed=7).fingerprint


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fingerprint_is_the_same_on_a_gpu() -> None:
    assert small().to("cuda").fingerprint == small().fingerprint


# --- names of classes


def named(classes: list[str], ids: list[str] | None = None) -> Classifier:
    return Classifier(nn.Identity(), arch="x", input_shape=(1, 8, 8), classes=classes, class_ids=ids)


@pytest.mark.parametrize(
    ("classes", "ids", "wanted", "expected"),
    [
        (["a", "b", "c"], None, ["a", "b", "c"], [0, 1, 2]),
        (["a", "b", "c"], None, ["c", "a"], [2, 0]),
        (["great white shark", "tench"], None, ["Tench", "great_white_shark"], [1, 0]),
        (["x", "y", "z"], ["n1", "n2", "n3"], ["n3", "n1"], [2, 0]),
        (["x", "y", "z"], ["n1", "n2", "n3"], ["n3", "x"], [2, 0]),
        (["cat", "dog", "bird"], None, ["0", "1", "2"], [0, 1, 2]),
        (["0", "1", "2"], None, ["00", "01"], [0, 1]),
        (["0", "1", "2"], None, [], []),
        (["tench, Tinca tinca", "goldfish"], None, ["goldfish", "tench"], [1, 0]),
        (["a", "b", "T-shirt"], None, ["a", "b", "T-shirt/top"], [0, 1, 2]),
        (["crane", "bird", "crane"], None, ["crane", "bird", "crane"], [0, 1, 2]),
        (["crane", "bird", "crane"], ["n1", "n2", "n3"], ["n3"], [2]),
    ],
)
def test_label_map(classes: list[str], ids: list[str] | None, wanted: list[str], expected: list[int]) -> None:
    mapped = named(classes, ids).label_map(wanted)
    assert mapped.dtype == torch.int64
    assert mapped.tolist() == expected


@pytest.mark.parametrize(
    ("classes", "wanted", "words"),
    [
        (["a", "b", "c"], ["a", "d"], "'d' is not one of the classifier's 3"),
        (["a", "b", "c"], ["b", "a", "d"], "'d' is not one"),  # equally many, but in another order
        (["crane", "bird", "crane"], ["crane", "bird"], "'crane' is the name of several"),
        (["cat", "dog"], ["cat", "Cat"], "shares"),
        (["apple", "banana", "cherry"], ["apple", "banana", "durian"], "'durian' is not one"),
        (["apple", "banana"], ["car", "lorry"], "'car' is not one"),
        (["cat", "dog"], ["1", "2"], "'1' is not one"),
        (["0", "1", "2"], ["1", "2", "3"], "'3' is not one"),
        (["0", "1", "2"], ["0", "1", "cat"], "'cat' is not one"),
        (["dog/cat", "cat/fox"], ["cat"], "'cat' is not one"),
    ],
)
def test_label_map_errors(classes: list[str], wanted: list[str], words: str) -> None:
    with pytest.raises(ModelError) as error:
        named(classes).label_map(wanted)
    assert words in one_line(error)


@pytest.mark.parametrize(
    ("classes", "wanted", "expected", "words"),
    [
        (["0", "1", "2"], ["cat", "dog", "fox"], [0, 1, 2], "'cat' is taken for the first"),
        (
            [str(n) for n in range(12)],
            sorted(map(str, range(12))),
            [0, 1, 10, 11, *range(2, 10)],
            "class '9' for output 9",
        ),
        ([f"c{n}" for n in range(11)], sorted(map(str, range(11))), [0, 1, 10, *range(2, 10)], "in text order"),
        ([str(n) for n in range(12)], ["10", "2"], [10, 2], "class '2' for output 2"),
    ],
)
def test_an_order_that_is_in_doubt_is_said(
    classes: list[str], wanted: list[str], expected: list[int], words: str
) -> None:
    with pytest.warns(UserWarning, match=words):
        assert named(classes).label_map(wanted).tolist() == expected


@pytest.mark.filterwarnings("error")
def test_an_order_that_is_sure_is_not_warned_of() -> None:
    assert named(["0", "1", "2"]).label_map(["0", "2"]).tolist() == [0, 2]
    assert named(["10", "2"]).label_map(["2", "10"]).tolist() == [1, 0]
    assert named(["cat", "dog"]).label_map(["dog"]).tolist() == [1]


def imagenet() -> tuple[list[str], list[str]]:
    """WordNet ids and torchvision's names of ImageNet's classes."""
    wnids, names = zip(*imagenet_classes(), strict=True)
    return list(wnids), list(names)


def test_the_1000_wnids_are_sorted_and_stand_beside_torchvisions_names() -> None:
    wnids, names = imagenet()
    assert len(set(wnids)) == len(set(names)) == 1000
    assert wnids == sorted(wnids)
    known = dict(zip(wnids, names, strict=True))
    # Of several sources: Imagenette's classes, and two that share a name in other lists.
    assert known["n01440764"] == "tench"
    assert known["n02102040"] == "English springer"
    assert known["n03888257"] == "parachute"
    assert known["n02012849"] == "crane bird"
    assert known["n15075141"] == "toilet tissue"


@pytest.mark.filterwarnings("error")
def test_folders_of_wnids_fit_nets_of_imagenets_names_and_the_reverse() -> None:
    wnids, names = imagenet()
    some = [217, 0, 999, 134, 517, 264, 474]
    net, folders = named(names), named(wnids)
    assert net.label_map(wnids).tolist() == list(range(1000))
    assert net.label_map([wnids[n] for n in some]).tolist() == some
    assert folders.label_map(names).tolist() == list(range(1000))
    assert folders.label_map([names[n] for n in some]).tolist() == some
    ten = named([wnids[n] for n in some])
    assert ten.label_map([names[n] for n in some[::-1]]).tolist() == list(range(7))[::-1]
    assert ten.label_map(["English springer / English springer spaniel", "tench, Tinca tinca"]).tolist() == [0, 1]
    assert named([names[n] for n in some]).label_map([wnids[n] for n in some]).tolist() == list(range(7))
    # Names in another style, of which two are equal, in ImageNet's order.
    other = [f"{name.replace(' bird', '')}, whatever {n}".replace(" ", "_") for n, name in enumerate(names)]
    assert named(other).label_map([wnids[n] for n in some]).tolist() == some
    assert torchvision_ids("squeezenet1_1") == wnids


def torchvision_ids(name: str) -> list[str]:
    found = load_classifier(f"torchvision:{name}:none", device="cpu").class_ids
    assert found is not None
    return list(found)


def test_a_wnid_that_is_none_of_the_nets_classes_is_refused() -> None:
    wnids, names = imagenet()
    for wanted in (["n00000001"], [wnids[5]]):
        with pytest.raises(ModelError, match=f"'{wanted[0]}' is not one of the classifier's 3"):
            named(names[:3]).label_map(wanted)
    # A thousand classes of another kind, or in another order, are not ImageNet's by their places.
    with pytest.raises(ModelError, match="is not one"):
        named([f"thing {n}" for n in range(1000)]).label_map([wnids[0]])
    assert named(names[::-1]).label_map([wnids[0]]).tolist() == [999]


def test_read_classes(tmp_path: Path) -> None:
    text = tmp_path / "names.txt"
    text.write_text("\ufeffcat\n dog \n\n", encoding="utf-8")
    assert read_classes(text) == (("cat", "dog"), None)
    table = tmp_path / "names.csv"
    table.write_text('index,wnid,name\n1,n2,"dog, big"\n0,n1,cat\n')
    assert read_classes(table) == (("cat", "dog, big"), ("n1", "n2"))
    table.write_text("Name\ncat\ndog\n")
    assert read_classes(str(table)) == (("cat", "dog"), None)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "one class name a line"),
        ("a.txt", b"cat\n\ndog\n", "one class name a line"),
        ("a.txt", b"\xff\xfe\xff", "UTF-8"),
        ("a.csv", b"", "column 'name'"),
        ("a.csv", b"foo,bar\n1,2\n", "column 'name'"),
        ("a.csv", b"index,name\n1,cat\n2,dog\n", "from 0 to 1"),
        ("a.csv", b"index,name\nx,cat\n", "class numbers"),
        ("a.csv", b"index,name\n0,cat\n1,\n", "row 2"),
    ],
)
def test_read_classes_errors(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ModelError) as error:
        read_classes(path)
    assert words in one_line(error)


def test_read_classes_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="check the path"):
        read_classes(tmp_path / "none.txt")


def test_read_the_imagenet_classes(data_root: Path) -> None:
    names, ids = read_classes(data_root / "weights" / "imagenet" / "imagenet_classes.csv")
    assert ids is not None
    assert (len(names), names[0], ids[999]) == (1000, "tench", "n15075141")


# --- device


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    for name, words in (("cuda", "no CUDA GPU"), ("cuda:0", "no CUDA GPU"), ("gpu", "no device 'gpu'")):
        with pytest.raises(InputError) as error:
            resolve_device(name)
        assert words in one_line(error)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto") == torch.device("cuda")
    with pytest.raises(InputError, match="no device cuda:1"):
        resolve_device("cuda:1")


# --- folders


def test_round_trip(tmp_path: Path) -> None:
    classifier = build_classifier(
        "madry-mnist", input_shape=(1, 8, 8), classes=list("abc"), mean=[0.1307], std=[0.3081], seed=2
    )
    classifier.class_ids = ("n1", "n2", "n3")
    classifier.info = {"data": {"name": "x", "fingerprint": "f00"}, "seconds": 1.5}
    folder = tmp_path / "new" / "folder"
    save_classifier(classifier, folder)
    loaded = load_classifier(str(folder), input_shape=(1, 8, 8))
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(loaded(images), classifier(images))
    assert loaded.fingerprint == classifier.fingerprint
    for name in ("arch", "classes", "class_ids", "input_shape", "info", "fixed_size"):
        assert getattr(loaded, name) == getattr(classifier, name)
    assert loaded.source == str(folder)
    assert not loaded.training
    description = json.loads((folder / "classifier.json").read_text())
    assert description["fingerprint"] == classifier.fingerprint
    assert description["data_fingerprint"] == "f00"
    assert str(torch.__version__).startswith(description["versions"]["torch"])
    assert sorted(path.name for path in folder.iterdir()) == ["classifier.json", "model.safetensors"]
    renamed = load_classifier(folder, classes=["x", "y", "z"])
    assert (renamed.classes, renamed.class_ids) == (("x", "y", "z"), None)
    with pytest.raises(ModelError, match="leave the input shape out"):
        load_classifier(folder, input_shape=(1, 28, 28))
    with pytest.raises(ModelError, match="has 3 classes, but 2"):
        load_classifier(folder, classes=["x", "y"])


def test_flexible_size_can_be_changed(tmp_path: Path) -> None:
    save_classifier(small(), tmp_path)
    assert load_classifier(tmp_path, input_shape=(1, 16, 16)).input_shape == (1, 16, 16)
    with pytest.raises(ModelError, match="takes images 1 x 8 x 8"):
        load_classifier(tmp_path, input_shape=(3, 8, 8))


def test_a_users_own_architecture_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        save_classifier(named(["a", "b"]), tmp_path / "x")
    assert "python:FILE:FACTORY" in one_line(error)
    assert not (tmp_path / "x").exists()


def test_save_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="a file is in its place"):
        save_classifier(small(), tmp_path / "x")
    with pytest.raises(InputError, match="a file is in its place"):
        save_classifier(small(), tmp_path / "x" / "y")


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match="No space left"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def edit(folder: Path, **values: object) -> None:
    rewrite(folder / "classifier.json", lambda description: description.update(values))


def store(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the weights, with the right sha256."""
    import hashlib

    data = safetensors.torch.save(tensors)
    (folder / "model.safetensors").write_bytes(data)
    edit(folder, weights={"file": "model.safetensors", "sha256": hashlib.sha256(data).hexdigest()})


def damage_json(folder: Path) -> None:
    path = folder / "classifier.json"
    path.write_text(path.read_text()[:-20])


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def not_safetensors(folder: Path) -> None:
    import hashlib

    (folder / "model.safetensors").write_bytes(b"nonsense")
    edit(folder, weights={"sha256": hashlib.sha256(b"nonsense").hexdigest()})


def drop_a_tensor(folder: Path) -> None:
    state = small().state_dict()
    del state["net.fc.bias"]
    store(folder, state)


def add_a_tensor(folder: Path) -> None:
    store(folder, small().state_dict() | {"net.more": torch.zeros(1)})


def reshape_a_tensor(folder: Path) -> None:
    store(folder, small().state_dict() | {"net.fc.bias": torch.zeros(11)})


def halve_a_tensor(folder: Path) -> None:
    store(folder, small().state_dict() | {"net.fc.bias": torch.zeros(10, dtype=torch.float16)})


@pytest.mark.parametrize(
    ("damage", "file", "words"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors", "is missing"),
        (lambda f: (f / "classifier.json").unlink(), "", "has no classifier.json"),
        (damage_json, "classifier.json", "cannot be read"),
        (lambda f: (f / "classifier.json").write_text("[1]"), "classifier.json", "not of the format"),
        (lambda f: edit(f, format="else"), "classifier.json", "not of the format"),
        (lambda f: edit(f, version=99), "classifier.json", "version of nndefense that wrote it"),
        (lambda f: edit(f, architecture="lenet"), "classifier.json", "'lenet', which is unknown"),
        (lambda f: edit(f, architecture=["lenet"]), "classifier.json", "does not describe"),
        (lambda f: edit(f, weights={}), "classifier.json", "it has no 'sha256'"),
        (lambda f: edit(f, input_shape=[1, 8]), "classifier.json", "does not describe"),
        (lambda f: edit(f, input_shape=None), "classifier.json", "does not describe"),
        (lambda f: edit(f, classes=5), "classifier.json", "does not describe"),
        (lambda f: edit(f, normalization={"mean": [0, 0], "std": [1]}), "classifier.json", "does not describe"),
        (truncate_weights, "model.safetensors", "damaged or cut short"),
        (flip_a_bit, "model.safetensors", "damaged or cut short"),
        (not_safetensors, "model.safetensors", "not a safetensors file"),
        (drop_a_tensor, "model.safetensors", "such as net.fc.bias are missing"),
        (add_a_tensor, "model.safetensors", "such as net.more do not belong"),
        (reshape_a_tensor, "model.safetensors", "net.fc.bias is 11 float32, not 10 float32"),
        (halve_a_tensor, "model.safetensors", "net.fc.bias is 10 float16"),
    ],
)
def test_damaged_folders(tmp_path: Path, damage: object, file: str, words: str) -> None:
    save_classifier(small(), tmp_path / "net")
    damage(tmp_path / "net")  # type: ignore[operator]
    with pytest.raises(ModelError) as error:
        load_classifier(tmp_path / "net")
    assert words in one_line(error)
    assert str(tmp_path / "net" / file) in str(error.value)


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "net.pth").write_bytes(b"x")
    (tmp_path / "half").mkdir()
    (tmp_path / "litter").mkdir()
    (tmp_path / "litter" / "._model.pt").write_bytes(b"x")  # macOS
    (tmp_path / "half" / "training.json").write_text("{}")
    for name in ("net.pt", "code.py", "model.safetensors", "notes"):
        (tmp_path / name).write_bytes(b"x")
    for source, words in (
        (tmp_path / "nothing", "there is no classifier at"),
        (tmp_path / "nothing.pkl", "would not be loaded"),
        ("wrn-28-10", "train it first"),
        (tmp_path / "empty", "has no classifier.json"),
        (tmp_path / "old", "net.pth is a pickle"),
        (tmp_path / "litter", "timm:NAME, hf:MODEL"),
        (tmp_path / "half", "finish it with --resume"),
        (tmp_path / "net.pt", "python:FILE:FACTORY, or convert"),
        (tmp_path / "code.py", f"as python:{tmp_path / 'code.py'}:FACTORY"),
        (tmp_path / "model.safetensors", f"give its folder {tmp_path}"),
        (tmp_path / "notes", "is a file"),
        ("keras:resnet18", "no kind of classifier"),
    ):
        with pytest.raises(ModelError) as error:
            load_classifier(source)
        assert words in one_line(error)


# --- torchvision


def test_a_net_that_computes_while_it_is_built_is_saved_and_loaded(tmp_path: Path) -> None:
    classifier = load_classifier("torchvision:regnet_x_400mf:none")
    save_classifier(classifier, tmp_path)
    assert load_classifier(str(tmp_path)).fingerprint == classifier.fingerprint


def test_torchvision_with_random_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    classifier = load_classifier("torchvision:resnet18:none")
    assert torch.equal(torch.get_rng_state(), state)
    assert classifier.input_shape == (3, 224, 224)
    assert len(classifier.classes) == 1000
    assert classifier.classes[0] == "tench"
    assert classifier.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert classifier.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert not any(getattr(module, "inplace", False) for module in classifier.modules())
    images = torch.rand(2, 3, 64, 64)
    logits = classifier(images)
    assert torch.equal(fx.symbolic_trace(classifier)(images), logits)
    assert load_classifier("torchvision:resnet18:none").fingerprint == classifier.fingerprint
    save_classifier(classifier, tmp_path)
    assert load_classifier(tmp_path).fingerprint == classifier.fingerprint


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("googlenet", {"transform_input": True, "aux_logits": False}),
        ("inception_v3", {"transform_input": True, "aux_logits": True}),
        ("vit_b_16", {"image_size": 64}),
    ],
)
def test_torchvision_nets_with_options(name: str, options: dict[str, int]) -> None:
    from nndefense.models.torchvision_source import build_torchvision, torchvision_options

    with torch.device("meta"):
        net = build_torchvision(name, 10, options)
        assert torchvision_options(net) == options
        again = build_torchvision(name, 10, torchvision_options(net))
    assert [(key, value.shape) for key, value in again.state_dict().items()] == [
        (key, value.shape) for key, value in net.state_dict().items()
    ]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("torchvision:resnet18", "names no weights: give torchvision:resnet18:WEIGHTS with one of IMAGENET1K_V1"),
        ("torchvision:resnet18:", "names no weights"),
        ("torchvision:resnet18:V9", "has no weights 'V9'"),
        ("torchvision:resnet19:DEFAULT", "did you mean resnet1"),
        ("torchvision:zzzzz:DEFAULT", "no classification model 'zzzzz'"),
        ("torchvision:vgg16:IMAGENET1K_FEATURES", "do not classify"),
    ],
)
def test_torchvision_errors(source: str, words: str) -> None:
    with pytest.raises(ModelError) as error:
        load_classifier(source)
    assert words in one_line(error)


def test_torchvision_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.models._api as api

    calls: list[dict[str, object]] = []
    state = torch.nn.Module.state_dict(load_classifier("torchvision:squeezenet1_1:none").net)
    state = {name: value + 1 for name, value in state.items()}

    def fetch(_url: str, **options: object) -> dict[str, torch.Tensor]:
        calls.append(options)
        return state

    monkeypatch.setattr(api, "load_state_dict_from_url", fetch)
    classifier = load_classifier("torchvision:squeezenet1_1:IMAGENET1K_V1", data_dir=tmp_path, input_shape=(3, 96, 96))
    assert calls == [
        {"model_dir": str(tmp_path / "torchvision"), "progress": True, "check_hash": True, "weights_only": True}
    ]
    assert classifier.input_shape == (3, 96, 96)
    assert all(torch.equal(value, state[name]) for name, value in classifier.net.state_dict().items())
    assert not any(getattr(module, "inplace", False) for module in classifier.modules())

    for failure, words in (
        (urllib.error.URLError("no route to host"), "could not be downloaded"),
        (ConnectionResetError("reset"), "could not be downloaded"),
        (RuntimeError('invalid hash value (expected "1",\n got "2")'), "could not be read"),
    ):

        def fail(_url: str, failure: Exception = failure, **_options: object) -> None:
            raise failure

        monkeypatch.setattr(api, "load_state_dict_from_url", fail)
        with pytest.raises(ModelError) as error:
            load_classifier("torchvision:squeezenet1_1:DEFAULT")
        assert words in one_line(error)


# --- a user's own code

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
    def forward(self, images):
        return self.conv(images).mean((2, 3))

def plain():
    return Net().train()

def known():
    net = Net()
    net.input_shape, net.classes = (3, 8, 8), ["a", "b", "c", "d"]
    return net

def softmax():
    return nn.Sequential(Net(), nn.Softmax(1))

def maps():
    return nn.Conv2d(3, 4, 3)

def scalar():
    return nn.Sequential(Net(), nn.Flatten(0))

def pair():
    class Pair(Net):
        def forward(self, images):
            return super().forward(images), None
    return Pair()

def infinite():
    net = Net()
    nn.init.constant_(net.conv.bias, float("nan"))
    return net

def number():
    return 3

def fails():
    raise ValueError("first line\\nsecond line")

def leaves():
    raise SystemExit(2)

def needs(argument):
    return Net()

wrong = 5
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(CODE)
    return path


def test_python_file(own: Path) -> None:
    before = list(sys.path)
    classifier = load_classifier(f"python:{own}:plain", input_shape=(3, 8, 8))
    assert sys.path == before
    assert "own" not in sys.modules
    assert not classifier.training
    assert not classifier.net.training
    assert (classifier.arch, classifier.input_shape, classifier.classes) == ("Net", (3, 8, 8), ("0", "1", "2", "3"))
    assert classifier(torch.rand(2, 3, 20, 20)).shape == (2, 4)
    assert not classifier.fixed_size
    known = load_classifier(f"python:{own}:known")
    assert (known.input_shape, known.classes) == ((3, 8, 8), ("a", "b", "c", "d"))
    given = load_classifier(f"python:{own}:known", input_shape=(3, 9, 9), classes=list("wxyz"))
    assert (given.input_shape, given.classes) == ((3, 9, 9), ("w", "x", "y", "z"))


def test_python_classes_from_a_file(own: Path, tmp_path: Path) -> None:
    table = tmp_path / "classes.csv"
    table.write_text("index,wnid,name\n0,n1,a\n1,n2,b\n2,n3,c\n3,n4,d\n")
    classifier = load_classifier(f"python:{own}:known", classes=table)
    assert classifier.class_ids == ("n1", "n2", "n3", "n4")
    assert classifier.label_map(["n4", "b"]).tolist() == [3, 1]


@pytest.mark.skipif(os.name == "nt", reason="file names there have no colons")
def test_python_file_with_a_colon(tmp_path: Path) -> None:
    path = tmp_path / "my:own.py"
    path.write_text(CODE)
    assert load_classifier(f"python:{path}:known").arch == "Net"


def test_python_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "own_module_of_the_test.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_classifier("python:own_module_of_the_test:known").arch == "Net"
    with pytest.raises(ModelError) as error:
        load_classifier("python:no_such_module_here.deep:known")
    assert "no Python module no_such_module_here.deep" in one_line(error)


def test_two_files_with_helpers_of_one_name(tmp_path: Path) -> None:
    for folder, width in (("a", 2), ("b", 5)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helper_of_the_test.py").write_text(f"WIDTH = {width}\n")
        (tmp_path / folder / "net.py").write_text(
            "from torch import nn\nfrom helper_of_the_test import WIDTH\n"
            "def build():\n    import helper_of_the_test as again\n    assert again.WIDTH == WIDTH\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(4, WIDTH))\n"
        )
    for folder, width in (("a", 2), ("b", 5), ("a", 2)):
        classifier = load_classifier(f"python:{tmp_path / folder / 'net.py'}:build", input_shape=(1, 2, 2))
        assert len(classifier.classes) == width
    assert "helper_of_the_test" not in sys.modules


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("absent", "has no function absent"),
        ("wrong", "has no function wrong"),
        ("softmax", "returns probabilities"),
        ("maps", "it must return logits N x K"),
        ("scalar", "it must return logits N x K"),
        ("pair", "returns tuple"),
        ("infinite", "not finite"),
        ("number", "returned int"),
        ("fails", "raised ValueError: first line second line"),
        ("leaves", "raised SystemExit"),
        ("needs", "must run without arguments"),
    ],
)
def test_python_errors(own: Path, factory: str, words: str) -> None:
    with pytest.raises(ModelError) as error:
        load_classifier(f"python:{own}:{factory}", input_shape=(3, 8, 8))
    assert words in one_line(error)


def test_a_net_without_an_answer_to_flat_images_is_taken(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        spread = x.flatten(1).std(1).view(-1, 1, 1, 1)\n"
        "        return super().forward(torch.where(spread > 0, x / spread, torch.nan))\n"
        "def spread():\n    return Net(nn.Flatten(), nn.Linear(12, 4))\n"
    )
    classifier = load_classifier(f"python:{tmp_path / 'own.py'}:spread", input_shape=(3, 2, 2))
    assert bool(classifier(torch.rand(2, 3, 2, 2)).isfinite().all())


def test_python_errors_of_arguments(own: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("def (:\n")
    needy = tmp_path / "needy.py"
    needy.write_text("import a_package_that_nobody_has\n")
    for source, options, words in (
        (f"python:{own}:plain", {}, "give the input shape"),
        (f"python:{own}:plain", {"input_shape": (1, 8, 8)}, "does not take images 1 x 8 x 8"),
        (f"python:{own}:plain", {"input_shape": (8, 8)}, "must be"),
        (f"python:{own}:known", {"classes": ["a", "b"]}, "returns 4 logits, but 2 classes"),
        (f"python:{own}:known", {"classes": tmp_path / "no.txt"}, "no file of classes"),
        ("python:own.py", {}, "is not complete"),
        (f"python:{tmp_path / 'none.py'}:build", {}, "there is no file"),
        (f"python:{broken}:build", {}, "SyntaxError"),
        (f"python:{needy}:build", {}, "No module named 'a_package_that_nobody_has'"),
    ):
        with pytest.raises(ModelError) as error:
            load_classifier(source, **options)  # type: ignore[arg-type]
        assert words in one_line(error)


def test_python_with_published_weights(data_root: Path) -> None:
    from PIL import Image

    classifier = load_classifier(f"python:{data_root / 'models.py'}:cifar_resnet20", input_shape=(3, 32, 32))
    assert classifier.arch == "CifarResNet"
    assert "layer3" in classifier.layers()
    # A mosaic of 25 x 40 test images; the first rows of it are enough.
    mosaic = np.asarray(Image.open(data_root / "cifar10" / "test_00.webp").convert("RGB"))
    pixels = mosaic.reshape(25, 32, 40, 32, 3).transpose(0, 2, 4, 1, 3).reshape(1000, 3, 32, 32)[:300]
    labels = torch.from_numpy(np.load(data_root / "cifar10" / "labels.npz")["test"][:300].astype(np.int64))
    with torch.no_grad():
        predicted = classifier(torch.from_numpy(pixels.copy()).float() / 255).argmax(1)
    assert (predicted == labels).float().mean() > 0.87


def test_classes_have_names_that_people_read_each_unlike_the_others() -> None:
    assert readable_names(["0", "tench, Tinca tinca", "T-shirt/top"]) == ["0", "tench, Tinca tinca", "T-shirt/top"]
    assert readable_names(["traffic_light", "n02085936-Maltese_dog", "__", "a_b", "a b"]) == [
        "traffic light", "Maltese dog", "(class 2)", "a b (class 3)", "a b (class 4)"
    ]  # fmt: skip
    if known := imagenet_classes():
        wnids = [wnid for wnid, _ in known]
        assert readable_names(wnids)[:2] == ["tench", "goldfish"]
        assert len(set(readable_names(wnids))) == len(wnids)
        assert readable_names(["n00000000"]) == ["n00000000"]
