"""setuptools' back-end, for which torch need not be in pip's isolated build environment.

Only headers of torch go into the kernels, and they are built for its stable ABI.  So a build takes the torch of the
environment that it installs into, which an isolated one hides, and asks for another only where there is none.
"""

import importlib.metadata
import os
import re
import site
import sys

from setuptools.build_meta import *  # noqa: F403

OLDEST = (2, 11)


def find_torch() -> str | None:
    """Folder of installed packages with a torch that the kernels can be built with."""
    for folder in dict.fromkeys((*sys.path, *site.getsitepackages(), site.getusersitepackages())):
        for found in importlib.metadata.distributions(name="torch", path=[folder]):
            if tuple(map(int, re.findall(r"\d+", found.version)[:2])) >= OLDEST:
                return folder
    return None


TORCH = find_torch()
if TORCH is not None and TORCH not in sys.path:
    sys.path.append(TORCH)


# setuptools' own run setup.py, which wants torch.


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    if TORCH is not None or os.environ.get("FUSED_ATTN_NO_EXTENSION") == "1":
        return []
    return [f"torch>={'.'.join(map(str, OLDEST))}"]


def get_requires_for_build_sdist(config_settings=None) -> list[str]:
    return []


get_requires_for_build_editable = get_requires_for_build_wheel
