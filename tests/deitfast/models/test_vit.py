"""The networks against timm's and torchvision's, and the published parameter counts."""

import pytest
import timm
import torch
import torchvision

from deitfast.config.recipe import ModelSpec, Recipe, override
from deitfast.models.vit import attention, build_model, drop_path, joint
from pipelines.augment.patches import cut_patches
from pipelines.errors import UserError

TIMM = {"ti": "deit_tiny", "s": "deit_small", "b": "deit_base"}
PUBLISHED = {
    ("vit_ti", False): 5_717_416,
    ("vit_s", False): 22_050_664,
    ("vit_b", False): 86_567_656,
    ("deit_ti", True): 5_910_800,
    ("deit_s", True): 22_436_432,
    ("deit_b", True): 87_338_192,
}
TORCHVISION = ("resnet18", "resnet50", "regnet_y_8gf", pytest.param("regnet_y_16gf", marks=pytest.mark.slow))


def build(arch, size=224, classes=1000, distilled=False, **fields):
    return build_model(ModelSpec(arch=arch, **fields), size=size, classes=classes, distilled=distilled)


def oracle(arch, distilled, **options):
    middle = "_distilled" if distilled else ""
    return timm.create_model(f"{TIMM[arch.split('_')[1]]}{middle}_patch16_224", **options)


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def pair(arch, distilled, size, patch, classes, width=0, depth=12, heads=0, mlp_ratio=4.0):
    """Our model and timm's with the same weights, none of them at its initial zeros and ones."""
    torch.manual_seed(3)
    shape = {"depth": depth, "mlp_ratio": mlp_ratio} | ({"embed_dim": width, "num_heads": heads} if width else {})
    theirs = oracle(arch, distilled, img_size=size, patch_size=patch, num_classes=classes, **shape)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    shape = {"width": width, "depth": depth, "heads": heads, "mlp_ratio": mlp_ratio}
    ours = build(arch, size, classes, distilled, patch=patch, drop_path=0, **shape)
    ours.load_state_dict(theirs.state_dict())
    if distilled:
        theirs.set_distilled_training(True)
    return ours.train(), theirs.train()


def assert_same(arch, distilled, size, patch, **shape):
    ours, theirs = pair(arch, distilled, size, patch, classes=11, **shape)
    pixels = torch.randn(2, 3, size, size).to(memory_format=torch.channels_last)
    heads, expected = ours(pixels), theirs(pixels)
    expected = expected if distilled else (expected,)
    assert len(heads) == len(expected)
    weights = torch.randn(len(heads), 2, 11)
    for head, other in zip(heads, expected, strict=True):
        torch.testing.assert_close(head, other, rtol=1e-5, atol=1e-5)
    for outputs in (heads, expected):
        sum((head * weight).sum() for head, weight in zip(outputs, weights, strict=True)).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-5 * max(1, scale), msg=name)
    torch.testing.assert_close(joint(ours.eval()(pixels)), theirs.eval()(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(("size", "patch"), [(224, 16), (384, 16), (32, 4)])
def test_outputs_and_gradients_are_timms(distilled, size, patch):
    assert_same("deit_ti", distilled, size, patch)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("depth", [1, 5])
def test_width_depth_heads_and_mlp_ratio_are_timms(distilled, depth):
    assert_same("deit_ti", distilled, 32, 8, width=96, depth=depth, heads=4, mlp_ratio=2.6)


def test_a_head_has_64_channels_where_their_number_is_not_said():
    shapes = [ModelSpec(width=width).shape for width in (512, 200, 32)]
    assert [(shape.width, shape.heads) for shape in shapes] == [(512, 8), (200, 3), (32, 1)]
    with pytest.raises(UserError, match=r"model\.width 200 must be a multiple of model\.heads 3"):
        override(Recipe(), {"model.width": 200})


@pytest.mark.slow
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("arch", ["deit_s", "deit_b"])
@pytest.mark.parametrize(("size", "patch"), [(224, 16), (384, 16), (32, 4)])
def test_outputs_and_gradients_are_timms_for_larger_models(arch, size, patch, distilled):
    assert_same(arch, distilled, size, patch)


@pytest.mark.parametrize(("arch", "distilled"), PUBLISHED)
def test_parameters_are_the_published_ones(arch, distilled):
    with torch.device("meta"):
        ours, theirs = build(arch, distilled=distilled), oracle(arch, distilled)
    assert sum(parameter.numel() for parameter in ours.parameters()) == PUBLISHED[arch, distilled]
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize(("distilled", "published"), [(False, 86_859_496), (True, 87_630_032)])
def test_the_384_models_are_timms(distilled, published):
    middle = "_distilled" if distilled else ""
    with torch.device("meta"):
        ours, theirs = build("deit_b", 384, distilled=distilled), timm.create_model(f"deit_base{middle}_patch16_384")
    assert sum(parameter.numel() for parameter in ours.parameters()) == published
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("size", ["ti", "s", "b"])
def test_a_vit_is_a_deit_without_its_token(size):
    models = [[torch.manual_seed(1), build(f"{kind}_{size}", 32, 10, patch=8)][1] for kind in ("vit", "deit")]
    ours, theirs = (model.state_dict() for model in models)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_initialization_is_the_recipes():
    torch.manual_seed(0)
    model = build("deit_ti", size=64, patch=8, classes=10, distilled=True)
    for name, value in model.state_dict().items():
        if name == "patch_embed.proj.weight":  # PyTorch's default: uniform within 1 / sqrt(fan in)
            assert value.abs().max() <= (3 * 8 * 8) ** -0.5
            assert value.std() == pytest.approx((3 * 3 * 8 * 8) ** -0.5, rel=0.05)
        elif name.endswith("bias") and not name.startswith("patch_embed"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        elif value.ndim > 1:
            assert value.std() == pytest.approx(0.02, rel=0.15), name
            assert abs(value.mean()) < 0.005, name


def test_the_same_seed_gives_the_same_model():
    first, second = ([torch.manual_seed(7), build("deit_ti", 32, 10, True, patch=8)][1].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_patches_are_the_convolutions():
    pixels = torch.randn(2, 3, 12, 8).to(memory_format=torch.channels_last)
    patches = cut_patches(pixels, 4)
    assert patches.shape == (2, 6, 48)
    torch.testing.assert_close(patches[1, 3], pixels[1, :, 4:8, 4:8].flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_and_its_gradients_are_those_of_float64(dtype):
    shape = (3, 2, 17, 64)
    draw = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for _ in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    query, key, value = exact
    expected = (query @ key.mT / 8).softmax(-1) @ value
    found = attention(*given)
    assert found.dtype == dtype
    (found.double() * expected.detach()).sum().backward()
    (expected * expected.detach()).sum().backward()
    close = {"rtol": 0.03, "atol": 0.03} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.double(), expected, **close)
    for ours, theirs in zip(given, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, **close)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    branch = torch.ones(4, 2, 3)
    dropped = drop_path(branch, 0.25, torch.tensor([True, False, True, True]))
    assert dropped[:, 0, 0].tolist() == pytest.approx([1 / 0.75, 0, 1 / 0.75, 1 / 0.75])
    assert (dropped == dropped[:, :1, :1]).all()
    assert drop_path(branch, 0.25, None) is branch


def test_stochastic_depth_is_timms_with_the_same_branches_dropped(monkeypatch):
    """Both branches of every block, per sample, scaled by 1 / (1 - p); in training, with gradients."""
    theirs = oracle("deit_ti", True, img_size=32, patch_size=8, num_classes=10, drop_path_rate=0.5)
    ours = build("deit_ti", 32, 10, True, patch=8, drop_path=0.5)
    ours.load_state_dict(theirs.state_dict())
    theirs.set_distilled_training(True)
    kept = torch.rand(6, 24, generator=torch.Generator().manual_seed(0)) < 0.5
    taken = iter(kept.T[2:])  # timm draws nothing for the first block, whose rate is 0

    def known(x, drop_prob=0.0, training=False, scale_by_keep=True):
        return x if drop_prob == 0 else x * (next(taken) / (1 - drop_prob)).view(-1, 1, 1)

    monkeypatch.setattr("timm.layers.drop.drop_path", known)
    pixels = torch.randn(6, 3, 32, 32)
    for ours_head, their_head in zip(ours.train()(pixels, kept), theirs.train()(pixels), strict=True):
        torch.testing.assert_close(ours_head, their_head, rtol=1e-4, atol=1e-5)
    assert next(taken, None) is None


def test_a_model_that_trains_asks_for_what_it_drops():
    model, pixels = build("deit_ti", 32, 10, patch=8, drop_path=0.1), torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="training takes `kept`"):
        model.train()(pixels)
    model.eval()(pixels)
    build("deit_ti", 32, 10, patch=8, drop_path=0.0).train()(pixels)


def test_drop_path_rises_linearly_over_the_blocks():
    rates = [block.drop_path for block in build("deit_ti", 32, 10, patch=8, drop_path=0.11).blocks]
    assert rates == pytest.approx([0.01 * index for index in range(12)])
    theirs = [
        getattr(block.drop_path1, "drop_prob", 0.0) for block in oracle("deit_ti", True, drop_path_rate=0.11).blocks
    ]
    assert rates == pytest.approx(theirs)


def test_dropout_acts_in_training_only():
    model, pixels = build("deit_ti", 32, 10, True, patch=8, drop_path=0, dropout=0.5), torch.randn(4, 3, 32, 32)
    torch.manual_seed(0)
    assert not torch.equal(model.train()(pixels)[0], model(pixels)[0])
    assert torch.equal(model.eval()(pixels)[0], model(pixels)[0])


def test_dropout_stands_where_timm_has_it():
    theirs = oracle("deit_ti", True, pos_drop_rate=0.3, proj_drop_rate=0.3)
    ours = build("deit_ti", distilled=True, dropout=0.3)
    names = {name for name, module in theirs.named_modules() if isinstance(module, torch.nn.Dropout) and module.p}
    mine = {name for name, module in ours.named_modules() if isinstance(module, torch.nn.Dropout) and module.p}
    assert {name.replace("drop1", "drop").replace("drop2", "drop") for name in names} == mine


def test_compiles_without_a_graph_break():
    model = build("deit_ti", 32, 10, True, patch=8)
    pixels = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    torch.manual_seed(5)
    expected = model.eval()(pixels)
    heads = torch.compile(model, backend="eager", fullgraph=True)(pixels)
    assert all(torch.equal(head, other) for head, other in zip(heads, expected, strict=True))
    assert (
        len(torch.compile(model.train(), backend="eager", fullgraph=True)(pixels, torch.ones(2, 24, dtype=torch.bool)))
        == 2
    )


def test_sizes_that_the_patches_do_not_tile_are_refused():
    with pytest.raises(UserError, match="patches of 16 px do not tile an image of 40 px"):
        build("deit_ti", 40)


@pytest.mark.parametrize("arch", ["vit_ti", "resnet18"])
def test_only_deit_has_a_distillation_token(arch):
    with pytest.raises(UserError, match="no distillation token"):
        build(arch, distilled=True)


def test_regnet_y_4gf_is_the_papers():
    """torchvision has no 4GF; timm has, with other names."""
    with torch.device("meta"):
        ours, theirs = build("regnet_y_4gf"), timm.create_model("regnety_040")
    assert sorted(shapes(ours).values()) == sorted(shapes(theirs).values())


@pytest.mark.parametrize("arch", TORCHVISION)
def test_convnets_take_torchvisions_weights_and_give_its_logits(arch):
    theirs = torchvision.models.get_model(arch, weights=None, num_classes=7).eval()
    ours = build(arch, 64, 7).eval()
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        heads = ours(pixels)
        assert len(heads) == 1
        assert torch.equal(heads[0], theirs(pixels))


@pytest.mark.parametrize(("arch", "side"), [("resnet18", 4), ("resnet20", 8), ("resnet50", 4), ("regnet_y_4gf", 2)])
def test_small_images_keep_their_resolution_through_the_stem(arch, side):
    model, seen = build(arch, 32, 10).eval(), []
    model.avgpool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2:]))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32))[0].shape == (1, 10)
    assert seen == [(side, side)]


def test_resnet20_is_the_papers_network_for_cifar():
    """He et al., 2016, table 6: 20 layers with weights, 0.27 million parameters; section 4.2: 16, 32, 64 channels."""
    model = build("resnet20", 32, 10)
    assert sum(value.numel() for value in model.parameters()) == pytest.approx(0.27e6, rel=0.01)
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    shortcuts = [module for module in convolutions if module.kernel_size == (1, 1)]
    assert len(convolutions) - len(shortcuts) + 1 == 20
    assert {module.out_channels for module in convolutions} == {16, 32, 64}
