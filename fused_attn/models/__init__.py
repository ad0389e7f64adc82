"""Model families, one file each, and the registry that names them."""

from . import resnet, wide_resnet
from .registry import create_model, list_models, register_model

__all__ = ["create_model", "list_models", "register_model", "resnet", "wide_resnet"]
