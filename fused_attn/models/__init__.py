"""Model families, one file each, and the registry that names them."""

from . import bottleneck_resnet, cifar_resnet, deit, resnet, se_resnet, wide_resnet
from .registry import create_model, list_models, register_model

__all__ = [
    "bottleneck_resnet",
    "cifar_resnet",
    "create_model",
    "deit",
    "list_models",
    "register_model",
    "resnet",
    "se_resnet",
    "wide_resnet",
]
