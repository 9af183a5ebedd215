"""What is known about a file of published weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """A file of weights that others have published. Nothing in it is trusted; this says what to expect.

    Attributes:
        name: name under which the user selects it.
        description: one line.
        backbone: name of the backbone that takes the weights.
        settings: of that backbone, by field.
        channels: number of channels of the images.
        spacing: of the images in pre-training, in words.
        intensities: of the images in pre-training, in words.
        corpus: what the weights were trained on, in words.
        labels: whether labels were used.
        licence: of the weights.
        reference: publication, in words; BibTeX is in `citations.bib` beside the module, under the key `name`.
        page: where its publishers describe it.
        url: address of the file; empty if its publishers ask for a form first, or the address is not known.
        file: name of the file.
        sha256: digest of its content; empty if it is not known.
        known_from: how the facts are known: seen in the file itself, or read where.
    """

    name: str
    description: str
    backbone: str
    settings: Mapping[str, str] = field(default_factory=dict)
    channels: int
    spacing: str
    intensities: str
    corpus: str
    labels: bool = False
    licence: str
    reference: str
    page: str
    url: str = ""
    file: str
    sha256: str = ""
    known_from: str
