"""Networks of timm and transformers with weights that are nowhere at their initial zeros and ones."""

import timm
import torch
from torch import nn

TIMM = {"ti": "deit_tiny", "s": "deit_small", "b": "deit_base"}
SHAPES = {"ti": (192, 3), "s": (384, 6), "b": (768, 12)}


def randomized(model: nn.Module, seed: int = 3) -> nn.Module:
    """Draw every parameter anew; return the model in evaluation mode."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.eval()


def timm_model(
    size_name: str = "ti", *, distilled: bool = False, size: int = 32, patch: int = 8, classes: int = 7, depth: int = 12
) -> nn.Module:
    middle = "_distilled" if distilled else ""
    name = f"{TIMM[size_name]}{middle}_patch16_224"
    return randomized(timm.create_model(name, img_size=size, patch_size=patch, num_classes=classes, depth=depth))


def hugging_face(kind: str, size_name: str = "ti", *, size: int = 32, patch: int = 8, classes: int = 7) -> nn.Module:
    """`kind`: with_teacher, deit (a distillation token without a head) or vit."""
    import transformers

    width, heads = SHAPES[size_name]
    options = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "image_size": size,
        "patch_size": patch,
        "num_labels": classes,
        "layer_norm_eps": 1e-6,  # transformers' own default is 1e-12; DeiT was trained with this
    }
    match kind:
        case "with_teacher":
            model = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**options))
        case "deit":
            model = transformers.DeiTForImageClassification(transformers.DeiTConfig(**options))
        case _:
            model = transformers.ViTForImageClassification(transformers.ViTConfig(**options))
    return randomized(model)
