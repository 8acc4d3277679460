"""The faiss library, for approximate indexes: found, whole, and one of its two wheels."""

from importlib import import_module, metadata

import torch

from torch_src.runtime.errors import UserError


def load_faiss():
    """Return the faiss module; UserError when it is missing, hollow, or two wheels lie over each other.

    faiss-cpu and faiss-gpu own the same folder: the later install silently replaces the earlier one, and
    uninstalling either leaves an empty `faiss` that imports and can do nothing.
    """
    wheels = [name for name in ("faiss-cpu", "faiss-gpu") if _installed(name)]
    mend = "mend: pip uninstall -y faiss-cpu faiss-gpu, then install the requirements file again"
    if len(wheels) == 2:
        raise UserError(f"both faiss-cpu and faiss-gpu are installed, one over the other; {mend}")
    try:
        faiss = import_module("faiss")
    except ImportError as error:
        raise UserError(f"faiss cannot be imported ({error}); {mend}") from error
    if not hasattr(faiss, "knn"):
        raise UserError(f"faiss is hollow: it imports but has no functions in it; {mend}")
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True
