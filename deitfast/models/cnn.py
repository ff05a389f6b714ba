"""torchvision's CNNs and He et al.'s ResNet-20, baselines and teachers, under the same contract as the transformers.

Parameters keep torchvision's names, so that its published weights load. (It publishes no RegNetY-4GF.)
"""

from torch import Tensor, nn
from torchvision.models import regnet, resnet
from torchvision.ops import Conv2dNormActivation

from pipelines.errors import UserError

SMALL = 64
"""Below this many pixels a network gets a stem that keeps the resolution."""


def build_convnet(arch: str, *, size: int, classes: int) -> nn.Module:
    """Return torchvision's `arch`, freshly initialized, giving (class logits [B, classes],).

    Args:
        size: side of the input in pixels; below `SMALL` the stem has stride 1 and no pooling.

    Raises:
        UserError: an architecture that is not here.
    """
    small = size < SMALL
    match arch:
        case "resnet18":
            return ResNet(resnet.BasicBlock, [2, 2, 2, 2], classes, small)
        case "resnet20":
            return ResNet20(classes)
        case "resnet50":
            return ResNet(resnet.Bottleneck, [3, 4, 6, 3], classes, small)
        case "regnet_y_4gf":
            return RegNet((2, 6, 12, 2), (128, 192, 512, 1088), 64, classes, small)
        case "regnet_y_8gf":
            return RegNet((2, 4, 10, 1), (224, 448, 896, 2016), 56, classes, small)
        case "regnet_y_16gf":
            return RegNet((2, 4, 11, 1), (224, 448, 1232, 3024), 112, classes, small)
    raise UserError(f"no CNN is called {arch}", expected="resnet18, resnet20, resnet50, regnet_y_4gf, _8gf or _16gf")


class ResNet(resnet.ResNet):
    """He et al., 2016. The small stem is their CIFAR network's: a 3x3 convolution of stride 1 and no max-pooling."""

    def __init__(self, block: type, layers: list[int], classes: int, small: bool) -> None:
        super().__init__(block, layers, num_classes=classes)
        if small:
            self.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's others
            self.maxpool = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Map pixels [B, 3, S, S] to (logits [B, classes],)."""
        return (super().forward(x),)


class ResNet20(ResNet):
    """He et al.'s network for CIFAR (2016, section 4.2): three stages of three blocks, 16, 32 and 64 channels wide.

    The shortcuts between stages are 1x1 convolutions, as in torchvision's ResNets. 0.27 million parameters: a fifteenth
    of the multiplications of `resnet18` at 32 px. The first convolution keeps the resolution at any size.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(resnet.BasicBlock, [3, 3, 3, 1], classes, small=True)
        self.inplanes = 16
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._make_layer(resnet.BasicBlock, 16, 3)
        self.layer2 = self._make_layer(resnet.BasicBlock, 32, 3, stride=2)
        self.layer3 = self._make_layer(resnet.BasicBlock, 64, 3, stride=2)
        self.layer4 = nn.Identity()
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as torchvision's others
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class RegNet(regnet.RegNet):
    """Radosavovic et al., 2020, with squeeze and excitation (the Y). The small stem has stride 1 instead of 2.

    The published widths are written out: torchvision's generator would round the 4GF's 192 channels up to 256.
    """

    def __init__(
        self, depths: tuple[int, ...], widths: tuple[int, ...], group_width: int, classes: int, small: bool
    ) -> None:
        stages = len(depths)
        params = regnet.BlockParams(
            depths=list(depths),
            widths=list(widths),
            group_widths=[group_width] * stages,
            bottleneck_multipliers=[1.0] * stages,
            strides=[2] * stages,
            se_ratio=0.25,
        )
        super().__init__(params, num_classes=classes, stem_type=_SmallStem if small else None)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Map pixels [B, 3, S, S] to (logits [B, classes],)."""
        return (super().forward(x),)


class _SmallStem(Conv2dNormActivation):
    """torchvision's `SimpleStemIN` with stride 1."""

    def __init__(self, width_in: int, width_out: int, norm_layer: type, activation_layer: type) -> None:
        super().__init__(
            width_in, width_out, kernel_size=3, stride=1, norm_layer=norm_layer, activation_layer=activation_layer
        )
