"""Model families, one file each, and the registry that names them."""

from . import (
    attention_wise,
    bottleneck_resnet,
    cifar_resnet,
    coatnet,
    deit,
    googlenet,
    resnet,
    se_resnet,
    swin,
    wide_resnet,
)
from .registry import create_model, list_models, register_model
from .weights import load_weights

__all__ = [
    "attention_wise",
    "bottleneck_resnet",
    "cifar_resnet",
    "coatnet",
    "create_model",
    "deit",
    "googlenet",
    "list_models",
    "load_weights",
    "register_model",
    "resnet",
    "se_resnet",
    "swin",
    "wide_resnet",
]
