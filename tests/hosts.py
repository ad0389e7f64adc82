"""Fixtures: transformers and timm as ``make`` installs them; tests that ask for them are skipped where they are not."""

import importlib.machinery
import sys
import types
from pathlib import Path

import pytest

#: Where ``make`` puts them.
HOSTS = str(Path(sys.prefix) / "hosts")


@pytest.fixture(scope="module")
def host_packages():
    sys.path.append(HOSTS)
    yield
    sys.path.remove(HOSTS)


@pytest.fixture(scope="module")
def transformers(host_packages):
    return pytest.importorskip("transformers", minversion="5.0")


class _Names(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Anything(types.ModuleType):
    """A module with a class for every name that is asked for."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (), {})


@pytest.fixture(scope="module")
def timm(host_packages):
    """timm imports torchvision for what it does to images; where that does not import, an empty one takes its place."""
    added = []
    try:
        import torchvision.transforms  # noqa: F401
    except Exception:  # its builds for CUDA raise RuntimeError beside a torch for the CPU
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        below = ("transforms", "transforms.functional", "transforms.v2", "datasets", "datasets.folder", "ops")
        below = (*below, "ops.misc", "models", "models.feature_extraction")
        for name in ("torchvision", *(f"torchvision.{name}" for name in below)):
            module = _Anything(name)
            module.__path__, module.__spec__ = [], importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = module
            added.append(name)
            if "." in name:
                parent, _, last = name.rpartition(".")
                setattr(sys.modules[parent], last, module)
    yield pytest.importorskip("timm", minversion="1.0")
    for name in added:
        del sys.modules[name]
