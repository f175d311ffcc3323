"""Lightning, importable: it imports torchvision, whose operators may not fit the installed torch."""

from clplat._torchvision import ensure_importable

ensure_importable()

import pytorch_lightning as pl  # noqa: E402  # only after the line above

__all__ = ["pl"]
