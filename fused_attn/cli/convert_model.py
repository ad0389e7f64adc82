"""``fused-attn convert``: which layers of a model fused ops replace, whether it stays the same, and what it gains.

``python -m fused_attn.cli.convert_model CONFIG`` prints the memory of both forms; it is what the command starts in a
process of its own on the CPU.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from .. import integrations
from ..bench import BenchError, measure
from ..integrations.convert import OPS
from ..options import check, make_folder
from ..train.atomic import write_text
from ..train.environment import describe
from ..train.json_files import dumps

MIB = 2**20
FORMS = ("before", "after")
PASSES = ("forward", "forward + backward")
#: Of :func:`difference`.  Rounding of float32 through tens of layers is 1e-5.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class ConvertConfig:
    """Put fused ops into a model of timm, transformers or another host, and compare it with itself.

    Which layers are replaced, outputs and gradients on random input, time and memory.  All weights are
    random: those of a fresh model hide what stands behind layers that start at zero."""

    model: str
    """timm:NAME, as timm.create_model takes it; transformers:CLASS, a configuration such as SamVisionConfig;
    kornia:LoFTR; or bottleneck_transformer_pytorch:BottleStack."""
    options: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """Arguments of the model or the configuration, e.g. num_hidden_layers=2."""
    ops: tuple[str, ...] = ()
    """Ops to use; when none is named, all that gain on the device."""
    image_size: int | None = None
    """Height and width of the images; the model's own when not given."""
    batch_size: int = 1
    """Images in a batch."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    threads: int | None = None
    """CPU threads of PyTorch; its own choice when not given."""
    seconds: float = 10.0
    """Seconds to time for; each form has at least nine turns, however long they take."""
    memory: bool = True
    """Measure peak memory too, on the CPU in a process of its own."""
    out: Path | None = None
    """Folder for convert_MODEL.json."""

    def __post_init__(self) -> None:
        check("convert", type(self), vars(self), BenchError)
        for op in self.ops:
            if op not in OPS:
                raise BenchError(f"ops must be some of {', '.join(OPS)}, got {op!r}")
        self.parsed_options()

    def parsed_options(self) -> dict[str, Any]:
        """``options`` as keyword arguments; values are Python literals, or strings where they are none."""
        options = {}
        for item in self.options:
            name, equals, value = item.partition("=")
            if not equals or not name.isidentifier():
                raise BenchError(f"options must be KEY=VALUE, got {item!r}")
            try:
                options[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: nested too deeply
                options[name] = value
        return options


class Subject:
    """The model and its images; it switches between its forms.

    Raises:
        BenchError: there is no such model, or it takes no images.
    """

    def __init__(self, config: ConvertConfig) -> None:
        self.ops = config.ops or None
        torch.manual_seed(0)
        built = _built(config)
        self.model = built.model
        _randomise(self.model)
        self.model.eval().to(config.device)
        self.images = torch.randn(config.batch_size, *built.shape, device=config.device)
        self.arguments = built.arguments(self.images)
        try:
            _calibrate(self.model, self.arguments)
        except Exception as error:
            shape = tuple(self.images.shape)
            raise BenchError(f"model {config.model} does not take images {shape} ({error})") from error

    def switch(self, form: str) -> integrations.Report | None:
        if form == "after":
            return integrations.convert(self.model, self.ops)
        integrations.restore(self.model)
        return None

    def forward(self) -> list[Tensor]:
        with torch.no_grad():
            return [*_tensors(self.model(*self.arguments))]

    def forward_backward(self) -> list[Tensor]:
        self.model.eval()  # LeViT drops what it keeps between calls
        self.model.zero_grad()
        outputs = [*_tensors(self.model(*self.arguments))]
        generator = torch.Generator(self.images.device).manual_seed(0)
        ends = [out for out in outputs if out.requires_grad]  # positions of matches have no gradient
        grads = [torch.randn(out.shape, generator=generator, device=out.device, dtype=out.dtype) for out in ends]
        torch.autograd.backward(ends, grads)
        return [out.detach() for out in outputs]

    def results(self) -> dict[str, list[Tensor]]:
        outputs = self.forward_backward()
        return {
            "outputs": outputs,
            "gradients": [p.grad.clone() for p in self.model.parameters() if p.grad is not None],
        }


# --- hosts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Built:
    """A model, the shape of one image, or of a pair of images, and what a batch of them is as its arguments."""

    model: nn.Module
    shape: tuple[int, ...]
    arguments: Callable[[Tensor], tuple[Any, ...]] = lambda images: (images,)


def _built(config: ConvertConfig) -> _Built:
    package, colon, name = config.model.partition(":")
    if package not in _HOSTS or not colon or not name:
        known = "timm:NAME, transformers:CLASS, kornia:LoFTR or bottleneck_transformer_pytorch:BottleStack"
        raise BenchError(f"model must be {known}, got {config.model!r}")
    module, build = _HOSTS[package]
    try:
        host = importlib.import_module(module)
    except Exception as error:  # a torchvision for another torch raises RuntimeError
        distribution = package.replace("_", "-")
        text = f"model {config.model} needs {package}, which cannot be imported ({type(error).__name__}: {error})"
        raise BenchError(f"{text}: pip install {distribution}") from error
    try:
        built = build(host, name, config.parsed_options())
    except Exception as error:
        raise BenchError(f"model {config.model} cannot be built ({type(error).__name__}: {error})") from error
    if config.image_size is not None:
        return replace(built, shape=(*built.shape[:-2], config.image_size, config.image_size))
    if not all(built.shape):
        raise BenchError(f"image_size must be given for model {config.model}, whose configuration has none")
    return built


def _of_timm(host: Any, name: str, options: dict[str, Any]) -> _Built:
    model = host.create_model(name, **options)
    channels, *size = model.pretrained_cfg["input_size"]
    return _Built(model, (channels, *_pair(options.get("img_size", size))))


def _of_transformers(host: Any, name: str, options: dict[str, Any]) -> _Built:
    settings = getattr(host, name)(**options)
    model = _model_of(host, settings)
    channels, height, width = getattr(settings, "num_channels", 3), *_pair(getattr(settings, "image_size", None) or 0)
    if type(settings) in host.AutoModelForKeypointMatching._model_mapping:
        return _Built(model, (2, channels, height, width))
    if hasattr(settings, "num_mel_bins"):  # spectrograms, which ClapAudioModel folds to a square
        bins = settings.num_mel_bins
        return _Built(model, (1, settings.spec_size**2 // bins, bins))
    required = [each for each in inspect.signature(model.forward).parameters.values() if each.default is each.empty]
    prompts = [each for each in required[1:] if each.kind == each.POSITIONAL_OR_KEYWORD]
    if prompts:  # SegGPT's, an image and its mask; it puts two images, one below the other, into one
        height //= 2
    return _Built(
        model, (channels, height, width), lambda images: (images, *(torch.randn_like(images) for _ in prompts))
    )


def _model_of(host: Any, settings: Any) -> nn.Module:
    """The model of a configuration: that of an automatic class, or else the first of its file that takes images."""
    for auto in (host.AutoModelForKeypointMatching, host.AutoModel, host.AutoBackbone):
        if type(settings) in auto._model_mapping:
            return auto.from_config(settings)
    file = importlib.import_module(type(settings).__module__.replace(".configuration_", ".modeling_"))
    for kind in vars(file).values():
        if isinstance(kind, type) and getattr(kind, "config_class", None) is type(settings):
            first = [*inspect.signature(kind.forward).parameters][1]
            if first in ("pixel_values", "input_features"):
                return kind(settings)
    raise TypeError(f"no model of {type(settings).__name__} takes images")


class _Matching(nn.Module):
    """LoFTR with what it is trained by: its matches have no gradient, but the confidences that they are taken from."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        model.coarse_matching.thr = 0.0  # type: ignore[union-attr, assignment]  # which no random weights would reach

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        def keep(module: nn.Module, arguments: tuple[Any, ...], result: None) -> None:
            confidence.append(arguments[2]["conf_matrix"])

        confidence: list[Tensor] = []
        handle = self.model.coarse_matching.register_forward_hook(keep)  # type: ignore[union-attr, operator]
        try:
            matches = self.model({"image0": images[:, 0], "image1": images[:, 1]})
        finally:
            handle.remove()
        return {**matches, "conf_matrix": confidence[0]}


def _of_kornia(host: Any, name: str, options: dict[str, Any]) -> _Built:
    return _Built(_Matching(getattr(host, name)(pretrained=None, **options)), (2, 1, 320, 320))


def _of_lucidrains(host: Any, name: str, options: dict[str, Any]) -> _Built:
    return _Built(getattr(host, name)(**options), (options["dim"], *_pair(options["fmap_size"])))


#: package -> the module that has the names of its models, and what builds one of them
_HOSTS: dict[str, tuple[str, Callable[[Any, str, dict[str, Any]], _Built]]] = {
    "timm": ("timm", _of_timm),
    "transformers": ("transformers", _of_transformers),
    "kornia": ("kornia.feature", _of_kornia),
    "bottleneck_transformer_pytorch": ("bottleneck_transformer_pytorch", _of_lucidrains),
}


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _randomise(model: nn.Module) -> None:
    """Weights under which every layer counts: small or constant ones as at the start hide what stands behind them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _calibrate(model: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Variances of batch norm that are those of the images, one for a layer: with the 1 that they start at, maps grow
    from layer to layer until every gate of squeeze-excite is 0 or 1."""

    def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        module.running_var.fill_(inputs[0].square().mean())  # type: ignore[operator, union-attr]

    norms = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    handles = [each.register_forward_pre_hook(take) for each in norms if each.track_running_stats]
    try:
        with torch.no_grad():
            model(*arguments)
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    """Tensors of an output that have a gradient or could have one."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest norm of a tensor's difference, over its norm, or over a thousandth of the largest tensor's: a bias of
    keys shifts all logits alike, and its gradient is rounding."""
    norms = torch.stack([b.double().norm() for b in expected])
    differences = torch.stack([(a - b).double().norm() for a, b in zip(found, expected, strict=True)])
    return (differences / norms.clamp(min=1e-3 * norms.max().item())).max().item()


def run(config: ConvertConfig) -> int:
    """Compare and show; returns the exit status: 0, or 1 where the model is not the same.

    Raises:
        BenchError: a setting cannot be used.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("device cuda: PyTorch finds no GPU on this machine")
    if config.out is not None:
        make_folder(config.out, BenchError)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    subject = Subject(config)
    expected = subject.results()
    report = subject.switch("after")
    print(report)
    result: dict[str, Any] = {"model": config.model, "options": list(config.options), "ops": list(config.ops)}
    result |= {"images": list(subject.images.shape), "device": config.device}
    result["candidates"] = [asdict(candidate) for candidate in report]
    same = True
    if report.fused:
        found = subject.results()
        result["difference"] = {name: difference(found[name], expected[name]) for name in expected}
        same = all(value < TOLERANCE for value in result["difference"].values())
        del found, expected
        result["seconds"] = times(subject, config)
        if config.memory:
            result["peak_bytes"] = _memory(subject, config)
        print(table(result))
    if config.out is not None:
        name = config.model.replace(":", "_")
        write_text(config.out / f"convert_{name}.json", dumps({**result, "environment": describe()}, indent=1) + "\n")
    if not same:
        print("fused-attn: the converted model does not compute the same; please report it", file=sys.stderr)
    return 0 if same else 1


def times(subject: Subject, config: ConvertConfig) -> dict[str, dict[str, float]]:
    """Median seconds by form and pass; the forms take turns."""
    clock = measure.Clock(subject.images.device)

    def turn(form: str) -> Callable[[int], dict[str, float]]:
        def timed(number: int) -> dict[str, float]:
            subject.switch(form)
            seconds = {}
            for name, call in zip(PASSES, (subject.forward, subject.forward_backward), strict=True):
                start = clock.start()
                call()
                seconds[name] = clock.seconds(start, clock.mark())
            return seconds

        return timed

    found = measure.interleave(
        {form: turn(form) for form in FORMS}, seconds=config.seconds, least=measure.LEAST_ROUNDS, warmup=1
    )
    return {form: {name: statistics.median(found[form][name]) for name in PASSES} for form in FORMS}


def _memory(subject: Subject, config: ConvertConfig) -> dict[str, dict[str, int]]:
    if config.device == "cuda":
        return memory_here(subject)
    settings = asdict(config) | {"out": None, "threads": torch.get_num_threads()}
    return measure.run_child("fused_attn.cli.convert_model", [dumps(settings)], f"the memory of {config.model}")


def memory_here(subject: Subject) -> dict[str, dict[str, int]]:
    """Most bytes beyond weights and images by form and pass; on the CPU, for a process of its own."""
    peaks: dict[str, dict[str, int]] = {}
    for form in FORMS:
        subject.switch(form)
        subject.forward_backward()  # gradients, libraries and threads are there
        peaks[form] = {}
        for name, call in zip(PASSES, (subject.forward, subject.forward_backward), strict=True):
            if subject.images.is_cuda:
                peaks[form][name] = measure.peak_allocated(call)
            else:
                before = measure.trim()
                peaks[form][name] = max(0, measure.peak_resident(call) - before)
    return peaks


def table(result: dict[str, Any]) -> str:
    shape = "x".join(map(str, result["images"]))
    differences = ", ".join(f"{name} {value:.1e}" for name, value in result["difference"].items())
    lines = [
        "",
        f"{result['model']}, images {shape}, float32: relative difference of {differences}",
        f"{'':34}{'before':>10}{'after':>12}",
    ]
    units = {"seconds": ("time", "ms", 1e3), "peak_bytes": ("peak memory", "MiB", 1 / MIB)}
    for key, (what, unit, factor) in units.items():
        for name in PASSES:
            if key in result:
                before, after = (result[key][form][name] * factor for form in FORMS)
                ratio = f"{before / after:9.2f}x" if after > 0 else ""
                lines.append(f"{f'{what} of {name}, {unit}':34}{before:10,.1f}{after:12,.1f}{ratio}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Print the memory of both forms."""
    settings = json.loads(arguments[0])
    settings |= {name: tuple(settings[name]) for name in ("options", "ops")}
    config = ConvertConfig(**settings)
    torch.set_num_threads(config.threads or 1)
    print(json.dumps(memory_here(Subject(config)), allow_nan=False))


if __name__ == "__main__":
    main(sys.argv[1:])
