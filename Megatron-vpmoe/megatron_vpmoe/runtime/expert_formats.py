"""Whether this machine can make the experts' products in a narrow format: the gate of ``moe.experts_precision``."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from megatron_vpmoe.config.expert_formats import FORMATS
from megatron_vpmoe.errors import DeviceError

TORCHAO = "0.18.0"
"""The one version whose conversions are called: they are a prototype, and change from one to the next."""
_SOURCE = "moe.experts_precision"


@functools.cache
def check_format(name: str, hidden: int, ffn: int, capability: tuple[int, int] | None) -> None:
    """Refuse what is not installed, and what the card has no kernels for.

    Args:
        name: of ``FORMATS``.
        hidden: the model's width.
        ffn: the inner width of one routed expert.
        capability: the card's compute capability; None: there is no GPU, and the format is emulated.

    Raises:
        DeviceError: names the package, or the capability that is wanted.
    """
    for what, remedy in _missing(name, hidden, ffn, capability):
        raise DeviceError(what, source=_SOURCE, remedy=remedy)


def _missing(name: str, hidden: int, ffn: int, capability: tuple[int, int] | None) -> Iterator[tuple[str, str]]:
    wanted = FORMATS[name]
    if capability is not None and capability != wanted.capability:
        others = [other for other, its in FORMATS.items() if its.capability == capability]
        yield (
            f"{name} wants a card of compute capability {_dotted(wanted.capability)}, and this one's is "
            f"{_dotted(capability)}; nothing is emulated on a GPU",
            f"set --experts-precision {' or '.join([*others, 'null'])}",
        )
    found = _version("torchao")
    if found != TORCHAO:
        yield f"{name} wants torchao {TORCHAO}, and {found or 'none'} is here", _remedy(f"torchao=={TORCHAO}")
    if capability is None:
        return
    if hidden % wanted.card_block or ffn % wanted.card_block:
        yield (
            f"the kernels of {name} want widths of multiples of {wanted.card_block}, not {hidden} and {ffn}",
            "change --hidden-size and --moe-ffn-hidden-size, or set --experts-precision null",
        )
    for package in wanted.packages:
        if _version(package) is None:
            yield f"the kernels of {name} want {package}, and none is here", _remedy(package)


def _remedy(package: str) -> str:
    return f"pip install {package}, or all of requirements/gpu.txt; or set --experts-precision null"


def _version(package: str) -> str | None:
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
