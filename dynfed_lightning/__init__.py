"""Communication-efficient federated learning for PyTorch Lightning, on low-bit kernels."""

from pathlib import Path as _Path

# In a source checkout the Triton kernels live in ../kernels, which an installed package has as `dynfed_lightning.kernels`.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "kernels" / "__init__.py").is_file() and (_checkout / "csrc").is_dir():
    __path__.append(str(_checkout))

__version__ = "0.1.0"
