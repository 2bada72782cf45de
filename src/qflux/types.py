"""Everything that travels through qflux, with its shapes.

Letters: ``B`` batch, ``C`` latent channels, ``h, w`` latent height and width, ``H, W`` pixels, ``L`` text tokens,
``D`` text width, ``p`` pixels a predicted position covers (``Family.vae_scale * Family.patch``).
This module imports no torch: the config and the data check run without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Size = tuple[int, int]  # (H, W), pixels
ShapeKey = tuple[Size, ...]  # the target's size, then each control's


class Crew(Protocol):
    """The processes of a run as one of them sees them; all call ``share`` and ``gather`` in the same order.

    ``lockstep`` tells that the network is spread over them: all have to make the same calls of it.
    """

    rank: int
    processes: int
    lockstep: bool

    def share(self, make: Callable[[], Any]) -> Any:
        """The JSON value that ``make`` gives on process 0, on all; what it raises is raised on all."""

    def gather(self, make: Callable[[], Any]) -> list[Any]:
        """The JSON values that ``make`` gives on each process, on all; the first failure is raised on all."""


@dataclass(frozen=True)
class Resize:
    """Cut ``box`` (left, top, right, bottom; source pixels, maybe fractional) out of an image, resize to ``size``.

    With ``scaled`` the box is resized to that size and ``size`` cut out of its middle, as some pipelines do.
    """

    box: tuple[float, float, float, float]
    size: Size
    scaled: Size | None = None

    def as_json(self) -> list[Any]:
        """Plain lists for digests: all that decides the pixels."""
        plain: list[Any] = [[float(edge) for edge in self.box], [int(edge) for edge in self.size]]
        return plain if self.scaled is None else [*plain, [int(edge) for edge in self.scaled]]


@dataclass(frozen=True)
class SizePlan:
    """What the one geometry function decided for one sample.

    ``text_controls`` are the controls as a text encoder that sees them gets them; empty where it gets ``controls``.
    They are cut out of the source pictures, or, with ``text_from_controls``, out of the sized controls.
    """

    target: Resize
    controls: tuple[Resize, ...] = ()
    text_controls: tuple[Resize, ...] = ()
    text_from_controls: bool = False

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
    sample is drawn, not learned. ``digest`` identifies the sources' bytes and the caption. ``text_controls`` are what
    the text encoder sees: the controls where the size plan names no other sizes for it.
    """

    target: Image.Image | None
    controls: list[Image.Image]
    prompt: str
    mask: Image.Image | None
    id: str
    digest: str
    sizes: SizePlan
    text_controls: list[Image.Image] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.text_controls and not self.sizes.text_controls:
            self.text_controls = self.controls


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
    Text tensors of different lengths are padded with zeros at the end; ``<name>_mask`` ``[B, L]`` (1 = a token) is then
    beside them, and only then.

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
    """Components loaded together, used to encode, and freed. Image stages read pixels, text stages the prompt.

    ``text_length`` is False for a text stage whose encoder always takes a number of tokens of its own: its entries then
    outlast another ``data.max_sequence_length``.
    """

    name: str
    components: tuple[str, ...]
    kind: Literal["image", "text"]
    text_length: bool = True


@dataclass(frozen=True)
class Family:
    """A model family as data: what shared code must know of it, so that no shared code asks for its name.

    folder          its data beside the trainer's file: real structures, names of layers in other formats; empty = none
    vae_scale       pixels a VAE position covers; ``patch`` such positions a side make one predicted position
    controls        smallest and largest number of controls its official pipeline takes
    sisters         number of controls outside that → trainer to use
    control_size    how that pipeline sizes a control: (H, W) → (H, W); used by ``control_plan: pipeline``
    text_control_size  the same for the picture its text encoder sees, in every plan; None = the control itself
    control_patch   code with which users keep the pipeline from resizing controls that the config sized: ``$height``,
                    ``$width`` (the first's), ``$in_order`` ((width, height): the last, then each) are filled in
    control_limits  smallest side in pixels and largest aspect that the pipeline accepts of a control
    sigma_mu        (scheduler config, predicted positions, denoising steps) → μ of the pipeline's dynamic shift; None
                    where it is fixed
    text_length     tokens to which prompts are cut or padded; 0 where the pipeline takes them whole
    text_limit      most tokens that the pipeline accepts; 0 = any number
    text_varies     whether prompts keep their own lengths, so that a batch of several is padded and masked
    reserved        marks that a prompt must not hold: the encoder would take them for pictures
    guidance        name of the pipeline's argument for ``logging.validation.guidance_scale``
    classifier_free whether a guidance above 1 runs the network a second time with the empty prompt
    empty_prompt    that prompt, also the one of a dropped caption
    adapter_targets named target lists for ``model.lora.target_modules``
    block_lists     the denoiser's lists of blocks, in the order in which they are called
    feed_forward    names of the feed-forward modules in a block: what ``gradient_checkpointing: ffn`` recomputes
    keep            layers in the blocks that stay in the base's dtype when it is quantized: a name, a part of one
                    between dots, or an expression that matches the full name
    recipe          raised when ``encode`` gives other tensors than before: cached entries are then made again
    drawing         components, besides the denoiser and text encoders, that the pipeline needs to draw
    """

    name: str
    pipeline_class: str
    stages: tuple[EncodeStage, ...]
    folder: str = ""
    denoiser: str = "transformer"
    vae_scale: int = 8
    patch: int = 2
    controls: tuple[int, int] = (0, 0)
    sisters: Mapping[int, str] = field(default_factory=dict)
    control_size: Callable[[Size], Size] | None = None
    text_control_size: Callable[[Size], Size] | None = None
    control_patch: str = ""
    control_limits: tuple[int, float] | None = None
    sigma_mu: Callable[[Mapping[str, Any], int, int], float] | None = None
    text_sees_controls: bool = False
    text_length: int = 512
    text_limit: int = 512
    text_varies: bool = False
    reserved: tuple[str, ...] = ()
    guidance: str = "guidance_scale"
    classifier_free: bool = False
    empty_prompt: str = ""
    adapter_targets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    block_lists: tuple[str, ...] = ()
    feed_forward: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    recipe: int = 1
    drawing: tuple[str, ...] = ("vae", "scheduler")

    @property
    def size_multiple(self) -> int:
        """Heights and widths in pixels are multiples of this."""
        return self.vae_scale * self.patch
