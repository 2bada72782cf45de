"""Everything that travels through qflux, with its shapes.

Letters: ``B`` batch, ``C`` latent channels, ``h, w`` latent height and width, ``H, W`` pixels, ``L`` text tokens,
``D`` text width, ``p`` pixels a predicted position covers (``Family.vae_scale * Family.patch``).
This module imports no torch: the config and the data check run without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Size = tuple[int, int]  # (H, W), pixels
ShapeKey = tuple[Size, ...]  # the target's size, then each control's


@dataclass(frozen=True)
class Resize:
    """Cut ``box`` (left, top, right, bottom; source pixels, maybe fractional) out of an image, resize to ``size``."""

    box: tuple[float, float, float, float]
    size: Size


@dataclass(frozen=True)
class SizePlan:
    """What the one geometry function decided for one sample."""

    target: Resize
    controls: tuple[Resize, ...] = ()

    @property
    def shape_key(self) -> ShapeKey:
        """Samples of one shape key can share a micro-batch."""
        return (self.target.size, *(control.size for control in self.controls))


@dataclass(frozen=True)
class SampleSpec:
    """All that decides an encoded sample, without a decoded pixel: digests of image files, caption and sizes."""

    id: str
    prompt: str
    target: str | None
    controls: tuple[str, ...]
    mask: str | None
    sizes: SizePlan


@dataclass
class EditSample:
    """One edit pair with decoded pixels, already cut and resized by its size plan.

    ``target`` and ``controls`` are RGB, ``mask`` is 8-bit grey of the target's size. ``target`` is None only where a
    sample is drawn, not learned. ``digest`` identifies the sources' bytes and the caption.
    """

    target: Image.Image | None
    controls: list[Image.Image]
    prompt: str
    mask: Image.Image | None
    id: str
    digest: str
    sizes: SizePlan


@dataclass
class EncodedSample:
    """What the network consumes; cached and uncached runs meet here. Unbatched, in the encoder's dtype.

    target     ``[C, h, w]`` latents, normalised, before flattening into tokens
    controls   one ``[C, h_i, w_i]`` a control
    text       named tensors such as ``[L, D]`` embeddings or a ``[D]`` pooled vector
    edit_mask  ``[H/p, W/p]`` in [0, 1], fp32, on the grid of predicted positions; or None
    target_std ``[C, h, w]`` standard deviation of the VAE posterior where it is drawn anew each epoch; or None
    """

    target: Tensor | None
    controls: list[Tensor]
    text: dict[str, Tensor]
    edit_mask: Tensor | None
    sizes: SizePlan
    target_std: Tensor | None = None


@dataclass
class Batch:
    """Encoded samples of one shape key with a batch axis in front of every tensor.

    A sample without a mask beside samples with one has NaN in ``edit_mask``: its positions all weigh 1.

    ``index`` and ``epoch`` name each sample's position in the sources and the pass over them: all draws depend on them.
    """

    target: Tensor
    controls: list[Tensor]
    text: dict[str, Tensor]
    edit_mask: Tensor | None
    sizes: SizePlan
    index: tuple[int, ...]
    epoch: tuple[int, ...]


@dataclass(frozen=True)
class Micro:
    """A micro-batch before its samples are read: positions and the share of the step's mean it carries."""

    positions: tuple[tuple[int, int], ...]  # (epoch, index)
    share: float


@dataclass(frozen=True)
class Step:
    """One optimizer step for this process. Every process has the same number of micro-batches."""

    number: int
    micros: tuple[Micro, ...]


@dataclass
class Noised:
    """A point on the probability path between latents (sigma 0) and noise (sigma 1).

    x_t ``[B, C, h, w]`` · sigma ``[B]`` fp32 in (0, 1] · target ``[B, C, h, w]``: what the network should predict.
    """

    x_t: Tensor
    sigma: Tensor
    target: Tensor


@dataclass
class TrainState:
    """All that a resume needs besides weights and optimizer state. ``batch`` is G, the samples of one step."""

    step: int = 0
    samples: int = 0
    batch: int = 0
    seed: int = 0


@dataclass(frozen=True)
class EncodeStage:
    """Components loaded together, used to encode, and freed. Image stages read pixels, text stages the prompt."""

    name: str
    components: tuple[str, ...]
    kind: Literal["image", "text"]


@dataclass(frozen=True)
class Family:
    """A model family as data: what shared code must know of it, so that no shared code asks for its name.

    controls        smallest and largest number of controls its official pipeline takes
    control_size    how that pipeline sizes a control: (H, W) → (H, W); used by ``control_plan: pipeline``
    sigma_mu        (scheduler config, predicted positions) → μ of the pipeline's dynamic shift; None where it is fixed
    sister          trainer to use for control counts outside ``controls``
    adapter_targets named target lists for ``model.lora.target_modules``
    recipe          raised when ``encode`` gives other tensors than before: cached entries are then made again
    drawing         components, besides the denoiser and text encoders, that the pipeline needs to draw
    """

    name: str
    pipeline_class: str
    stages: tuple[EncodeStage, ...]
    denoiser: str = "transformer"
    vae_scale: int = 8
    patch: int = 2
    controls: tuple[int, int] = (0, 0)
    control_size: Callable[[Size], Size] | None = None
    sigma_mu: Callable[[Mapping[str, Any], int], float] | None = None
    sister: str | None = None
    text_sees_controls: bool = False
    text_length: int = 512
    adapter_targets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    block_lists: tuple[str, ...] = ()
    recipe: int = 1
    drawing: tuple[str, ...] = ("vae", "scheduler")

    @property
    def size_multiple(self) -> int:
        """Heights and widths in pixels are multiples of this."""
        return self.vae_scale * self.patch
