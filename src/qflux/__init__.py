"""qflux fine-tunes diffusion models, image editors first."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("qflux")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
