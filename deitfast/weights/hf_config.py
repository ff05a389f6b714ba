"""The configurations that transformers reads next to weights: config.json and preprocessor_config.json."""

from typing import Any

from torch import nn

from deitfast.models.vit import VisionTransformer
from deitfast.weights.load import TrainedModel


def hf_config(trained: TrainedModel) -> dict[str, Any]:
    """Return config.json of a transformer: its class in transformers, its shape, its class names."""
    model, recipe = trained.model, trained.recipe
    assert isinstance(model, VisionTransformer)
    norm = model.norm
    assert isinstance(norm, nn.LayerNorm)
    shape = model.shape
    classes = trained.classes or tuple(f"LABEL_{number}" for number in range(trained.num_classes))
    if not recipe.distilled:
        network = "ViTForImageClassification"
    else:
        network = "DeiTForImageClassification" + ("" if model.head_dist is None else "WithTeacher")
    return {
        "architectures": [network],
        "model_type": "deit" if recipe.distilled else "vit",
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.hidden,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": norm.eps,
        "image_size": recipe.augment.size,
        "patch_size": recipe.model.patch,
        "num_channels": 3,
        "qkv_bias": True,
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
        "problem_type": "single_label_classification",
        "dtype": "float32",
    }


def hf_processor(trained: TrainedModel) -> dict[str, Any]:
    """Return preprocessor_config.json: the processor that resizes, crops and normalizes as evaluation does."""
    augment = trained.recipe.augment
    resized = augment.size if augment.crop == "padded" else int(augment.size / augment.eval_crop)
    squash = augment.eval_resize == "squash"
    square = {"height": resized, "width": resized}
    return {
        "image_processor_type": "DeiTImageProcessor" if squash else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": resized},
        "resample": 3 if augment.eval_interpolation == "bicubic" else 2,
        "do_center_crop": True,
        "crop_size": {"height": augment.size, "width": augment.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(augment.mean),
        "image_std": list(augment.std),
    }
