"""The optimizer's groups and rates, and the averaged weights."""

from copy import deepcopy

import pytest
import timm
import timm.optim
import timm.utils
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from deitfast.config.recipe import ModelSpec, OptimSpec
from deitfast.models.vit import build_model
from deitfast.train.ema import Ema
from deitfast.train.lamb import Lamb
from deitfast.train.losses import mixed_binary_cross_entropy
from deitfast.train.optim import build_optimizer, freeze, peak_lr
from deitfast.train.step import TrainStep
from deitfast.weights.layouts import _torchvision_regnet
from pipelines.augment.chain import augment
from pipelines.errors import UserError
from tests.helpers.small_runs import CPU, tiny_recipe
from tests.helpers.step_inputs import batch_for


def inputs_for(recipe):
    return augment(batch_for(recipe), recipe.augment, dtype=torch.float32, train=True)


def deit():
    return build_model(ModelSpec(patch=16), size=32, classes=10, distilled=True)


def names(model, parameters):
    by_identity = {id(parameter): name for name, parameter in model.named_parameters()}
    return {by_identity[id(parameter)] for parameter in parameters}


@pytest.mark.parametrize("decay_dist_token", [False, True])
def test_groups_are_timms(decay_dist_token):
    """The reference exempts positions and the class token by name; today's timm the distillation token as well."""
    model = deit()
    exempt = ["pos_embed", "cls_token", *([] if decay_dist_token else ["dist_token"])]
    others, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=exempt)
    groups = build_optimizer(model, OptimSpec(decay_dist_token=decay_dist_token), 1024).param_groups
    assert names(model, groups[0]["params"]) == names(model, decayed["params"])
    assert names(model, groups[1]["params"]) == names(model, others["params"])
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]


def test_wrapped_models_have_the_same_groups():
    model = deit()
    wrapped = nn.ModuleDict({"module": model})
    expected = [names(model, group["params"]) for group in build_optimizer(model, OptimSpec(), 8).param_groups]
    assert [
        names(model, group["params"]) for group in build_optimizer(wrapped, OptimSpec(), 8).param_groups
    ] == expected


def test_frozen_parameters_are_left_alone():
    model = deit()
    model.patch_embed.requires_grad_(False)
    groups = build_optimizer(model, OptimSpec(), 8).param_groups
    found = set().union(*(names(model, group["params"]) for group in groups))
    assert found == {name for name, _ in model.named_parameters() if not name.startswith("patch_embed")}


def test_the_peak_rate_is_linear_in_the_batch():
    assert peak_lr(OptimSpec(), 1024) == 1e-3
    assert peak_lr(OptimSpec(), 64) == pytest.approx(6.25e-5)
    assert peak_lr(OptimSpec(lr_batch=0), 1024) == 5e-4


def test_adamw_updates_as_its_paper_says():
    """Loshchilov and Hutter, 2019, algorithm 2, by hand in float64 over three steps."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    spec = OptimSpec(lr=0.01, lr_batch=0, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3)
    optimizer = build_optimizer(layer, spec, 64)
    assert optimizer.defaults["fused"]
    weights = {name: value.detach().double().clone() for name, value in layer.named_parameters()}
    first = second = dict.fromkeys(weights, 0.0)
    for step in range(1, 4):
        gradients = {name: torch.randn_like(value) for name, value in layer.named_parameters()}
        for name, parameter in layer.named_parameters():
            parameter.grad = gradients[name]
        optimizer.step()
        for name, g in gradients.items():
            g = g.double()
            first = first | {name: 0.8 * first[name] + 0.2 * g}
            second = second | {name: 0.9 * second[name] + 0.1 * g * g}
            scaled = (first[name] / (1 - 0.8**step)) / ((second[name] / (1 - 0.9**step)).sqrt() + 1e-3)
            decay = 0.1 if name == "weight" else 0.0
            weights[name] = weights[name] - 0.01 * (scaled + decay * weights[name])
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), weights[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_lamb_updates_as_timms(clip: float) -> None:
    torch.manual_seed(0)
    ours = deit()
    theirs = deepcopy(ours)
    spec = OptimSpec(name="lamb", lr=0.01, lr_batch=0, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6, clip=clip)
    optimizer = build_optimizer(ours, spec, 64)
    exempt = ["pos_embed", "cls_token", "dist_token"]
    groups = param_groups_weight_decay(theirs, 0.1, no_weight_decay_list=exempt)
    expected = timm.optim.Lamb(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-6, max_grad_norm=clip or None)
    nn.init.zeros_(ours.head.weight)  # a tensor of norm zero has no trust ratio
    nn.init.zeros_(theirs.head.weight)
    for _ in range(3):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        if clip:
            nn.utils.clip_grad_norm_(ours.parameters(), clip)
        optimizer.step()
        expected.step()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


def test_lamb_goes_on_from_its_state() -> None:
    spec, gradient = OptimSpec(name="lamb", lr=0.01, lr_batch=0), torch.randn(2, 3)
    whole, half = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    half.load_state_dict(whole.state_dict())
    one, other = build_optimizer(whole, spec, 64), build_optimizer(half, spec, 64)
    for step in range(4):
        if step == 2:
            state, other = other.state_dict(), build_optimizer(half, spec, 64)
            other.load_state_dict(state)
        whole.weight.grad, half.weight.grad = gradient.clone(), gradient.clone()
        one.step()
        other.step()
    assert torch.equal(whole.weight, half.weight)


def test_sgd_is_nesterovs():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = build_optimizer(layer, OptimSpec(name="sgd", lr=0.1, lr_batch=0, weight_decay=0, momentum=0.5), 64)
    for _ in range(2):
        layer.weight.grad = torch.ones(1, 1)
        optimizer.step()
    # velocities 1 and 1.5; Nesterov steps by gradient + momentum x velocity: 1.5, then 1.75
    assert layer.weight.item() == pytest.approx(1 - 0.1 * (1.5 + 1.75))


def test_sgd_without_momentum_is_plain():
    layer = nn.Linear(1, 1, bias=False)
    optimizer = build_optimizer(layer, OptimSpec(name="sgd", momentum=0), 64)
    assert not optimizer.param_groups[0]["nesterov"]


def fill(model, value):
    """Set every floating-point tensor to `value` and count one batch more."""
    for tensor in [*model.parameters(), *model.buffers()]:
        nn.init.constant_(tensor, value) if tensor.is_floating_point() else tensor.add_(1)


def test_the_average_follows_its_formula():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        fill(model, 0.0)
        ema, expected = Ema(model, decay=0.5), 0.0
        for update in range(20):
            fill(model, float(update))
            ema.update(model)
            decay = min(0.5, (1 + update) / (10 + update))  # 0.1, 2 / 11, ..., 0.5 from update 8 on
            expected = decay * expected + (1 - decay) * update
            for tensor in [*ema.model.parameters(), ema.model[1].running_var]:
                torch.testing.assert_close(tensor, torch.full_like(tensor, expected))
    assert ema.model[1].num_batches_tracked == model[1].num_batches_tracked == 21


def test_a_long_average_keeps_the_published_decay():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = Ema(model, decay=0.99996)
    ema.updates = 300_000
    nn.init.ones_(model.weight)
    ema.update(model)
    assert ema.model.weight.item() == pytest.approx(4e-5, rel=1e-3)


def test_the_average_is_apart_from_the_model_and_never_trains():
    model = deit().train()
    ema = Ema(model, 0.9)
    assert not ema.model.training
    assert not any(
        parameter is average for parameter, average in zip(model.parameters(), ema.model.parameters(), strict=True)
    )
    before = ema.model.head.weight.clone()
    nn.init.zeros_(model.head.weight)
    assert torch.equal(ema.model.head.weight, before)


def test_the_average_continues_from_its_state():
    model = nn.Linear(3, 3)
    straight, resumed = Ema(model, 0.9), Ema(nn.Linear(3, 3), 0.9)
    for update in range(6):
        nn.init.constant_(model.weight, update)
        if update == 3:
            resumed.load_state_dict(straight.state_dict())
        straight.update(model)
        if update >= 3:
            resumed.update(model)
    assert resumed.updates == straight.updates == 6
    assert torch.equal(resumed.model.weight, straight.model.weight)


@pytest.mark.parametrize("arch", ["deit_ti", "resnet18", "regnet_y_4gf"])
def test_layer_decay_gives_timms_rates(arch: str) -> None:
    """Every parameter's rate and decay are those of timm's `param_groups_layer_decay` for its network of that name."""
    with torch.device("meta"):
        model = build_model(ModelSpec(arch=arch), size=224, classes=1000, distilled=arch == "deit_ti")
        names_of = {"deit_ti": "deit_tiny_distilled_patch16_224", "regnet_y_4gf": "regnety_040"}
        theirs = timm.create_model(names_of.get(arch, arch))
    exempt = ("pos_embed", "cls_token", "dist_token")
    groups = param_groups_layer_decay(theirs, weight_decay=0.05, no_weight_decay_list=exempt, layer_decay=0.7)
    rates = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    expected = {}
    for name, parameter in theirs.named_parameters():
        ours = _torchvision_regnet(name) if arch == "regnet_y_4gf" else name
        expected[ours] = rates[id(parameter)]
    spec = OptimSpec(layer_decay=0.7)
    found = {}
    for group in build_optimizer(model, spec, 512).param_groups:
        assert group["lr"] == pytest.approx(5e-4 * group["lr_scale"])
        for name in names(model, group["params"]):
            found[name] = (pytest.approx(group["lr_scale"]), group["weight_decay"])
    assert found == expected


def test_rates_follow_the_schedule_layer_by_layer() -> None:
    recipe = tiny_recipe("optim.layer_decay=0.5", "train.ema=0", "model.depth=12")
    step = TrainStep(recipe, 10, CPU)
    step.step(step.prepare(inputs_for(recipe), 0), None, 0.01)
    rates = [group["lr"] for group in step.optimizer.param_groups]
    assert rates[0] == 0.01
    assert min(rates) == pytest.approx(0.01 * 0.5**13)


def test_a_step_learns_by_the_loss_and_optimizer_that_are_named() -> None:
    names_of = ("train.loss=bce", "train.bce_threshold=0.2", "optim.name=lamb", "model.drop_path=0", "train.ema=0")
    step = TrainStep(tiny_recipe(*names_of), 10, CPU)
    inputs = inputs_for(step.recipe)
    with torch.no_grad():
        (logits,) = step.model(inputs.pixels)
    rows = (inputs.labels, inputs.mix_labels, inputs.lam, 0.1, inputs.valid)
    expected = mixed_binary_cross_entropy(logits, *rows, threshold=0.2)
    assert step.step(step.prepare(inputs, 0), None, 0.01)[0].item() == pytest.approx(expected.item(), rel=1e-6)
    assert isinstance(step.optimizer, Lamb)


@pytest.mark.parametrize("arch", ["deit_ti", "resnet18"])
def test_a_linear_probe_changes_the_heads_alone(arch: str) -> None:
    recipe = tiny_recipe(f"model.arch={arch}", 'optim.freeze=["backbone"]', "train.ema=0")
    step = TrainStep(recipe, 10, CPU)
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    step.step(step.prepare(inputs_for(recipe), 0), None, 0.01)
    changed = {name for name, value in step.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == ({"fc.weight", "fc.bias"} if arch == "resnet18" else {"head.weight", "head.bias"})


def test_frozen_modules_are_named_as_timm_names_them() -> None:
    model, theirs = deit(), timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, num_classes=10)
    freeze(model, ["patch_embed", "blocks.0", "cls_token"])
    timm.utils.freeze(theirs, ["patch_embed", "blocks.0"])
    ours = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert ours == {name for name, parameter in theirs.named_parameters() if not parameter.requires_grad} | {
        "cls_token"
    }
    with pytest.raises(UserError, match="the network has no layer1"):
        freeze(model, ["layer1"])
    with pytest.raises(UserError, match="nothing to train"):
        freeze(model, ["backbone", "head", "head_dist"])
