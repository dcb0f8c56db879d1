"""docs/does-it-take-my-net.md: every row of its tables is a net here, taken through three commands.

``python tests/test_takes_nets.py`` writes the tables into the page again.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tables
from command import nndefense
from dirty import encoded, noise

from nndefense.reporting import Table

PAGE = "does-it-take-my-net.md"
COLUMNS = ("Your net", "`calibrate`", "`index build`", "`classify`", "A layer of it")
SIDE = 32
YES, SAME = "yes", "the same"


@dataclass(frozen=True)
class Net:
    """A row of the page.

    Attributes:
        what: it is.
        source: ``--classifier``; without a colon, a factory of tests/many_nets.py.
        layer: for ``index build``.
        calibrate, build, classify: ``yes`` or the line that says why not; :data:`SAME` is the line of the step before,
            and nothing is tried where that left no database.
        options: of each of the commands.
        pooling: for ``index build``.
        needs: a package of an extra.
    """

    what: str
    source: str
    layer: str
    calibrate: str = YES
    build: str = YES
    classify: str = YES
    options: tuple[str, ...] = ()
    pooling: str = "avg"
    needs: str = "torch"

    def row(self) -> tuple[str, ...]:
        """Of the table."""
        cells = [
            text if text in (YES, SAME, "") else f"`{text}`" for text in (self.calibrate, self.build, self.classify)
        ]
        layer = f"`{self.layer}`" if self.build == YES else ""
        return self.what, *cells, layer + (f", `--pooling {self.pooling}`" if self.pooling != "avg" else "")


def refused(what: str, factory: str, line: str) -> Net:
    """A net that no command takes."""
    return Net(what, factory, "0", line, SAME, "")


NO_LAYERS = (
    "the classifier is TorchScript (traced or scripted), whose layers cannot be read: give the net that it was made "
    "from, with the same weights"
)
CLASSES = ("--classes", "classes.txt")
SMALL = ("--input-shape", f"3,{SIDE},{SIDE}")
FAMILIES = [
    Net("ResNet", "resnet", "layer3"),
    Net("MobileNet", "mobilenet", "features.6"),
    Net("EfficientNet", "efficientnet", "features.4"),
    Net("RegNet", "regnet", "trunk_output.block3"),
    Net("DenseNet", "densenet", "features.denseblock3"),
    Net("ConvNeXt", "convnext_", "features.3"),
    Net("ViT", "vit", "encoder.layers.encoder_layer_2"),
    Net("ViT, its class token", "vit", "encoder.layers.encoder_layer_2", pooling="cls"),
    Net("Swin", "swin", "features.3"),
    Net("Swin v2", "swin_v2", "features.3"),
    Net("MaxViT", "maxvit", "blocks.1"),
    Net("by name, `torchvision:resnet18:none`", "torchvision:resnet18:none", "layer3", options=(*SMALL, *CLASSES)),
    Net("`timm:test_resnet`", "timm:test_resnet", "layer3", options=(*SMALL, *CLASSES), needs="timm"),
    Net("`timm:test_vit`", "timm:test_vit", "blocks.3", options=CLASSES, needs="timm"),
    Net("`hf:` a ViT", "hf:vit", "model.vit.layernorm", needs="transformers"),
    Net("`hf:` a ResNet", "hf:resnet", "model.resnet.encoder.stages.1", needs="transformers"),
]
WRAPPED = [
    Net("3 channels", "colour", "4"),
    Net("1 channel", "grey", "4"),
    Net("`Sequential(Normalize(), net)`", "normalised", "1.4"),
    Net("a class of your own around a net", "around", "backbone.4"),
    Net("`DataParallel(net)`", "parallel", "4"),
    Net("`torch.compile(net)`", "compiled", "4"),
    refused("`torch.jit.trace`", "traced", NO_LAYERS),
    refused("`torch.jit.script`", "scripted", NO_LAYERS),
    refused("`torch.export.export(...).module()`", "exported",
        "python:nets.py:exported returned a net that cannot be put on cpu in evaluation mode (Calling eval() is "
        "not supported yet.): return the net itself with its weights, or torch.export.unflatten(program) of an "
        "exported one",
    ),
    Net("`torch.export.unflatten(program)`", "unflattened", "4"),
    Net(
        "quantised (`quantize_dynamic`)", "quantised", "4",
        calibrate="the model's output carries no gradient to the images (a retrieval is not differentiable, nor is a "
        "quantised net): attack the classifier itself, before it was quantised, or a differentiable relaxation of the "
        "defence",
    ),
    refused(
        "half precision", "half",
        "python:nets.py:half has weights in float16, but images are float32 (RuntimeError: Input type (float) and bias "
        "type (c10::Half) should be the same): return net.float()",
    ),
    refused(
        "dropout that is left on", "restless",
        "python:nets.py:restless is random: the same images give other logits when it is asked again. Turn off what "
        "draws in evaluation mode, such as dropout without training=self.training",
    ),
    refused(
        "batch statistics in evaluation mode", "batch_statistics",
        "the logits of python:nets.py:batch_statistics for an image depend on the other images of its batch, so that "
        "it is no function of the image: use running statistics in the place of the batch's (track_running_stats)",
    ),
    refused(
        "returns probabilities", "probabilities",
        "python:nets.py:probabilities returns probabilities: it must return logits, so leave the softmax out",
    ),
    refused(
        "returns a tuple", "pair", "python:nets.py:pair returns tuple for a batch: it must return logits N x K",
    ),
    refused(
        "has one output", "one_output",
        "python:nets.py:one_output returns 4 x 1 for 4 images 3 x 32 x 32: it must return logits N x K of at least 2 "
        "classes",
    ),
    Net(
        "has other weights each time", "unseeded", "4",
        classify="db was made with another classifier (python:nets.py:unseeded, ...) than this one "
        "(python:nets.py:unseeded, ...): load that classifier, or build a database for this one",
    ),
]  # fmt: skip
SECTIONS = {"Families": FAMILIES, "Wrapped, compiled, converted": WRAPPED}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the nets' file, names of classes, and photos in colour and grey."""
    home = tmp_path_factory.mktemp("nets")
    shutil.copy(Path(__file__).parent / "many_nets.py", home / "nets.py")
    (home / "classes.txt").write_text("\n".join(["cat", "dog", *(f"class {number}" for number in range(998))]))
    for name, shade in (("cat", 0), ("dog", 100)):
        (home / "photos" / name).mkdir(parents=True)
        for number in range(6):
            picture = noise(number + shade, SIDE, SIDE) // 2 + shade
            (home / "photos" / name / f"{number}.png").write_bytes(encoded(picture, "PNG"))
    return home


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(home)
    yield home
    for name in ("calibrated", "db"):
        shutil.rmtree(home / name, ignore_errors=True)


def tried(*words: str) -> str:
    """What a step comes to, in the words of the page."""
    done = nndefense(*words)
    if done.code == 0:
        return YES
    assert done.err.count("nndefense: error: ") == 1, done.err
    line = done.err.rpartition("nndefense: error: ")[2].rstrip("\n")
    assert "\n" not in line
    # Fingerprints of weights are other ones with another version of torch.
    return re.sub(r"\b[0-9a-f]{12}\b", "...", line)


def marked(net: Net) -> object:
    """A net that is taken through all steps takes seconds, and so does exporting one."""
    marks = pytest.mark.slow if net.build == YES or net.source == "exported" else ()
    return pytest.param(net, marks=marks, id=net.what)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("net", [marked(net) for net in FAMILIES + WRAPPED])
def test_what_becomes_of_a_net(net: Net, here: Path) -> None:
    pytest.importorskip(net.needs, reason=f"{net.needs} is not installed (an extra)")
    source = net.source if ":" in net.source else f"python:nets.py:{net.source}"
    if source.startswith("hf:") and not Path(net.source[3:]).exists():
        from test_named_sources import saved

        saved(Path(net.source[3:]), net.source[3:])
        source = f"hf:{here / net.source[3:]}"
    given = ("--dataset", "imagefolder:photos", "--classifier", source, *net.options, "--pca", "0", "--quiet")
    found = [tried("calibrate", *given, "--out", "calibrated", "--holdout", "4", "--ks", "1", "--poolings", "avg,cls",
                   "--norm", "linf", "--eps", "0.01", "--steps", "1", "--objective", "gray",
                   "--build-anyway")]  # fmt: skip
    found.append(tried("index", "build", *given, "--out", "db", "--layer", net.layer, "--pooling", net.pooling))
    if found[1] == YES:
        picture = ("photos/cat/0.png", "--convert", "--database", "db", "--k", "1")
        found.append(tried("classify", *picture, "--classifier", source, *net.options))
    else:
        found = [found[0], SAME if found[1] == found[0] else found[1], ""]
    assert found == [net.calibrate, net.build, net.classify]


def page() -> dict[str, Table]:
    """The tables under their headings."""
    return {
        heading: Table(COLUMNS, tuple(net.row() for net in nets), left=len(COLUMNS))
        for heading, nets in SECTIONS.items()
    }


def test_the_page_shows_these_rows() -> None:
    tables.check(PAGE, page())


if __name__ == "__main__":
    tables.write(PAGE, page())
