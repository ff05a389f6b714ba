"""timm's classifiers, where timm is installed."""

import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deitfast.weights.read import read_state, weights_file
from deitfast.weights.zoo_model import TIMM, OneHead, ZooModel, count_classes
from pipelines.errors import DeitfastError, UserError


def load_timm(name: str, file: Path | None) -> ZooModel:
    """Return network `name`, timm/ and timm's name for it; see `load_zoo_model`.

    Raises:
        UserError: timm is not installed or has no such network, or the weights are another network's.
        DeitfastError: the weights cannot be fetched.
    """
    timm, own, sidecar = _timm(name), name.removeprefix(TIMM), None
    if file:
        file = weights_file(file)
        network = timm.create_model(own)
        state, sidecar = read_state(file, network.state_dict())
        if (count := count_classes(state, network)) != network.num_classes:
            network = timm.create_model(own, num_classes=count)
        _load(network, own, state, file, timm)
    else:
        network = _fetched(timm, own)
    if sidecar:
        sidecar.named(network.num_classes, Path(file or ""))
    fed = timm.data.resolve_model_data_config(network) | dict(sidecar.input if sidecar else {})
    labels = sidecar.classes if sidecar and sidecar.classes else tuple(network.pretrained_cfg.get("label_names") or ())
    if len(labels) != network.num_classes:
        labels = ()
    model = OneHead(network).eval().requires_grad_(False)
    size = fed.get("size", fed["input_size"][-1])
    return ZooModel(name, model, network.num_classes, labels, size, tuple(fed["mean"]), tuple(fed["std"]))


def _timm(name: str) -> Any:
    """Return timm, which has a network of that name."""
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise UserError(
            f"{name} is a network of timm's", found=str(error), remedy="pip install deitfast[timm]"
        ) from error
    base = name.removeprefix(TIMM).partition(".")[0]
    if not timm.is_model(base):
        near = get_close_matches(base, timm.list_models(), n=3)
        raise UserError(
            f"timm has no network called {base}", expected=", ".join(near) or "a name of timm.list_models()"
        )
    return timm


def _load(network: Any, name: str, state: dict[str, Tensor], file: Path, timm: Any) -> None:
    """Load a state_dict, as it is or as timm converts the original authors' names."""
    module = sys.modules[timm.models.model_entrypoint(name.partition(".")[0]).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    problem = ""
    for attempt in (lambda: state, lambda: convert(dict(state), network) if convert else state):
        try:
            network.load_state_dict(attempt())
        except (RuntimeError, KeyError, AttributeError, TypeError) as error:
            problem = problem or str(error).splitlines()[-1].strip()
        else:
            return
    raise UserError(f"{file} does not hold a {name}", found=problem)


def _fetched(timm: Any, name: str) -> Any:
    try:
        network = timm.create_model(name, pretrained=True)
    except Exception as error:  # of huggingface_hub, which has many, or of the network
        raise DeitfastError(
            f"the weights of timm's {name} cannot be fetched",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            remedy="fetch them where there is a network and give the file with --teacher-weights FILE",
        ) from error
    assert isinstance(network, nn.Module)
    return network
